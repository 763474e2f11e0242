"""The twin of Stable Diffusion 1.4: a UNet with cross attention to CLIP, PLMS and DDIM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evenkeel.zoo.making import autoencoders, objectives, text_encoders
from evenkeel.zoo.making.loop import Recipe, fit
from evenkeel.zoo.making.pools import Pool, drop_captions, scene_pool

DENOISER = Recipe(steps=9_000, learning_rate=1e-3, seed=414)
BATCH = 64
PICTURES = 40_000
DROP_CAPTION = 0.1


def build_denoiser() -> Any:
    """Two levels (8 x 8 and 4 x 4) of 48 and 80 channels, cross attention in both."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(48, 80),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=text_encoders.WIDTHS["clip-l"],
        attention_head_dim=4,
        norm_num_groups=16,
    )


def train(work: Path, out: Path) -> None:
    """Train everything and save the pipeline."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    shared = work.parent / "shared"
    vae = autoencoders.train("kl-4", shared)
    tokenizer, encoder = text_encoders.train("clip-l", shared)
    denoiser = train_denoiser(vae, tokenizer, encoder, work)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=denoiser.eval(),
        scheduler=DDIMScheduler(
            **objectives.BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(out)


def train_denoiser(vae: Any, tokenizer: Any, encoder: Any, work: Path) -> Any:
    """Predict the noise; captions dropped at random for guidance."""

    def tokens(captions: list[str]) -> dict[str, Tensor]:
        return {"clip": text_encoders.tokenize(tokenizer, captions)[0]}

    def encoded(pictures: Tensor) -> Tensor:
        return autoencoders.encode(vae, pictures)

    pool: Pool = scene_pool(work / "pool.safetensors", encoded, tokens, PICTURES, DENOISER.seed)
    empty, signal = tokens([""]), objectives.alphas_cumprod()
    torch.manual_seed(DENOISER.seed)
    denoiser = build_denoiser()

    def loss(module: nn.Module, rng: np.random.Generator) -> Tensor:
        batch = pool.draw(BATCH, rng, next(module.parameters()).device)
        batch = drop_captions(batch, empty, DROP_CAPTION, rng)
        with torch.no_grad():
            text = encoder.to(batch["clip"].device)(batch["clip"]).last_hidden_state

        def predict(noisy: Tensor, t: Tensor) -> Tensor:
            output: Tensor = module(noisy, t, encoder_hidden_states=text, return_dict=False)[0]
            return output

        return objectives.epsilon_loss(predict, batch["latents"], rng, signal)

    return fit(denoiser, loss, DENOISER, work / "denoiser").cpu()
