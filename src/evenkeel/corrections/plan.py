"""What a correction asks of a sampler, step by step, and what every correction can do.

A correction is fitted evidence plus a rule. ``plan(law)`` turns it into numbers for one sampling run;
a host carries them out. Nothing here calls a network.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from evenkeel.sampling.step_law import StepLaw


@dataclass(frozen=True)
class SamplerPlan:
    """Replace the result of step k by ``base * x_base + anchor * x_anchor + output * m - shift``.

    ``x_base`` is what the unmodified sampler returns, ``x_anchor`` the state that the step advances
    (``law.anchor``), ``m`` the model output. Steps that are not ``active`` are not touched at all.

    Attributes:
        law: the run this plan was made for.
        factor: (K, C) or (K, 1) float64: 1 + c, by how much the step is stretched; 1 where inactive.
        base, anchor, output: same shape as ``factor``.
        active: (K,) bool.
        explanations: one per step; why it is left alone, or "".
        shift: (K, *sample) float32 subtracted from the result of each active step, or None. The
            trailing shape is that of one sample, with 1 where values are shared.

    """

    law: StepLaw
    factor: Tensor
    base: Tensor
    anchor: Tensor
    output: Tensor
    active: Tensor
    explanations: tuple[str, ...]
    shift: Tensor | None = None

    @property
    def is_identity(self) -> bool:
        """Whether no step is changed."""
        return not bool(self.active.any())


@runtime_checkable
class Correction(Protocol):
    """Something that can be applied to a pipeline's sampler."""

    @property
    def name(self) -> str:
        """As in tables and on the command line, for example ``q-drift``."""
        ...

    @property
    def references(self) -> tuple[str, ...]:
        """Papers, with equation numbers."""
        ...

    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        """Numbers for one run.

        Raises:
            OutOfRange: a step's noise level was not calibrated and ``allow_range`` is False.
            UnsupportedSampler: the run cannot be corrected this way.

        """
        ...


def options_of(correction: Correction) -> dict[str, Any]:
    """A correction's knobs by name, without the evidence it was fitted from."""
    own = getattr(correction, "options", None)
    if own is not None:
        return dict(own)
    if not is_dataclass(correction):
        return {}
    return {f.name: getattr(correction, f.name) for f in fields(correction) if f.name != "evidence"}


def text_of(correction: Correction | None) -> str:
    """Name and knobs on one line, "" for no correction."""
    if correction is None:
        return ""
    knobs = (f"{k}={v!r}" for k, v in sorted(options_of(correction).items()))
    return f"{correction.name}({', '.join(knobs)})"


def digest_of(correction: Correction | None) -> str:
    """Tells any two corrections apart: by name, knobs, the moments of their evidence, their tables."""
    digest = hashlib.sha256(text_of(correction).encode())
    content: Any = getattr(correction, "content_digest", None)
    if content is not None:
        digest.update(content().encode())
    moments = getattr(getattr(correction, "evidence", None), "moments", None)
    if moments is not None:
        for tensor in (moments.mean_e, moments.mean_d, moments.central):
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Identity:
    """The correction that changes nothing, bit for bit."""

    name: str = "identity"
    references: tuple[str, ...] = ()

    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        """Every step inactive."""
        del allow_range
        return stretch_plan(
            law, torch.zeros(law.steps, 1, dtype=torch.float64), False, ["identity"] * law.steps
        )


def stretch_plan(
    law: StepLaw, c: Tensor, along_output: bool, explanations: list[str]
) -> SamplerPlan:
    """Stretch every step by 1 + c: along the noise direction, or along the raw increment.

    With y = x / alpha, a stretched step is ``y_next = y + (1 + c) (y_base - y)`` (Q-Drift Eq. 39), so
    ``x_next = (1 + c) x_base - c r x`` with ``r = alpha_next / alpha``; along the raw increment r = 1.
    A step that injects noise keeps its noise: only its deterministic part
    ``A[k,k] x + w[k,k] m - r x`` is stretched.
    """
    base, anchor = torch.ones_like(c), torch.zeros_like(c)
    output = torch.zeros_like(c)
    for k in range(law.steps):
        start = int(law.anchor[k])
        r = 1.0 if along_output or law.alpha[start] == 0 else law.alpha[k + 1] / law.alpha[start]
        if law.noise_weights[k] > 1e-9:
            anchor[k] = c[k] * (law.sample_weights[k, k] - r)
            output[k] = c[k] * law.output_weights[k, k]
        else:
            base[k] = 1 + c[k]
            anchor[k] = -c[k] * r
    return SamplerPlan(
        law=law,
        factor=1 + c,
        base=base,
        anchor=anchor,
        output=output,
        active=(c != 0).any(-1),
        explanations=tuple(explanations),
    )
