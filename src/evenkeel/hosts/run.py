"""A run: one way to sample with a pipeline, resolved once and passed along whole."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.errors import CalibrationError, UnsupportedSampler
from evenkeel.hosts.pipeline.components import component_keys, network_settings
from evenkeel.hosts.pipeline.contents import described, unknown
from evenkeel.hosts.pipeline.echo import echo
from evenkeel.hosts.pipeline.fingerprint import fingerprint, quantizer_text
from evenkeel.hosts.pipeline.layouts import LatentLayout, find_layout
from evenkeel.hosts.pipeline.pipelines import (
    call_parameters,
    default_guidance,
    denoiser_name,
    denoiser_swapped,
    quiet,
    run_pipeline,
    uncompiled,
)
from evenkeel.hosts.pipeline.prompts import Prompt, Prompts, refuse_unknown_labels
from evenkeel.hosts.processes import processes
from evenkeel.hosts.scheduler.interception import Interceptor, install, plain_class, set_aside
from evenkeel.hosts.scheduler.schedulers import config_of
from evenkeel.hosts.scheduler.tape import Recorder, Tape
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.provenance import Provenance
from evenkeel.storage import json_safe
from evenkeel.threads import sensible_threads


@dataclass(frozen=True)
class Batch:
    """Prompts that share one pipeline call, and the seeds of their noise.

    Attributes:
        prompts: of this call.
        first: index of its first prompt among all.
        seed: of the first prompt's noise; the next one has the next.

    """

    prompts: Prompts
    first: int
    seed: int

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def span(self) -> range:
        """The prompts' indices among all."""
        return range(self.first, self.first + len(self))

    @property
    def seeds(self) -> range:
        """One per prompt."""
        return range(self.seed, self.seed + len(self))

    @property
    def alone(self) -> Batch:
        """Its first prompt only."""
        return Batch(self.prompts[:1], self.first, self.seed)


# Arguments of a call that a run decides about, and where they are said.
_OWN = {
    "prompt": "prompts=",
    "class_labels": "prompts=",
    "batch_size": "prompts=",
    "generator": "seed=",
    "guidance_scale": "guidance_scale=",
    "num_inference_steps": "num_inference_steps=",
    "return_dict": "evenkeel",
}


