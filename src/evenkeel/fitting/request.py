"""What is asked of a measurement or fit, what does not change from batch to batch, its JSON form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from evenkeel.corrections.base import Correction
from evenkeel.errors import CalibrationError
from evenkeel.hosts.pipeline.fingerprint import fingerprint, quantizer_text
from evenkeel.hosts.pipeline.layouts import LatentLayout
from evenkeel.hosts.pipeline.pipelines import Prompt, call_parameters, denoiser_of

TRAJECTORIES = ("full-precision", "quantized", "corrected")


@dataclass(frozen=True)
class Settings:
    """What does not change from batch to batch; the arguments of ``calibrate``, and the twins.

    Attributes:
        twins: fingerprints of the full-precision and the quantized denoiser.
        quantizer: what quantized it, as text.
        (others): see ``calibrate``.

    """

    num_inference_steps: int
    guidance_scale: float | None
    call: dict[str, Any]
    trajectory: str
    correction: Correction | None
    layout: LatentLayout | None
    histograms: bool
    side_by_side: bool
    twins: tuple[str, str]
    quantizer: str

    @classmethod
    def of(
        cls,
        pipeline: Any,
        quantized: nn.Module,
        num_inference_steps: int,
        guidance_scale: float | None,
        call: dict[str, Any] | None,
        *,
        trajectory: str = "corrected",
        correction: Correction | None = None,
        layout: LatentLayout | None = None,
        histograms: bool = False,
        side_by_side: bool = True,
    ) -> Settings:
        """The settings, with the pipeline's own guidance scale where None is given.

        Raises:
            CalibrationError: the quantized denoiser computes the same as the full-precision one.

        """
        if guidance_scale is None:
            default = call_parameters(pipeline).get("guidance_scale")
            if default is not None and isinstance(default.default, (int, float)):
                guidance_scale = float(default.default)
        twins = fingerprint(denoiser_of(pipeline)), fingerprint(quantized)
        if twins[0] == twins[1]:
            raise CalibrationError(
                "the quantized denoiser is identical to the full-precision one: nothing was "
                "quantized, or the same object was passed twice."
            )
        return cls(
            num_inference_steps,
            guidance_scale,
            dict(call or {}),
            trajectory,
            correction,
            layout,
            histograms,
            side_by_side,
            twins,
            quantizer_text(quantized),
        )


def check_request(
    pipeline: Any, quantized: nn.Module, prompts: Sequence[Prompt], batch_size: int = 1
) -> None:
    """What every measurement and fit asks of its arguments.

    Raises:
        CalibrationError: no prompts, a single text in place of a list, an empty batch, or the
            pipeline's own denoiser in place of its quantized copy.

    """
    if isinstance(prompts, str) or len(prompts) == 0:
        raise CalibrationError(
            f"expected a non-empty list of prompts, got {prompts!r}; a few dozen are plenty."
        )
    if batch_size < 1:
        raise CalibrationError(f"batch_size must be at least 1, got {batch_size}.")
    if quantized is denoiser_of(pipeline):
        raise CalibrationError(
            "quantized is the pipeline's own denoiser object; pass the quantized copy, and keep the "
            "full-precision one in the pipeline."
        )
