"""The twin of Stable Diffusion 2.1, the one to look at: a UNet that predicts v and draws emoji.

Objects and backgrounds are put together at random for training; an eighth of all pairs is held out
(:mod:`evenkeel.zoo.emoji`), so that what is measured is what the twin has never seen.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evenkeel import zoo
from evenkeel.zoo import emoji, emoji_captions
from evenkeel.zoo.emoji_evaluation import EmojiNetwork
from evenkeel.zoo.making import objectives, text_encoders
from evenkeel.zoo.making.autoencoders import (
    build_kl,
    encode,
    fit_autoencoder,
    picture_loss,
)
from evenkeel.zoo.making.evaluators import as_decoded
from evenkeel.zoo.making.loop import Recipe, fit
from evenkeel.zoo.making.pools import Pool, drop_captions
from evenkeel.zoo.parts import halved

TEXT_ENCODER = Recipe(steps=1000, learning_rate=2e-3, seed=911)
AUTOENCODER = Recipe(steps=2000, learning_rate=1.5e-3, seed=912, weight_decay=1e-4, bfloat16=True)
EVALUATOR = Recipe(steps=1500, learning_rate=2e-3, seed=913, weight_decay=1e-2, bfloat16=True)
# Cosine with a warm restart, so that the first stretch alone is already a twin.
DENOISER = (
    Recipe(steps=3000, learning_rate=1.2e-3, seed=914, bfloat16=True),
    Recipe(steps=2000, learning_rate=8e-4, seed=915, bfloat16=True),
)
DECODER = Recipe(steps=1500, learning_rate=1e-3, seed=915, weight_decay=1e-4, bfloat16=True)
AUTOENCODER_BATCH = 8
LATENT_NOISE = (
    0.1  # of the latents' deviation, for the decoder alone: samples are never exactly right
)
EVALUATOR_BATCH = 64
BATCH = 32
PICTURES = 16_000  # whose latents are encoded once for the denoiser
DROP_CAPTION = 0.1
CHANNELS = (24, 40, 48)
LATENT_CHANNELS = 4
TOKENS, TEXT_WIDTH = 16, 64  # the longest caption has 14 words; CLIP adds two tokens
START = "pixart-sigma"  # whose autoencoder's weights, where they fit, are the first


def build_denoiser() -> Any:
    """Two levels (16 x 16 and 8 x 8) of 48 and 80 channels; attention in the lower one."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=emoji.SIZE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=(48, 80),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        use_linear_projection=True,
        norm_num_groups=16,
    )


def train(work: Path, out: Path) -> None:
    """Train all four networks and save the pipeline, the evaluator and the sprites."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
    from safetensors.torch import save

    from evenkeel.storage import write_atomically

    tokenizer, encoder = train_text_encoder(work)
    vae = train_autoencoder(work)
    evaluator, _ = train_evaluator(work)
    denoiser = train_denoiser(work, tokenizer, encoder, vae)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=denoiser.eval(),
        scheduler=DPMSolverMultistepScheduler(
            **objectives.BETAS,
            prediction_type="v_prediction",
            algorithm_type="dpmsolver++",
            solver_order=2,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(out)
    write_atomically(out / zoo.EVALUATOR_FILE, halved(save(evaluator.state_dict())))
    shutil.copytree(emoji.sheet_file().parent, out / emoji.SPRITES.parent, dirs_exist_ok=True)


def build_text_encoder() -> tuple[Any, Any]:
    """Tokenizer and encoder, not trained; every word of the captions is one token."""
    return text_encoders.build_clip(emoji_captions.vocabulary(), TOKENS, TEXT_WIDTH)


def train_text_encoder(work: Path) -> tuple[Any, Any]:
    """CLIP, trained to tell which objects and which background a caption mentions."""
    torch.manual_seed(TEXT_ENCODER.seed)
    tokenizer, encoder = build_text_encoder()

    def captions(n: int, rng: np.random.Generator) -> tuple[list[str], dict[str, Tensor]]:
        return emoji_captions.caption_scenes(emoji.sample_scenes(n, rng), rng)

    text_encoders.fit_reading(
        "clip-l",
        tokenizer,
        encoder,
        captions,
        emoji.SCENE,
        TEXT_ENCODER,
        work / "text_encoder",
    )
    return tokenizer, encoder


def train_autoencoder(work: Path) -> Any:
    """64 x 64 pictures to latents of 16 x 16; starts from the embedded twin's where shapes are the same."""
    torch.manual_seed(AUTOENCODER.seed)
    vae = build_kl(LATENT_CHANNELS, CHANNELS, emoji.SIZE)
    mine = vae.state_dict()
    for name, value in zoo.load(START).vae.state_dict().items():
        if mine[name].shape == value.shape:
            mine[name].copy_(value)

    def pictures(n: int, rng: np.random.Generator) -> Tensor:
        return emoji.sample_pictures(n, rng)[0]

    vae = fit_autoencoder(vae, pictures, AUTOENCODER, work / "autoencoder", batch=AUTOENCODER_BATCH)

    def loss(module: nn.Module, rng: np.random.Generator) -> Tensor:
        x = pictures(AUTOENCODER_BATCH, rng).to(next(module.parameters()).device) * 2 - 1
        with torch.no_grad():
            latents = vae.encode(x).latent_dist.mode().float()
        moved = latents + LATENT_NOISE * latents.std() * torch.randn_like(latents)
        return picture_loss(x, vae.decode(moved).sample.float())

    # What latents are stays as it is; what they look like gets sharper.
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    vae = fit(vae, loss, DECODER, work / "decoder")
    return vae.requires_grad_(True).cpu()


