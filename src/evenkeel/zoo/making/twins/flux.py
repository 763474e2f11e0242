"""The twins of FLUX.1 dev and schnell: packed latents, CLIP and T5, flow matching.

As the originals: *dev* is trained with dropped captions, then learns to do with one call and a guidance
embedding what classifier-free guidance does with two; *schnell* is distilled from dev to 4 steps, here by
reflow (Liu et al. 2023): it learns the straight lines between noise and what dev makes of that noise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evenkeel.zoo.making import autoencoders, objectives, text_encoders
from evenkeel.zoo.making.autoencoders import encode
from evenkeel.zoo.making.loop import Recipe, fit
from evenkeel.zoo.making.pools import Pool, drop_captions, scene_pool

PLAIN = Recipe(steps=11_000, learning_rate=1.5e-3, seed=314)
GUIDED = Recipe(steps=2000, learning_rate=5e-4, seed=316)
STRAIGHT = Recipe(steps=3000, learning_rate=7e-4, seed=317)
BATCH = 64
PICTURES, PAIRS = 40_000, 20_000
DROP_CAPTION = 0.1
GUIDANCE = (1.0, 6.0)  # scales that dev learns
SHIFT = 2.0  # of the levels in training
SCALE, STEPS = 3.5, 20  # how dev makes the pairs for schnell
SCHNELL_STEPS = 4
SIZE = 32

# FLUX shifts by exp(1.15) at 1024 x 1024 pixels, which are 4,096 tokens; so do these 16 tokens.
SCHEDULER = {
    "use_dynamic_shifting": True,
    "shift": 3.0,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 4,
    "max_image_seq_len": 16,
}


def build_denoiser(*, guidance: bool) -> Any:
    """FLUX with 2 double and 6 single blocks of width 96, 2 x 2 latents packed into a token."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=text_encoders.WIDTHS["t5"],
        pooled_projection_dim=text_encoders.WIDTHS["clip-l"],
        guidance_embeds=guidance,
        axes_dims_rope=(8, 12, 12),
    )


def train_dev(work: Path, out: Path) -> None:
    """Train dev's networks and save its pipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    parts = Parts(work.parent / "shared")
    pool = parts.pictures(work / "pool.safetensors")
    denoiser = train_guided(train_plain(parts, pool, work), parts, pool, work)
    pipeline = parts.pipeline(denoiser, FlowMatchEulerDiscreteScheduler(**SCHEDULER))
    pipeline.save_pretrained(out)


def train_schnell(work: Path, out: Path, dev: Any) -> None:
    """Distil schnell from ``dev``, the trained twin's pipeline, and save its own."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    parts = Parts(work.parent / "shared")
    pool = Pool.kept(work / "pairs.safetensors", lambda: parts.pairs(dev))
    denoiser = train_straight(dev.transformer, parts, pool, work)
    pipeline = parts.pipeline(denoiser, FlowMatchEulerDiscreteScheduler(shift=1.0))
    pipeline.save_pretrained(out)


