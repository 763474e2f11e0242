"""The twins of the zoo: what each is a twin of, how its original is sampled, and with which samplers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from evenkeel.errors import EvenkeelError


@dataclass(frozen=True, slots=True)
class Sampler:
    """A scheduler of diffusers, made from another one's configuration.

    Attributes:
        scheduler: class name.
        changes: what the configuration of a twin's own scheduler must not decide.

    """

    scheduler: str
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Twin:
    """One pipeline of the zoo and the settings of its original.

    Attributes:
        name: as in ``zoo:NAME``.
        original: the model it is a twin of.
        pipeline: class name in diffusers.
        pictures: what it draws, a key of ``evenkeel.zoo.pictures.KINDS``.
        num_inference_steps, guidance_scale: of the original's default inference; a pipeline without
            guidance has None.
        schedulers: the original's samplers by their short names, the pipeline's own first.
        teacher: the twin it is distilled from.

    """

    name: str
    original: str
    pipeline: str
    pictures: str
    num_inference_steps: int
    guidance_scale: float | None
    schedulers: Mapping[str, Sampler]
    teacher: str | None = None

    def sampler(self, name: str) -> Sampler:
        """The sampler of that short name.

        Raises:
            EvenkeelError: the original has no such sampler; lists those it has.

        """
        if name not in self.schedulers:
            raise EvenkeelError(
                f"{self.name} has no scheduler called {name!r}; there is {', '.join(self.schedulers)}."
            )
        return self.schedulers[name]


# Clipping a sample to [-1, 1] is for pixels; a scheduler made from one that does not know of it clips.
_UNCLIPPED = {"clip_sample": False}
_DDIM = Sampler("DDIMScheduler", _UNCLIPPED)
_DDPM = Sampler("DDPMScheduler", _UNCLIPPED)
_PLMS = Sampler("PNDMScheduler", {"skip_prk_steps": True})
_DPM = Sampler("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2})
_EULER = Sampler("EulerDiscreteScheduler")
_ANCESTRAL = Sampler("EulerAncestralDiscreteScheduler")
_FLOW = Sampler("FlowMatchEulerDiscreteScheduler")

_ALL = (
    Twin(
        "flux-dev",
        "FLUX.1 [dev]",
        "FluxPipeline",
        "scenes",
        num_inference_steps=20,
        guidance_scale=3.5,
        schedulers={"euler": _FLOW},
    ),
    Twin(
        "flux-schnell",
        "FLUX.1 [schnell]",
        "FluxPipeline",
        "scenes",
        num_inference_steps=4,
        guidance_scale=0.0,
        schedulers={"euler": _FLOW},
        teacher="flux-dev",
    ),
    Twin(
        "sdxl",
        "Stable Diffusion XL",
        "StableDiffusionXLPipeline",
        "scenes",
        num_inference_steps=30,
        guidance_scale=5.0,
        schedulers={
            "euler": _EULER,
            "euler-ancestral": _ANCESTRAL,
            "ddim": _DDIM,
            "dpm-solver++": _DPM,
        },
    ),
    Twin(
        "sdxl-turbo",
        "SDXL Turbo",
        "StableDiffusionXLPipeline",
        "scenes",
        num_inference_steps=4,
        guidance_scale=0.0,
        schedulers={"euler-ancestral": _ANCESTRAL, "euler": _EULER},
        teacher="sdxl",
    ),
    Twin(
        "pixart-sigma",
        "PixArt-Sigma",
        "PixArtSigmaPipeline",
        "captions",
        num_inference_steps=20,
        guidance_scale=4.5,
        schedulers={"dpm-solver++": _DPM, "ddim": _DDIM},
    ),
    Twin(
        "sana",
        "Sana",
        "SanaPipeline",
        "scenes",
        num_inference_steps=20,
        guidance_scale=4.5,
        schedulers={
            "dpm-solver++": Sampler(
                "DPMSolverMultistepScheduler",
                {"prediction_type": "flow_prediction", "use_flow_sigmas": True, **_DPM.changes},
            ),
        },
    ),
    Twin(
        "sd-v1.4",
        "Stable Diffusion v1.4",
        "StableDiffusionPipeline",
        "scenes",
        num_inference_steps=50,
        guidance_scale=7.5,
        schedulers={"ddim": _DDIM, "plms": _PLMS, "dpm-solver++": _DPM},
    ),
    Twin(
        "dit-xl",
        "DiT-XL/2",
        "DiTPipeline",
        "digits",
        num_inference_steps=50,
        guidance_scale=1.5,
        schedulers={"ddim": _DDIM, "ddpm": _DDPM},
    ),
    Twin(
        "ddim-cifar",
        "DDIM on CIFAR-10",
        "DDPMPipeline",
        "unconditional",
        num_inference_steps=100,
        guidance_scale=None,
        schedulers={"ddim": _DDIM, "ddpm": _DDPM, "dpm-solver++": _DPM},
    ),
)
TWINS = {twin.name: twin for twin in _ALL}


def twin(name: str) -> Twin:
    """The twin of that name.

    Raises:
        EvenkeelError: unknown; lists what there is.

    >>> twin("pixart-sigma").num_inference_steps
    20

    """
    if name not in TWINS:
        raise EvenkeelError(f"no twin called {name!r} in the zoo; there is {', '.join(TWINS)}.")
    return TWINS[name]
