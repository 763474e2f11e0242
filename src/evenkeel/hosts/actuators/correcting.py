"""Who carries out which stage of a correction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from evenkeel.corrections.base import Correction, refuse_foreign
from evenkeel.hosts.actuators.beside import Beside
from evenkeel.hosts.actuators.corrector import Corrector
from evenkeel.hosts.actuators.denoiser_edit import DenoiserEdit
from evenkeel.hosts.actuators.head_switch import HeadSwitch
from evenkeel.hosts.actuators.requery import Requery
from evenkeel.hosts.scheduler.interception import Interceptor

Carrier = Callable[[Corrector, nn.Module], Interceptor]
# The other stages are the sampler's own, and the corrector's. After it, in this order.
CARRIERS: dict[str, Carrier] = {
    "layers": lambda corrector, denoiser: Beside(corrector.correction, denoiser),
    "refresh": Requery,
    "head": HeadSwitch.of,
    "level": DenoiserEdit,
    "branch": DenoiserEdit,
}


def interceptors_of(
    correction: Correction, pipeline: Any, denoiser: nn.Module, **options: Any
) -> list[Interceptor]:
    """Everything that carries ``correction`` out, the corrector of the sampler's step first if it has one.

    Args:
        correction: whose ``stages`` decide.
        pipeline: that samples.
        denoiser: of it.
        options: as of ``Corrector``.

    Raises:
        Incompatible: no correction, or one that does not fit this denoiser.

    """
    refuse_foreign(correction)
    if correction.stages == ("layers",):  # no step has to be planned: any scheduler will do
        return [Beside(correction, denoiser)]
    corrector = Corrector(correction, pipeline, **options)
    carriers = dict.fromkeys(c for stage, c in CARRIERS.items() if stage in correction.stages)
    return [corrector, *(carrier(corrector, denoiser) for carrier in carriers)]


@contextmanager
def heads_attached(interceptors: Sequence[Interceptor]) -> Iterator[None]:
    """Inside, those of ``interceptors`` that change the denoiser (its head, its calls) do so."""
    for interceptor in interceptors:
        interceptor.attach()
    try:
        yield
    finally:
        for interceptor in interceptors:
            interceptor.detach()