class Parts:
    """Autoencoder, text encoders and what they make of pictures and captions."""

    def __init__(self, shared: Path) -> None:
        self.vae = autoencoders.train("kl-16", shared)
        self.clip = text_encoders.train("clip-l", shared)
        self.t5 = text_encoders.train("t5", shared)
        self.empty = self.tokens([""])

    def tokens(self, captions: list[str]) -> dict[str, Tensor]:
        """Token ids of both encoders, (n, TOKENS) each."""
        return {
            "clip": text_encoders.tokenize(self.clip[0], captions)[0],
            "t5": text_encoders.tokenize(self.t5[0], captions)[0],
        }

    @torch.no_grad()
    def conditions(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the denoiser takes besides sample and timestep."""
        device = batch["t5"].device
        side = SIZE // 8  # of the grid of tokens
        ids = torch.zeros(side, side, 3, device=device)
        ids[..., 1] += torch.arange(side, device=device)[:, None]
        ids[..., 2] += torch.arange(side, device=device)[None, :]
        return {
            "pooled_projections": self.clip[1].to(device)(batch["clip"]).pooler_output,
            "encoder_hidden_states": self.t5[1].to(device)(batch["t5"]).last_hidden_state,
            "txt_ids": torch.zeros(batch["t5"].shape[1], 3, device=device),
            "img_ids": ids.reshape(-1, 3),
        }

    def pictures(self, path: Path) -> Pool:
        """Packed latents and tokens of captioned scenes."""

        def packed(pictures: Tensor) -> Tensor:
            return pack(encode(self.vae, pictures))

        return scene_pool(path, packed, self.tokens, PICTURES, PLAIN.seed)

    def pairs(self, dev: Any) -> dict[str, Tensor]:
        """Noise, what dev makes of it, and the tokens of the captions."""
        from tqdm.auto import tqdm

        captions, _ = text_encoders.sample_captions(PAIRS, np.random.default_rng(STRAIGHT.seed))
        noise = torch.randn(PAIRS, 16, 64, generator=torch.Generator().manual_seed(STRAIGHT.seed))
        dev.set_progress_bar_config(disable=True)
        ends = [
            dev(
                captions[i : i + 100],
                latents=noise[i : i + 100],
                guidance_scale=SCALE,
                num_inference_steps=STEPS,
                max_sequence_length=text_encoders.TOKENS,
                height=SIZE,
                width=SIZE,
                output_type="latent",
            ).images
            for i in tqdm(range(0, PAIRS, 100), desc="pairs")
        ]
        return {"noise": noise, "latents": torch.cat(ends), **self.tokens(captions)}

    def pipeline(self, denoiser: Any, scheduler: Any) -> Any:
        """Everything together."""
        from diffusers import FluxPipeline

        return FluxPipeline(
            scheduler=scheduler,
            vae=self.vae,
            text_encoder=self.clip[1],
            tokenizer=self.clip[0],
            text_encoder_2=self.t5[1],
            tokenizer_2=self.t5[0],
            transformer=denoiser.eval(),
        )


def pack(latents: Tensor) -> Tensor:
    """(n, 16, 8, 8) to tokens (n, 16, 64): 2 x 2 latents side by side, channels first."""
    n, channels, height, width = latents.shape
    blocks = latents.reshape(n, channels, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(n, -1, channels * 4)


def train_plain(parts: Parts, pool: Pool, work: Path) -> Any:
    """Without a guidance embedding, captions dropped at random."""
    torch.manual_seed(PLAIN.seed)
    denoiser = build_denoiser(guidance=False)
    _start_at_zero(denoiser)

    def loss(module: nn.Module, rng: np.random.Generator) -> Tensor:
        batch = pool.draw(BATCH, rng, next(module.parameters()).device)
        conditions = parts.conditions(drop_captions(batch, parts.empty, DROP_CAPTION, rng))
        noisy, t, wanted = objectives.flow_point(batch["latents"], rng, SHIFT)
        return (velocity(module, noisy, t, conditions) - wanted).square().mean()

    return fit(denoiser, loss, PLAIN, work / "plain")


def train_guided(plain: Any, parts: Parts, pool: Pool, work: Path) -> Any:
    """One call with a guidance embedding learns what two calls give (Meng et al. 2023, equation 2)."""
    torch.manual_seed(GUIDED.seed)
    denoiser = build_denoiser(guidance=True)
    denoiser.load_state_dict(plain.state_dict(), strict=False)
    # The new embedding adds nothing at first.
    nn.init.zeros_(denoiser.time_text_embed.guidance_embedder.linear_2.weight)
    nn.init.zeros_(denoiser.time_text_embed.guidance_embedder.linear_2.bias)
    plain.eval()

    def loss(module: nn.Module, rng: np.random.Generator) -> Tensor:
        device = next(module.parameters()).device
        batch = pool.draw(BATCH, rng, device)
        conditions = parts.conditions(batch)
        free = parts.conditions({k: v.to(device).expand(BATCH, -1) for k, v in parts.empty.items()})
        scale = torch.from_numpy(rng.uniform(*GUIDANCE, BATCH)).float().to(device)
        noisy, t, _ = objectives.flow_point(batch["latents"], rng, SHIFT)
        with torch.no_grad():
            with_text = velocity(plain, noisy, t, conditions)
            without = velocity(plain, noisy, t, free)
        wanted = without + scale[:, None, None] * (with_text - without)
        guided = velocity(module, noisy, t, conditions | {"guidance": scale})
        return (guided - wanted).square().mean()

    return fit(denoiser, loss, GUIDED, work / "guided").cpu()


def train_straight(dev: Any, parts: Parts, pool: Pool, work: Path) -> Any:
    """Reflow: the velocity noise - x on the line between noise and what dev made of it.

    Half of the levels are those of 4 steps, where it will be used; the rest is uniform.
    """
    torch.manual_seed(STRAIGHT.seed)
    denoiser = build_denoiser(guidance=False)
    denoiser.load_state_dict(
        {k: v for k, v in dev.state_dict().items() if "guidance_embedder" not in k}
    )

    def loss(module: nn.Module, rng: np.random.Generator) -> Tensor:
        batch = pool.draw(BATCH, rng, next(module.parameters()).device)
        grid = 1 - rng.integers(0, SCHNELL_STEPS, BATCH) / SCHNELL_STEPS
        chosen = np.where(rng.random(BATCH) < 0.5, grid, 1 - rng.random(BATCH))
        sigma = torch.from_numpy(chosen).float().to(batch["noise"].device)
        level = sigma[:, None, None]
        noisy = level * batch["noise"] + (1 - level) * batch["latents"]
        predicted = velocity(module, noisy, objectives.STEPS * sigma, parts.conditions(batch))
        return (predicted - (batch["noise"] - batch["latents"])).square().mean()

    return fit(denoiser, loss, STRAIGHT, work / "straight").cpu()


def velocity(module: Any, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
    """The denoiser's output; FLUX itself multiplies timesteps by 1000."""
    output: Tensor = module(noisy, timestep=t / 1000, return_dict=False, **conditions)[0]
    return output


def _start_at_zero(denoiser: Any) -> None:
    """Modulation and output start at zero (adaLN-zero)."""
    layers = [denoiser.proj_out, denoiser.norm_out.linear]
    for block in denoiser.transformer_blocks:
        layers += [block.norm1.linear, block.norm1_context.linear]
    layers += [block.norm.linear for block in denoiser.single_transformer_blocks]
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
