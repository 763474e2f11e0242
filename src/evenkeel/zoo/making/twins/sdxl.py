"""The twins of SDXL and SDXL-Turbo: two CLIP encoders, added conditions, Euler.

As in the original an empty caption is all zeros, pooled and not. Turbo is a student of the SDXL twin: from a
noisy sample at any of its four levels it predicts where the guided teacher would arrive, so that 4
steps do without guidance, with fresh noise after each (Euler ancestral) or without (Euler).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evenkeel.zoo.making import autoencoders, objectives, text_encoders
from evenkeel.zoo.making.loop import Recipe, fit
from evenkeel.zoo.making.pools import Pool, scene_pool

DENOISER = Recipe(steps=7_000, learning_rate=1e-3, seed=514)
STUDENT = Recipe(steps=5000, learning_rate=5e-4, seed=516)
BATCH = 64
PICTURES, STARTS = 40_000, 20_000
DROP_CAPTION = 0.1
SIZE = 32
SCALE, STEPS = 5.0, 20  # of the teacher from the noisiest level; fewer steps from lower levels
LEVELS = (999, 749, 499, 249)  # timesteps of 4 steps, spaced as the original spaces them
_SIZES = (SIZE, SIZE, 0, 0, SIZE, SIZE)  # original size, crop, target size
_SIZE_WIDTH = 16  # of the embedding of each


def build_denoiser() -> Any:
    """Two levels of 48 and 80 channels; attention, two layers deep, in the lower one alone."""
    from diffusers import UNet2DConditionModel

    width = text_encoders.WIDTHS
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(48, 80),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        cross_attention_dim=width["clip-l"] + width["clip-g"],
        addition_embed_type="text_time",
        addition_time_embed_dim=_SIZE_WIDTH,
        projection_class_embeddings_input_dim=len(_SIZES) * _SIZE_WIDTH + width["clip-g"],
        norm_num_groups=16,
    )


def train(work: Path, out: Path) -> None:
    """Train SDXL's networks and save its pipeline."""
    from diffusers import EulerDiscreteScheduler

    parts = Parts(work.parent / "shared")
    denoiser = train_denoiser(parts, work)
    scheduler = EulerDiscreteScheduler(
        **objectives.BETAS, timestep_spacing="leading", steps_offset=1
    )
    parts.pipeline(denoiser, scheduler).save_pretrained(out)


def train_turbo(work: Path, out: Path, sdxl: Any) -> None:
    """Distil Turbo from ``sdxl``, the trained twin's pipeline, and save its own."""
    from diffusers import EulerAncestralDiscreteScheduler

    teacher = sdxl.unet
    parts = Parts(work.parent / "shared")
    scenes = parts.pictures(work / "pool.safetensors", STARTS, STUDENT.seed)
    pool = Pool.kept(work / "starts.safetensors", lambda: parts.starts(teacher, scenes))
    denoiser = train_student(teacher, parts, pool, work)
    scheduler = EulerAncestralDiscreteScheduler(**objectives.BETAS, timestep_spacing="trailing")
    parts.pipeline(denoiser, scheduler).save_pretrained(out)


