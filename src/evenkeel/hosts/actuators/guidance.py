"""Whether a run guides as the runs did along which a correction was measured.

A pipeline has many knobs for guidance (its scale, a true one beside an embedded one, rescaling, an end of
it from a callback). What all of them change is how the denoiser's outputs are combined, and that is
measured: by regression of what the scheduler is handed on what the denoiser gave.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.errors import Incompatible
from evenkeel.hosts.pipeline.denoiser_calls import answer_of, branches_of, is_doubled, shares_of
from evenkeel.hosts.scheduler.interception import Interceptor
from evenkeel.statistics.provenance import Provenance

_RESCALED, _OTHER = "rescaled", "not linear"
_CLOSE = {torch.float32: 0.01, torch.float64: 0.01}  # else 0.05


def combination(answers: Sequence[Tensor], given: Tensor) -> str:
    """How the first image of ``given`` was made of the denoiser's outputs, as text.

    The shares of the outputs in the order in which they were given, ``-4 5`` for guidance of scale 5;
    ``-4 5 rescaled`` where these are their proportions (the factor differs from image to image);
    ``not linear``; and "" where it cannot be told, because the outputs are the same.
    """
    for rows in (len(given), len(given) // 2) if is_doubled(given) else (len(given),):
        parts = [p[:1] for answer in answers for p in branches_of(answer, given, rows)]
        if not parts:
            continue
        apart = max((float((p - parts[0]).abs().max()) for p in parts[1:]), default=1.0)
        if apart <= 1e-6 * float(parts[0].abs().max()):
            return ""
        shares = shares_of(parts, given[:1])
        if shares is None or not bool(shares.isfinite().all()):
            return _OTHER
        total = float(shares.sum())
        if abs(total) < 0.05:
            return _OTHER
        rescaled = abs(total - 1) > _CLOSE.get(given.dtype, 0.05)
        text = " ".join(f"{round(s / total, 2) + 0.0:g}" for s in shares.tolist())
        return f"{text} {_RESCALED}" if rescaled else text
    return ""


def refuse_guidance(made_for: Provenance, guidance_scale: Any) -> None:
    """Raise Incompatible where a guidance scale is known to be another than the calibrated one."""
    calibrated = made_for.guidance_scale
    if guidance_scale is None or calibrated is None or guidance_scale == calibrated:
        return
    raise Incompatible(
        f"the record was calibrated at guidance_scale={calibrated}, this run uses {guidance_scale}; the "
        f"error after guidance grows with it. Calibrate at this scale, or pass allow=('guidance',)."
    )


def refuse_combination(made_for: Provenance, answers: Sequence[Tensor], given: Tensor) -> None:
    """Raise Incompatible where a step combines the denoiser's outputs in another way than was calibrated."""
    if not made_for.guidance or not answers:
        return
    found = combination(answers, given)
    if not found or _alike(found, made_for.guidance, _CLOSE.get(given.dtype, 0.05)):
        return
    raise Incompatible(
        f"the record was calibrated with guidance that combines the denoiser's outputs as "
        f"({made_for.guidance}), this run combines them as ({found}): its scale, a true scale beside an "
        f"embedded one, rescaling or a callback does this. The error after guidance is another then. "
        f"Calibrate with these settings, or pass allow=('guidance',)."
    )


def _alike(found: str, calibrated: str, close: float) -> bool:
    ours, theirs = (_shares(text) for text in (found, calibrated))
    if ours is None or theirs is None:
        return ours is theirs
    if len(ours) != len(theirs) or found.endswith(_RESCALED) != calibrated.endswith(_RESCALED):
        return False
    return all(abs(a - b) <= close * max(1.0, abs(b)) for a, b in zip(ours, theirs, strict=True))


def _shares(text: str) -> list[float] | None:
    return None if text == _OTHER else [float(s) for s in text.removesuffix(_RESCALED).split()]


class GuidanceMeter(Interceptor):
    """Measures the combination in the first step that it sees, for the provenance of what is fitted.

    Args:
        run: whose ``guidance`` is set, unless it is already.
        denoiser: of the call.

    """

    on_denoiser = True

    def __init__(self, run: Any, denoiser: nn.Module) -> None:
        self._run, self._denoiser = run, denoiser
        self._here = threading.local()
        self._handle: Any = None

    def attach(self) -> None:
        """Listen to the denoiser."""
        if self._handle is None and not self._run.guidance:
            self._handle = self._denoiser.register_forward_hook(self._keep)

    def detach(self) -> None:
        """Listen no longer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def before(
        self, scheduler: Any, timestep: Any, output: Tensor, sample: Tensor, kwargs: dict[str, Any]
    ) -> None:
        """The first step."""
        answers: list[Tensor] = getattr(self._here, "answers", [])
        if answers and not self._run.guidance:
            self._run.guidance = combination(answers, output)
        self._here.answers = []
        self.detach()

    @torch.compiler.disable  # type: ignore[misc, untyped-decorator]
    def _keep(self, denoiser: nn.Module, arguments: Any, output: Any) -> None:
        kept = getattr(self._here, "answers", [])
        self._here.answers = [*kept, answer_of(output).detach()]
