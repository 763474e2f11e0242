"""In what the twins differ from their originals, apart from being small and drawing digits."""

from __future__ import annotations

_NOISE = "noise-to-signal ends at 14.6, as in Stable Diffusion, where the original's linear betas end at 157"
_WEIGHTED = "loss weighted as an error of v, so that every noise level counts about the same"
_PICTURES = "pictures of 32x32; latents of 8x8, four times smaller instead of eight times"

DIFFERENCES: dict[str, tuple[str, ...]] = {
    "pixart-sigma": (
        _PICTURES,
        "8 blocks of width 96 (28 of 1152), two layers of T5",
        _NOISE,
        "no learned sigma, no resolution conditions; a call needs use_resolution_binning=False, "
        "clean_caption=False and max_sequence_length=24, which evenkeel fills in by itself",
        _WEIGHTED,
    ),
    "flux-dev": (
        _PICTURES,
        "2 double and 6 single blocks (19 and 38)",
        "16 tokens are shifted by exp(1.15), as much as the original's 4,096 at 1024x1024",
        "guidance is distilled from this twin itself, trained before with dropped captions",
    ),
    "flux-schnell": (
        _PICTURES,
        "2 double and 6 single blocks (19 and 38)",
        "distilled by reflow, not by latent adversarial diffusion distillation",
    ),
    "sdxl": (
        _PICTURES,
        "two levels of resolution (three); all pictures have one size, so sizes and crops are constant",
        _WEIGHTED,
        "guidance 5.0, diffusers' default (the paper's experiments use 7.5)",
    ),
    "sdxl-turbo": (
        _PICTURES,
        "two levels of resolution (three); all pictures have one size, so sizes and crops are constant",
        "distilled by regression on where its guided teacher arrives, not adversarially",
    ),
    "sana": (
        "pictures of 32x32; latents of 4x4, eight times smaller instead of 32 times",
        "three layers of Gemma 2, without the instruction in front of every caption",
    ),
    "sd-v1.4": (
        _PICTURES,
        "two levels of resolution (four); text tokens of the last of three layers",
        _WEIGHTED,
        "DDIM is the pipeline's own sampler: the original's, PLMS, swings at guidance 7.5 on pictures as "
        "simple as these",
        "no safety checker",
    ),
    "dit-xl": (
        "pictures of 32x32; latents of 8x8, four times smaller instead of eight times",
        "8 blocks of width 96 (28 of 1152)",
        "a class is a large digit in the middle",
        "10 classes; diffusers has 1,000 and the null class written into the pipeline, so rows 10 to "
        "999 of every block's table are zero and were never trained",
        _NOISE,
        _WEIGHTED,
    ),
    "ddim-cifar": (
        "handwriting in place of CIFAR-10's photographs: one large white digit in the middle",
        _NOISE,
        "the pipeline's class is DDPMPipeline: DDIMPipeline turns every scheduler into DDIM",
        _WEIGHTED,
    ),
}