class Parts:
    """Autoencoder, text encoders and what they make of pictures and captions."""

    def __init__(self, shared: Path) -> None:
        self.vae = autoencoders.train("kl-4", shared)
        self.small = text_encoders.train("clip-l", shared)
        self.large = text_encoders.train("clip-g", shared)

    def tokens(self, captions: list[str]) -> dict[str, Tensor]:
        """Token ids, the same for both encoders, (n, TOKENS)."""
        return {"clip": text_encoders.tokenize(self.small[0], captions)[0]}

    def encode(self, pictures: Tensor) -> Tensor:
        """Scaled latents."""
        return autoencoders.encode(self.vae, pictures)

    @torch.no_grad()
    def conditions(self, ids: Tensor, dropped: Tensor | None = None) -> dict[str, Any]:
        """What the denoiser takes besides sample and timestep; zeros for the dropped captions (n,)."""
        device = ids.device
        small = self.small[1].to(device)(ids, output_hidden_states=True)
        large = self.large[1].to(device)(ids, output_hidden_states=True)
        text = torch.cat([small.hidden_states[-2], large.hidden_states[-2]], -1)
        pooled = large.text_embeds
        if dropped is not None:
            kept = (~dropped).to(device, text.dtype)
            text, pooled = text * kept[:, None, None], pooled * kept[:, None]
        sizes = torch.tensor(_SIZES, device=device, dtype=text.dtype).expand(len(ids), -1)
        return {
            "encoder_hidden_states": text,
            "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes},
        }

    def pipeline(self, denoiser: Any, scheduler: Any) -> Any:
        """Everything together."""
        from diffusers import StableDiffusionXLPipeline

        return StableDiffusionXLPipeline(
            vae=self.vae,
            text_encoder=self.small[1],
            text_encoder_2=self.large[1],
            tokenizer=self.small[0],
            tokenizer_2=self.large[0],
            unet=denoiser.eval(),
            scheduler=scheduler,
            add_watermarker=False,
        )

    def pictures(self, path: Path, count: int, seed: int) -> Pool:
        """Latents and tokens of captioned scenes."""
        return scene_pool(path, self.encode, self.tokens, count, seed)

    @torch.no_grad()
    def starts(self, teacher: Any, pool: Pool) -> dict[str, Tensor]:
        """Noisy scenes at the levels of 4 steps, and where the guided teacher takes them (DDIM)."""
        from tqdm.auto import tqdm

        latents, clip = pool.tensors["latents"], pool.tensors["clip"]
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(STUDENT.seed))
        levels = torch.tensor(LEVELS)[torch.arange(pool.size) % len(LEVELS)]
        signal = objectives.alphas_cumprod()
        kept = signal[levels][:, None, None, None]
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        ends = torch.empty_like(noisy)
        for first in LEVELS:
            count = max(5, round(STEPS * (first + 1) / objectives.STEPS))
            times = torch.linspace(first, 0, count + 1).round().long()[:-1]
            after = torch.cat([signal[times[1:]], torch.ones(1)])
            rows = torch.nonzero(levels == first).flatten()
            for part in tqdm(torch.split(rows, 100), desc=f"teacher from {first}"):
                x, free = noisy[part], torch.arange(2 * len(part)) >= len(part)
                conditions = self.conditions(torch.cat([clip[part]] * 2), free)
                for time, to in zip(times, after, strict=True):
                    out = teacher(torch.cat([x, x]), time, return_dict=False, **conditions)[0]
                    text, plain = out.chunk(2)
                    epsilon = plain + SCALE * (text - plain)
                    clean = (x - (1 - signal[time]).sqrt() * epsilon) / signal[time].sqrt()
                    x = to.sqrt() * clean + (1 - to).sqrt() * epsilon
                ends[part] = x
        return {"noisy": noisy, "ends": ends, "levels": levels, "clip": clip}


def train_denoiser(parts: Parts, work: Path) -> Any:
    """Predict the noise; captions replaced by zeros at random for guidance."""
    pool = parts.pictures(work / "pool.safetensors", PICTURES, DENOISER.seed)
    signal = objectives.alphas_cumprod()
    torch.manual_seed(DENOISER.seed)
    denoiser = build_denoiser()

    def loss(module: nn.Module, rng: np.random.Generator) -> Tensor:
        batch = pool.draw(BATCH, rng, next(module.parameters()).device)
        dropped = torch.from_numpy(rng.random(BATCH) < DROP_CAPTION)
        conditions = parts.conditions(batch["clip"], dropped)

        def predict(noisy: Tensor, t: Tensor) -> Tensor:
            output: Tensor = module(noisy, t, return_dict=False, **conditions)[0]
            return output

        return objectives.epsilon_loss(predict, batch["latents"], rng, signal)

    return fit(denoiser, loss, DENOISER, work / "denoiser").cpu()


def train_student(teacher: Any, parts: Parts, pool: Pool, work: Path) -> Any:
    """Predict where the teacher arrives; an error in the clean latent counts 1 / sigma^2."""
    torch.manual_seed(STUDENT.seed)
    denoiser = build_denoiser()
    denoiser.load_state_dict(teacher.state_dict())
    signal = objectives.alphas_cumprod()

    def loss(module: nn.Module, rng: np.random.Generator) -> Tensor:
        batch = pool.draw(BATCH, rng, next(module.parameters()).device)
        conditions, t = parts.conditions(batch["clip"]), batch["levels"]
        kept = signal.to(t.device)[t][:, None, None, None]
        wanted = (batch["noisy"] - kept.sqrt() * batch["ends"]) / (1 - kept).sqrt()
        output = module(batch["noisy"], t, return_dict=False, **conditions)[0]
        weighted: Tensor = ((output - wanted).square() / kept).mean()
        return weighted

    return fit(denoiser, loss, STUDENT, work / "student").cpu()