class Run:
    """A pipeline, what it is asked for, and what follows from both.

    Every measurement, fit and comparison makes one and passes it along. What takes long (fingerprints) or
    needs a latent (the layout) is found when it is first asked for, and kept.

    Args:
        pipeline: a diffusers pipeline with its full-precision denoiser.
        prompts: texts, or class labels for class-conditional pipelines; ``Prompts.of`` with what else comes
            per prompt (embeddings, images, negative prompts, latents).
        num_inference_steps: as passed to the pipeline.
        guidance_scale: as passed to the pipeline; None uses the pipeline's default.
        seed: of the first prompt's initial noise; prompt i starts from ``seed + i``.
        batch_size: prompts per pipeline call.
        call: further arguments of the pipeline call, such as ``{"height": 512}``. Those that diffusers
            takes per prompt (``prompt_embeds``, ``image``, ``negative_prompt``...) go with the prompts
            where they have an entry for each.
        quantized: the denoiser's quantized twin, where there is one.
        layout: where the latent's channels are; found by itself for known pipelines.
        side_by_side: keep both denoisers where they are; False lets them take turns on the device.

    Attributes:
        prompts, call: what comes per prompt, and what all prompts share.
        name, denoiser: of the pipeline's own, full-precision denoiser.
        given_layout: the layout, where it was given or has been found.
        (others): as given, the guidance scale resolved.

    Raises:
        CalibrationError: no prompts, a single text in place of a list, an empty batch, or the
            pipeline's own denoiser in place of its quantized copy; an argument in ``call`` that has
            another number of entries than prompts, or that is one of these here.
        UnsupportedPipeline: no denoiser, or two.

    """

    def __init__(
        self,
        pipeline: Any,
        prompts: Sequence[Prompt],
        num_inference_steps: int,
        *,
        guidance_scale: float | None = None,
        seed: int = 0,
        batch_size: int = 8,
        call: dict[str, Any] | None = None,
        quantized: nn.Module | None = None,
        layout: LatentLayout | None = None,
        side_by_side: bool = True,
    ) -> None:
        if isinstance(prompts, str) or len(prompts) == 0:
            raise CalibrationError(
                f"expected a non-empty list of prompts, got {prompts!r}; a few dozen are plenty."
            )
        if batch_size < 1:
            raise CalibrationError(f"batch_size must be at least 1, got {batch_size}.")
        self.pipeline = pipeline
        self.prompts, self.call = self._inputs(Prompts.of(prompts), dict(call or {}))
        self.name = denoiser_name(pipeline)
        self.denoiser: nn.Module = getattr(pipeline, self.name)
        parameters = call_parameters(pipeline)
        if "class_labels" in parameters and "prompt" not in parameters:
            config = getattr(uncompiled(self.denoiser), "config", {})
            refuse_unknown_labels(self.prompts, config)
        if quantized is self.denoiser:
            raise CalibrationError(
                "quantized is the pipeline's own denoiser object; pass the quantized copy, and keep the "
                "full-precision one in the pipeline."
            )
        self.quantized = quantized
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = (
            default_guidance(pipeline) if guidance_scale is None else guidance_scale
        )
        self.seed, self.batch_size = seed, batch_size
        self.side_by_side = side_by_side
        self.given_layout = layout
        self.guidance = ""  # see Provenance; found along the way
        self._fingerprints: dict[nn.Module, str] = {}

    def _inputs(self, prompts: Prompts, call: dict[str, Any]) -> tuple[Prompts, dict[str, Any]]:
        """What comes per prompt, and the arguments that all prompts share."""
        for name, instead in _OWN.items():
            if name in call and not (name == "prompt" and call[name] is None):
                raise CalibrationError(
                    f"call[{name!r}] is for {instead} to say; leave it out of call."
                )
        placeholders = "prompt" in call
        call.pop("prompt", None)
        found, rest = prompts.with_call(call, self.pipeline)
        if placeholders and not found.embedded:
            raise CalibrationError(
                "call['prompt'] is None and there are no prompt_embeds to take its place."
            )
        return found, rest

    # ---- what it is made of

    def fingerprint(self, module: nn.Module) -> str:
        """The module's fingerprint, computed once."""
        module = uncompiled(module)
        if module not in self._fingerprints:
            self._fingerprints[module] = fingerprint(module)
        return self._fingerprints[module]

    @cached_property
    def pair(self) -> tuple[nn.Module, nn.Module]:
        """The full-precision and the quantized denoiser.

        Raises:
            CalibrationError: there is no quantized one, or it computes the same as the other.

        """
        if self.quantized is None:
            raise CalibrationError("this run has no quantized denoiser: pass quantized= to it.")
        if self.fingerprint(self.denoiser) == self.fingerprint(self.quantized):
            raise CalibrationError(
                "the quantized denoiser is identical to the full-precision one: nothing was "
                "quantized, or the same object was passed twice."
            )
        return self.denoiser, self.quantized

    @property
    def twins(self) -> tuple[str, str]:
        """Fingerprints of ``pair``, which is refused where they are equal."""
        full, quantized = self.pair
        return self.fingerprint(full), self.fingerprint(quantized)

    @cached_property
    def scheduler(self) -> tuple[str, dict[str, Any]]:
        """Class and configuration of the scheduler."""
        scheduler = self.pipeline.scheduler
        return plain_class(scheduler).__name__, config_of(scheduler)

    def layout(self, latent: Tensor) -> LatentLayout:
        """Where the channels are of what enters the scheduler.

        Raises:
            UnsupportedPipeline: it cannot be told.

        """
        if self.given_layout is None:
            self.given_layout = find_layout(self.pipeline, latent)
        return self.given_layout

    @property
    def identity(self) -> dict[str, Any]:
        """Everything but prompts and denoisers that decides about results, as JSON."""
        return {
            "pipeline": type(self.pipeline).__name__,
            "scheduler": list(self.scheduler),
            "steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "call": json_safe(described(self.call)),
            "layout": None if self.given_layout is None else self.given_layout.as_dict(),
        }

    def key(self, *denoisers: nn.Module) -> dict[str, Any]:
        """Everything that decides about what is made, for whoever keeps it and asks again: as JSON.

        That is ``identity``, these denoisers, and every other component of the pipeline by its content.
        """
        return {
            **self.identity,
            "components": self._components,
            "denoisers": [self.fingerprint(m) for m in denoisers],
            "settings": [network_settings(m) for m in denoisers],
            "device": torch.device(getattr(self.pipeline, "_execution_device", "cpu")).type,
            "versions": _versions("diffusers", "torch", "transformers"),
        }

    def refuse_unknown(self) -> None:
        """Before anything is kept under ``key``: refuse what it cannot tell from something else.

        Raises:
            CalibrationError: an argument of the call whose content nobody can tell.

        """
        hidden = [*unknown(self.call, "call"), *unknown(self._shown, "prompts")]
        if hidden:
            raise CalibrationError(
                f"{', '.join(hidden)}: whether it is the same next time cannot be told, so that nothing can "
                f"be kept and used again. Leave it out, or keep nothing (no folder, no resume)."
            )

    @property
    def _shown(self) -> dict[str, Any]:
        return {name: column.value for name, column in self.prompts.columns.items()}

    @cached_property
    def _components(self) -> dict[str, str]:
        return component_keys(self.pipeline, without=self.name)

    def provenance(
        self, law: StepLaw, x: Tensor, *, trajectory: str = "corrected", correction: str = ""
    ) -> Provenance:
        """Everything two records of such runs must agree on before they may be merged or applied.

        With the law of the steps, what entered the scheduler (prompts, steps, ...), whose outputs
        advanced it, and the correction that acted meanwhile, as text.
        """
        layout = self.layout(x[:, 0])
        scheduler_class, scheduler_config = self.scheduler
        return Provenance(
            pipeline_class=type(self.pipeline).__name__,
            denoiser=self.name,
            reference=self.twins[0],
            quantized=self.twins[1],
            quantizer=quantizer_text(self.pair[1]),
            scheduler_class=scheduler_class,
            scheduler_config=scheduler_config,
            prediction=law.prediction,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            timesteps=law.timesteps.tolist(),
            alpha=law.alpha[:-1].tolist(),
            sigma=law.sigma[:-1].tolist(),
            call=json_safe(described(self.call)),
            trajectory=trajectory,
            layout=layout.as_dict(),
            latent_shape=list(x.shape[2:]),
            dtype=str(x.dtype).removeprefix("torch."),
            elements=x[0, 0].numel() // layout.channels,
            versions=_versions("evenkeel", "diffusers", "torch", "transformers"),
            correction=correction,
            guidance=self.guidance,
        )

    # ---- sampling

    def batches(self) -> list[Batch]:
        """All prompts, ``batch_size`` at a time."""
        size = self.batch_size
        starts = range(0, len(self.prompts), size)
        return [Batch(self.prompts[i : i + size], i, self.seed + i) for i in starts]

    def share(self) -> list[Batch]:
        """Of all batches those of this process; all of them where there is only one process."""
        return processes().share(self.batches())

    def lockstep_share(self) -> list[Batch]:
        """The same where all processes advance together, step by step.

        Raises:
            CalibrationError: there is none for some of them.

        """
        batches, us = self.batches(), processes()
        if len(batches) < us.count:
            raise CalibrationError(
                f"{len(batches)} batches are not enough for {us.count} processes, which all need one: "
                f"pass more prompts, batch_size={max(1, len(self.prompts) // us.count)} or less, or "
                f"start fewer processes."
            )
        return us.share(batches)

    def agreed(self, what: str, **settings: Any) -> None:
        """Refuse processes that were asked for something else than the main one.

        Raises:
            ProcessError: names what differs.

        """
        us = processes()
        if us.count == 1:
            return
        denoisers = (self.denoiser, self.quantized)
        asked = {
            **self.identity,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "prompts": self.prompts.keys,
            "denoisers": [m and self.fingerprint(m) for m in denoisers],
        }
        us.agree(what, asked | settings)

    def sample(self, batch: Batch, *, output_type: str = "latent", on: Any = None) -> Any:
        """One pipeline call: the batch's latents, or whatever ``output_type`` says.

        ``on`` is a copy of the pipeline to call in its place.
        """
        return run_pipeline(
            self.pipeline if on is None else on,
            batch.prompts,
            batch.seeds,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            output_type=output_type,
            call=self.call,
        )

    @contextmanager
    def undisturbed(
        self, denoiser: nn.Module | None = None, *interceptors: Interceptor
    ) -> Iterator[None]:
        """Inside, the pipeline samples with this denoiser, with these interceptors and no others.

        Corrections that are applied are set aside, bars are not shown, and threads do not fight
        (``sensible_threads``). Afterwards all is as it was, whatever happened inside.
        """
        pipeline, active = self.pipeline, self.denoiser if denoiser is None else denoiser
        with (
            set_aside(pipeline),
            quiet(pipeline),
            denoiser_swapped(pipeline, active),
            sensible_threads(active),
        ):
            if interceptors:
                install(pipeline.scheduler, *interceptors)
            for interceptor in interceptors:
                interceptor.attach()
            yield

    def place(self, active: nn.Module) -> None:
        """With twins taking turns on the device: bring this one, send the other away."""
        if self.side_by_side or self.quantized is None:
            return
        full = uncompiled(active) is uncompiled(self.denoiser)
        idle = self.quantized if full else self.denoiser
        idle.to("cpu")
        active.to(torch.device(getattr(self.pipeline, "_execution_device", "cpu")))

    def law(self, denoiser: nn.Module | None = None) -> StepLaw:
        """The step law, read off one call of the first prompt with this denoiser or the own one.

        What the denoiser says plays no part in it, so that it is asked once (``echo``); at every step where
        accelerate moves the pipeline's networks to and fro, as it knows each of them by itself.

        Raises:
            UnsupportedSampler: the scheduler has no law of our form, or its step is never called.

        """
        tape, asked = Tape(), self.denoiser if denoiser is None else denoiser
        if not getattr(self.pipeline, "_all_hooks", ()):
            asked = echo(asked)
        with self.undisturbed(asked, Recorder(tape)):
            self.sample(self.batches()[0].alone)
        if tape.law is None:
            raise UnsupportedSampler(
                f"{type(self.pipeline).__name__} never called its scheduler's step; nothing can be "
                f"corrected."
            )
        return tape.law.until(len(tape.samples))


def _versions(*packages: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in packages}