def train_evaluator(work: Path) -> tuple[nn.Module, dict[str, float]]:
    """The network that judges pictures; and what share of each attribute it reads right in held-out pairs."""
    torch.manual_seed(EVALUATOR.seed)

    def loss(module: nn.Module, rng: np.random.Generator) -> Tensor:
        device = next(module.parameters()).device
        pictures, scene = emoji.sample_pictures(EVALUATOR_BATCH, rng)
        scores = module(as_decoded(pictures, rng).to(device))
        losses = [
            F.cross_entropy(scores[k].float(), v.to(device), label_smoothing=0.05)
            for k, v in scene.items()
        ]
        return torch.stack(losses).sum()

    network = fit(EmojiNetwork(), loss, EVALUATOR, work / "evaluator").cpu().eval()
    rng = np.random.default_rng(EVALUATOR.seed)
    pictures, scene = emoji.sample_pictures(1024, rng, held_out=True)
    with torch.no_grad():
        scores = network(pictures)
    return network, {k: (scores[k].argmax(1) == v).float().mean().item() for k, v in scene.items()}


def train_denoiser(work: Path, tokenizer: Any, encoder: Any, vae: Any) -> Any:
    """Predict v; captions dropped at random for guidance."""

    def tokens(captions: list[str]) -> dict[str, Tensor]:
        return {"clip": text_encoders.tokenize(tokenizer, captions)[0]}

    def make() -> dict[str, Tensor]:
        rng = np.random.default_rng(DENOISER[0].seed)
        latents, captions = [], []
        for start in range(0, PICTURES, 500):
            pictures, scene = emoji.sample_pictures(min(500, PICTURES - start), rng)
            latents.append(encode(vae, pictures))
            captions += emoji_captions.caption_scenes(scene, rng)[0]
        return {"latents": torch.cat(latents), **tokens(captions)}

    pool = Pool.kept(work / "pool.safetensors", make)
    empty, signal = tokens([""]), objectives.alphas_cumprod()
    torch.manual_seed(DENOISER[0].seed)
    denoiser = build_denoiser()

    def loss(module: nn.Module, rng: np.random.Generator) -> Tensor:
        batch = pool.draw(BATCH, rng, next(module.parameters()).device)
        batch = drop_captions(batch, empty, DROP_CAPTION, rng)
        with torch.no_grad():
            text = encoder.to(batch["clip"].device)(batch["clip"]).last_hidden_state

        def predict(noisy: Tensor, t: Tensor) -> Tensor:
            output: Tensor = module(noisy, t, encoder_hidden_states=text, return_dict=False)[0]
            return output.float()

        return objectives.velocity_loss(predict, batch["latents"], rng, signal)

    for index, recipe in enumerate(DENOISER):
        denoiser = fit(denoiser, loss, recipe, work / f"denoiser-{index}")
    return denoiser.cpu()
