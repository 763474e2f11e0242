"""Corrections of the sampler, carried out by what the sampler is handed."""

from __future__ import annotations

import contextvars
from typing import Any

import torch
from torch import Tensor

from evenkeel.corrections.base import Correction
from evenkeel.corrections.plan import SamplerPlan
from evenkeel.errors import Incompatible, UnsupportedSampler
from evenkeel.hosts.actuators.step_change import ImageNoise, StepChange
from evenkeel.hosts.pipeline.layouts import LatentLayout
from evenkeel.statistics.provenance import Provenance

from .beside import add_once
from .sampling import Outputs, Recipe, law_of, read_recipe

SAMPLER_SAMPLE = "sampler_sample"  # comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE
KEY = "Evenkeel Correct"
_STAGES = {"output", "increment", "state"}


class Run:
    """One run of a sampler, whose answers are exchanged so that it steps where the plan wants it.

    The sampler is left alone: a step is linear in the latest answer, so that an answer exists with
    which it arrives at any wanted state (``Recipe.denoised_for``).
    """

    def __init__(self, plan: SamplerPlan, recipe: Recipe, outputs: Outputs, sigmas: Tensor) -> None:
        self.plan, self.recipe, self.outputs = plan, recipe, outputs
        self._sigmas = sigmas[:-1].double().cpu()
        self._changes: list[StepChange] = []
        self._samples: list[Tensor] = []  # oldest first
        self._edited: list[Tensor] = []
        self._given: list[Tensor] = []
        self._noise: ImageNoise | None = None
        self._plain = True

    def __call__(self, sigma: float, x: Tensor, denoised: Tensor) -> Tensor:
        """What the sampler is handed in place of ``denoised``.

        Raises:
            UnsupportedSampler: steps are not taken one after the other.

        """
        k = len(self._given)
        if k >= len(self._sigmas) or abs(sigma - self._sigmas[k]) > 1e-4 * abs(self._sigmas[k]):
            expected = float(self._sigmas[min(k, len(self._sigmas) - 1)])
            raise UnsupportedSampler(
                f"step {k} of {self.recipe.name} was expected at sigma {expected:.6g}, found {sigma:.6g}: it "
                f"does not take the steps of its schedule one after the other. Use another sampler."
            )
        if not self._changes:
            layout = LatentLayout(x.dim(), 1, x.shape[1], 1)
            self._changes = [
                StepChange.of(self.plan, i, layout, x.device) for i in range(len(self._sigmas))
            ]
        handed = self._handed(k, x.float(), denoised.float())
        result = denoised if handed is None else handed.to(denoised.dtype)
        self._given.append(result.float())
        return result

    def _handed(self, k: int, x: Tensor, denoised: Tensor) -> Tensor | None:
        """None: what it is handed anyhow."""
        a, b = float(self.outputs.a[k]), float(self.outputs.b[k])
        output = (denoised - b * x) / a
        change = self._changes[k]
        if change.edit is not None:
            if change.edit.std is not None and self._noise is None:
                self._noise = ImageNoise(x, change.edit.seed)
            output = change.edit(output, x, self._noise)
            self._plain = False
        self._samples.append(x)
        self._edited.append(output)
        if change.stretch is None and self._plain:
            return None
        self._plain = False
        law = self.plan.law
        target = torch.zeros_like(x)
        for j in range(k + 1):
            target = target + float(law.sample_weights[k, j]) * self._samples[j]
            target = target + float(law.output_weights[k, j]) * self._edited[j]
        if change.stretch is not None:
            target = change.stretch(target, self._samples[::-1], self._edited[::-1])
        return self.recipe.denoised_for(k, target, x, self._given)


def correct(
    model: Any,
    correction: Correction,
    made_for: Provenance,
    allow_range: bool,
    check_guidance: bool,
) -> Any:
    """A clone of the model whose samplers are corrected.

    Args:
        model: of ComfyUI.
        correction: of the sampler's outputs and steps.
        made_for: what its record was made for.
        allow_range: leave steps outside the calibrated noise levels alone.
        check_guidance: refuse another guidance than the calibrated one.

    Raises:
        Incompatible: the correction is of another model, or this one is corrected already.
        UnsupportedSampler: what the correction does cannot be done in ComfyUI.

    """
    impossible = sorted(set(correction.stages) - _STAGES - {"noise"})
    if impossible:
        raise UnsupportedSampler(
            f"{correction.name} changes {', '.join(impossible)}, which this node does not do; expected a "
            f"correction of the sampler's outputs and steps, such as exact-drift."
        )
    channels = int(made_for.layout["channels"])
    found = int(model.model.latent_format.latent_channels)
    if found != channels:
        raise Incompatible(
            f"the record is of a {made_for.pipeline_class} with {channels} latent channels; this model has "
            f"{found}. Load the model that it was made for."
        )
    clone = model.clone()
    current: contextvars.ContextVar[Run | None] = contextvars.ContextVar("run", default=None)

    def sampler_sample(executor: Any, guider: Any, sigmas: Tensor, *rest: Any, **named: Any) -> Any:
        if check_guidance:
            _refuse_guidance(made_for, guider)
        run = _run_of(correction, made_for, executor.class_obj, guider, sigmas, allow_range)
        token = current.set(run)
        try:
            return executor(guider, sigmas, *rest, **named)
        finally:
            current.reset(token)

    def post_cfg(arguments: dict[str, Any]) -> Tensor:
        run, denoised = current.get(), arguments["denoised"]
        if run is None:
            return denoised
        sigma = float(arguments["sigma"].flatten()[0])
        return run(sigma, arguments["input"], denoised)

    add_once(clone, SAMPLER_SAMPLE, KEY, sampler_sample)
    clone.set_model_sampler_post_cfg_function(post_cfg)
    return clone


def _run_of(
    correction: Correction,
    made_for: Provenance,
    sampler: Any,
    guider: Any,
    sigmas: Tensor,
    allow_range: bool,
) -> Run | None:
    model_sampling = guider.inner_model.model_sampling
    recipe = read_recipe(sampler, guider, sigmas)
    law, outputs = law_of(recipe, model_sampling, sigmas, made_for.prediction)
    plan = correction.plan(law, allow_range=allow_range)
    impossible = sorted(set(plan.stages) - _STAGES)
    if impossible:
        raise UnsupportedSampler(
            f"{correction.name} changes {', '.join(impossible)} of {recipe.name}, which this node does not "
            f"do. Use another correction of the record."
        )
    if plan.shift is not None and int(made_for.layout["patch"]) != 1:
        raise UnsupportedSampler(
            f"{correction.name} shifts packed latents, which ComfyUI does not have. Use another correction."
        )
    return None if plan.is_identity else Run(plan, recipe, outputs, sigmas)


def _refuse_guidance(made_for: Provenance, guider: Any) -> None:
    """The shares of the denoiser's outputs, ``-4 5`` for a scale of 5, are what a record knows."""
    try:
        shares = [float(part) for part in made_for.guidance.split()]
    except ValueError:
        return
    expected = {1: 1.0, 2: max(shares, default=0.0)}.get(len(shares))
    found = getattr(guider, "cfg", None)
    if expected is None or found is None or abs(found - expected) <= 0.01 * max(1.0, expected):
        return
    raise Incompatible(
        f"the record was calibrated at cfg {expected:g}, this run has {found:g}; the error after guidance "
        f"grows with it. Set cfg to {expected:g}, calibrate at {found:g}, or turn check_guidance off."
    )
