"""The twin of Sana: linear attention, a deep-compression autoencoder, Gemma 2, flow DPM-Solver++."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evenkeel.zoo.making import autoencoders, objectives, text_encoders
from evenkeel.zoo.making.loop import Recipe, fit
from evenkeel.zoo.making.pools import drop_captions, scene_pool

DENOISER = Recipe(steps=12_000, learning_rate=1.5e-3, seed=614)
BATCH = 64
PICTURES = 40_000
DROP_CAPTION = 0.1
SHIFT = 3.0  # in training and in sampling


def build_denoiser() -> Any:
    """Sana with 8 blocks of width 96: 4 x 4 tokens of 32 channels."""
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        in_channels=32,
        out_channels=32,
        num_attention_heads=3,
        attention_head_dim=32,
        num_layers=8,
        num_cross_attention_heads=3,
        cross_attention_head_dim=32,
        cross_attention_dim=96,
        caption_channels=text_encoders.WIDTHS["gemma"],
        mlp_ratio=2.5,
        sample_size=4,
        patch_size=1,
    )


def train(work: Path, out: Path) -> None:
    """Train everything and save the pipeline."""
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline

    shared = work.parent / "shared"
    vae = autoencoders.train("dc-32", shared)
    tokenizer, encoder = text_encoders.train("gemma", shared)
    denoiser = train_denoiser(vae, tokenizer, encoder, work)
    pipeline = SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae,
        transformer=denoiser.eval(),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=SHIFT,
            algorithm_type="dpmsolver++",
            solver_order=2,
        ),
    )
    pipeline.save_pretrained(out)


def train_denoiser(vae: Any, tokenizer: Any, encoder: Any, work: Path) -> Any:
    """Predict the velocity; captions dropped at random for guidance."""

    def tokens(captions: list[str]) -> dict[str, Tensor]:
        ids, mask = text_encoders.tokenize(tokenizer, captions)
        return {"ids": ids, "mask": mask}

    def encoded(pictures: Tensor) -> Tensor:
        return autoencoders.encode(vae, pictures)

    pool = scene_pool(work / "pool.safetensors", encoded, tokens, PICTURES, DENOISER.seed)
    empty = tokens([""])
    torch.manual_seed(DENOISER.seed)
    denoiser = build_denoiser()
    nn.init.zeros_(denoiser.proj_out.weight)
    nn.init.zeros_(denoiser.proj_out.bias)

    def loss(module: nn.Module, rng: np.random.Generator) -> Tensor:
        device = next(module.parameters()).device
        batch = drop_captions(pool.draw(BATCH, rng, device), empty, DROP_CAPTION, rng)
        with torch.no_grad():
            text = encoder.to(device)(batch["ids"], attention_mask=batch["mask"]).last_hidden_state
        noisy, t, wanted = objectives.flow_point(batch["latents"], rng, SHIFT)
        output = module(
            noisy,
            encoder_hidden_states=text,
            timestep=t,
            encoder_attention_mask=batch["mask"],
            return_dict=False,
        )[0]
        squared: Tensor = (output - wanted).square().mean()
        return squared

    return fit(denoiser, loss, DENOISER, work / "denoiser").cpu()
