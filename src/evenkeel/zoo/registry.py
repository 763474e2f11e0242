"""The twins of the zoo: what each is a twin of, how its original is sampled, who makes it."""

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
        maker: ``module:function`` below ``evenkeel.zoo.making.twins``, which trains it and saves it.
        differences: from the original, apart from being small and drawing digits or emoji.
        shares: networks that it is made of and shares with other twins, by their makers' names.
        teacher: the twin it is distilled from.

    """

    name: str
    original: str
    pipeline: str
    pictures: str
    num_inference_steps: int
    guidance_scale: float | None
    schedulers: Mapping[str, Sampler]
    maker: str
    differences: tuple[str, ...]
    shares: tuple[str, ...] = ()
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


_NOISE = "noise-to-signal ends at 14.6, as in Stable Diffusion, where the original's linear betas end at 157"
_WEIGHTED = "loss weighted as an error of v, so that every noise level counts about the same"
_PICTURES = "pictures of 32x32; latents of 8x8, four times smaller instead of eight times"
_LDM = (
    "two levels of resolution; the class is added to the timestep's embedding and not attended to "
    "as a sequence of one",
    "10 classes and the null class 1,000, as written into the pipeline; rows 10 to 999 of the table are "
    "zero and were never trained",
    "diffusers has no class-conditional LDM pipeline; DiTPipeline has the same loop and takes any denoiser",
    "the autoencoder starts from the embedded twin's weights and sees neither a perceptual loss nor a critic",
    "guidance of 1 or less is none, and not the unconditional model as the original's scale 0: ask "
    "for class 1000 to get that",
    "betas are the original's; a noise level counts about the same as any other, but for those where "
    "noise-to-signal is above 8",
)

# Clipping a sample to [-1, 1] is for pixels; a scheduler made from one that does not know of it clips.
_UNCLIPPED = {"clip_sample": False}
_DDIM = Sampler("DDIMScheduler", _UNCLIPPED)
_DDPM = Sampler("DDPMScheduler", _UNCLIPPED)
_PLMS = Sampler("PNDMScheduler", {"skip_prk_steps": True})
_DPM = Sampler("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2})
# Posterior variance, which is DDIM with eta 1 (Song et al. 2021, section 4.1): the pipeline hands on no eta.
_DDIM_1 = Sampler("DDPMScheduler", {**_UNCLIPPED, "variance_type": "fixed_small"})
_SINGLE = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
_DPM_1 = Sampler("DPMSolverSinglestepScheduler", {**_SINGLE, "solver_order": 1})
_DPM_2 = Sampler("DPMSolverSinglestepScheduler", {**_SINGLE, "solver_order": 2})
_DPM_2S = Sampler(
    "DPMSolverSinglestepScheduler",
    {"algorithm_type": "dpmsolver++", "solver_order": 2, "lower_order_final": True},
)
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
        maker="flux:train_dev",
        shares=("kl-16", "clip-l", "t5"),
        differences=(
            _PICTURES,
            "2 double and 6 single blocks (19 and 38)",
            "16 tokens are shifted by exp(1.15), as much as the original's 4,096 at 1024x1024",
            "guidance is distilled from this twin itself, trained before with dropped captions",
        ),
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
        maker="flux:train_schnell",
        shares=("kl-16", "clip-l", "t5"),
        differences=(
            _PICTURES,
            "2 double and 6 single blocks (19 and 38)",
            "distilled by reflow, not by latent adversarial diffusion distillation",
        ),
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
        maker="sdxl:train",
        shares=("kl-4", "clip-l", "clip-g"),
        differences=(
            _PICTURES,
            "two levels of resolution (three); all pictures have one size, so sizes and crops are constant",
            _WEIGHTED,
            "guidance 5.0, diffusers' default (the paper's experiments use 7.5)",
        ),
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
        maker="sdxl:train_turbo",
        shares=("kl-4", "clip-l", "clip-g"),
        differences=(
            _PICTURES,
            "two levels of resolution (three); all pictures have one size, so sizes and crops are constant",
            "distilled by regression on where its guided teacher arrives, not adversarially",
        ),
    ),
    Twin(
        "pixart-sigma",
        "PixArt-Sigma",
        "PixArtSigmaPipeline",
        "captions",
        num_inference_steps=20,
        guidance_scale=4.5,
        schedulers={"dpm-solver++": _DPM, "ddim": _DDIM},
        maker="pixart_sigma:train",
        differences=(
            _PICTURES,
            "8 blocks of width 96 (28 of 1152), two layers of T5",
            _NOISE,
            "no learned sigma, no resolution conditions; a call needs use_resolution_binning=False, "
            "clean_caption=False and max_sequence_length=24, which evenkeel fills in by itself",
            _WEIGHTED,
        ),
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
        maker="sana:train",
        shares=("dc-32", "gemma"),
        differences=(
            "pictures of 32x32; latents of 4x4, eight times smaller instead of 32 times",
            "three layers of Gemma 2, without the instruction in front of every caption",
        ),
    ),
    Twin(
        "sd-v1.4",
        "Stable Diffusion v1.4",
        "StableDiffusionPipeline",
        "scenes",
        num_inference_steps=50,
        guidance_scale=7.5,
        schedulers={"ddim": _DDIM, "plms": _PLMS, "dpm-solver++": _DPM},
        maker="sd:train",
        shares=("kl-4", "clip-l"),
        differences=(
            _PICTURES,
            "two levels of resolution (four); text tokens of the last of three layers",
            _WEIGHTED,
            "DDIM is the pipeline's own sampler: the original's, PLMS, swings at guidance 7.5 on pictures as "
            "simple as these",
            "no safety checker",
        ),
    ),
    Twin(
        "sd-v2.1",
        "Stable Diffusion 2.1",
        "StableDiffusionPipeline",
        "emoji",
        num_inference_steps=25,
        guidance_scale=3.0,
        schedulers={"dpm-solver++": _DPM, "ddim": _DDIM, "euler": _EULER},
        maker="sd_v2_1:train",
        differences=(
            "pictures of 64x64; latents of 16x16, four times smaller instead of eight times",
            "two levels of resolution (four), attention in the lower one, nothing in the middle; text "
            "tokens of the last of three layers",
            "guidance 3.0, which is enough here (the original: 7.5 or 9)",
            "the autoencoder starts from the embedded twin's weights, where they fit",
            "no safety checker",
        ),
    ),
    Twin(
        "ldm-4",
        "LDM-4 on ImageNet",
        "DiTPipeline",
        "digits",
        num_inference_steps=20,
        guidance_scale=1.5,
        schedulers={
            "ddim": _DDIM,
            "ddim-eta-1": _DDIM_1,
            "dpm-solver-1": _DPM_1,
            "dpm-solver-2": _DPM_2,
        },
        maker="ldm:train_4",
        differences=(
            "pictures of 32x32 (256x256), so latents of 8x8 with 3 channels (64x64)",
            "a class is a large digit in the middle",
            *_LDM,
        ),
    ),
    Twin(
        "ldm-8",
        "LDM-8 on ImageNet",
        "DiTPipeline",
        "digits",
        num_inference_steps=20,
        guidance_scale=3.0,
        schedulers={
            "ddim": _DDIM,
            "ddim-eta-1": _DDIM_1,
            "dpm-solver-1": _DPM_1,
            "dpm-solver-2": _DPM_2,
        },
        maker="ldm:train_8",
        differences=(
            "pictures of 32x32 (256x256), so latents of 4x4 with 4 channels (32x32)",
            "a class is a large digit in the middle",
            *_LDM,
        ),
    ),
    Twin(
        "dit-xl",
        "DiT-XL/2",
        "DiTPipeline",
        "digits",
        num_inference_steps=50,
        guidance_scale=1.5,
        schedulers={"ddim": _DDIM, "ddpm": _DDPM},
        maker="dit_xl:train",
        differences=(
            "pictures of 32x32; latents of 8x8, four times smaller instead of eight times",
            "8 blocks of width 96 (28 of 1152)",
            "a class is a large digit in the middle",
            "10 classes; diffusers has 1,000 and the null class written into the pipeline, so rows 10 to "
            "999 of every block's table are zero and were never trained",
            _NOISE,
            _WEIGHTED,
        ),
    ),
    Twin(
        "ddim-cifar",
        "DDIM on CIFAR-10",
        "DDPMPipeline",
        "unconditional",
        num_inference_steps=100,
        guidance_scale=None,
        schedulers={
            "ddim": _DDIM,
            "ddpm": _DDPM,
            "dpm-solver++": _DPM,
            "dpm-solver++-2s": _DPM_2S,
        },
        maker="ddim_cifar:train",
        differences=(
            "handwriting in place of CIFAR-10's photographs: one large white digit in the middle",
            _NOISE,
            "the pipeline's class is DDPMPipeline: DDIMPipeline turns every scheduler into DDIM",
            _WEIGHTED,
        ),
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
