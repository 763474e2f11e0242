"""Every post-training quantization method by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.methods.base import Method
from evenkeel.quantizers.methods.efficientdm import EfficientDM
from evenkeel.quantizers.methods.mixdq import MixDQ
from evenkeel.quantizers.methods.ptq4dit import PTQ4DiT
from evenkeel.quantizers.methods.q_diffusion import QDiffusion
from evenkeel.quantizers.methods.round_to_nearest import RoundToNearest
from evenkeel.quantizers.methods.sa_ptq import SAPTQ
from evenkeel.quantizers.methods.sa_qlora import SAQLoRA
from evenkeel.quantizers.methods.svdquant import SVDQuant
from evenkeel.quantizers.methods.vidit_q import ViDiTQ

METHODS: dict[str, type[Method]] = {
    kind.name: kind
    for kind in (
        RoundToNearest,
        SVDQuant,
        MixDQ,
        ViDiTQ,
        QDiffusion,
        PTQ4DiT,
        SAPTQ,
        EfficientDM,
        SAQLoRA,
    )
}


def method_named(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        QuantizationError: no such method; lists those there are.

    >>> method_named("rtn").__name__
    'RoundToNearest'

    """
    if name not in METHODS:
        raise QuantizationError(f"no method called {name!r}; there is {', '.join(METHODS)}.")
    return METHODS[name]


def method_from(found: Mapping[str, Any]) -> Method:
    """The inverse of ``Method.as_dict``.

    Raises:
        QuantizationError: no such method, or fields that it does not have.

    """
    return method_named(str(found.get("method"))).from_dict(found)
