"""The twin of PixArt-Sigma, the embedded pipeline: one digit, DPM-Solver++ 2M.

Four networks, one after another: text encoder (which attributes does the caption mention?),
autoencoder, evaluator (which attributes does the picture show?), denoiser.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evenkeel.storage import write_atomically
from evenkeel.zoo.captions import sample_mentions, vocabulary, write_caption
from evenkeel.zoo.evaluation import AttributeNetwork
from evenkeel.zoo.handwriting import (
    ATTRIBUTES,
    IMAGE_SIZE,
    WIDE,
    sample_attributes,
    sample_pictures,
)
from evenkeel.zoo.making import objectives, text_encoders
from evenkeel.zoo.making.autoencoders import build_kl, encode, fit_autoencoder
from evenkeel.zoo.making.evaluators import as_decoded
from evenkeel.zoo.making.loop import Recipe, fit
from evenkeel.zoo.making.pools import Pool, drop_captions
from evenkeel.zoo.making.text_encoders import tokenize

TEXT_ENCODER = Recipe(steps=1200, learning_rate=2e-3, seed=11)
AUTOENCODER = Recipe(steps=1800, learning_rate=2e-3, seed=12, weight_decay=1e-4)
EVALUATOR = Recipe(steps=1600, learning_rate=2e-3, seed=13, weight_decay=1e-2)
# Cosine with one warm restart (Loshchilov & Hutter 2017): colours and places are learnt first, digits last.
DENOISER = (
    Recipe(steps=9500, learning_rate=1e-3, seed=14),
    Recipe(steps=9000, learning_rate=1e-3, seed=15),
)
DENOISER_RUNS = ("denoiser", "denoiser-restart")
BATCH = 128
DENOISER_BATCH = 64
POOL = 40_000  # pictures whose latents are encoded once for the denoiser
DROP_CAPTION = 0.1  # share of empty captions, for classifier-free guidance
WIDTH = 96
CAPTION_TOKENS = 24
CAPTION_WIDTH = 96
LATENT_CHANNELS = 4
LATENT_SIZE = IMAGE_SIZE // 4

SCHEDULER = {
    **objectives.BETAS,
    "prediction_type": "epsilon",
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
}


def build_denoiser(width: int = WIDTH) -> Any:
    """PixArt-Sigma's transformer: 8 blocks, patch 2; 1.4 million parameters at width 96."""
    from diffusers import PixArtTransformer2DModel

    head = 32 if width % 32 == 0 else 16
    return PixArtTransformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        num_layers=8,
        num_attention_heads=width // head,
        attention_head_dim=head,
        cross_attention_dim=width,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        caption_channels=CAPTION_WIDTH,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        use_additional_conditions=False,
    )


def train(work: Path, out: Path) -> None:
    """Train all four networks and save the pipeline and the evaluator."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline
    from safetensors.torch import save

    tokenizer, encoder = train_text_encoder(work)
    vae = train_autoencoder(work)
    evaluator, _ = train_evaluator(work)
    denoiser = train_denoiser(work, tokenizer, encoder, vae)
    pipe = PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae,
        transformer=denoiser.eval(),
        scheduler=DPMSolverMultistepScheduler(**SCHEDULER),
    )
    pipe.save_pretrained(out)
    write_atomically(out / "evaluator.safetensors", save(evaluator.state_dict()))


def captioned(
    n: int, rng: np.random.Generator
) -> tuple[list[str], dict[str, Tensor], dict[str, Tensor]]:
    """Captions, full attributes, and the mentioned attributes (UNSPECIFIED where left out)."""
    attributes = sample_attributes(n, rng)
    captions, mentions = mention(attributes, rng)
    return captions, attributes, mentions


def mention(
    attributes: dict[str, Tensor], rng: np.random.Generator
) -> tuple[list[str], dict[str, Tensor]]:
    """Put each picture's attributes into words, leaving some out."""
    rows = []
    n = len(attributes["digit"])
    for i in range(n):
        rows.append(sample_mentions({k: int(v[i]) for k, v in attributes.items()}, rng))
    captions = [write_caption(r, rng) for r in rows]
    return captions, {k: torch.tensor([r[k] for r in rows]) for k in ATTRIBUTES}


def train_text_encoder(work: Path) -> tuple[Any, Any]:
    """T5 encoder that makes the mentioned attributes linearly readable from its mean token."""
    torch.manual_seed(TEXT_ENCODER.seed)
    tokenizer, encoder = text_encoders.build_t5(
        vocabulary(), CAPTION_TOKENS, CAPTION_WIDTH, layers=2
    )
    heads = nn.ModuleDict({k: nn.Linear(CAPTION_WIDTH, len(v) + 1) for k, v in ATTRIBUTES.items()})
    both = nn.ModuleDict({"encoder": encoder, "heads": heads})

    def loss(module: nn.Module, rng: np.random.Generator) -> Tensor:
        captions, _, mentions = captioned(BATCH, rng)
        ids, mask = tokenize(tokenizer, captions)
        device = next(module.parameters()).device
        ids, mask = ids.to(device), mask.to(device)
        hidden = encoder(ids, attention_mask=mask).last_hidden_state
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        scores = {k: head(pooled) for k, head in heads.items()}
        return text_encoders.reading_loss(scores, mentions)

    fit(both, loss, TEXT_ENCODER, work / "text_encoder")
    return tokenizer, encoder.eval().cpu()


def train_autoencoder(work: Path) -> Any:
    """One autoencoder for more places and slants than captions speak of."""
    torch.manual_seed(AUTOENCODER.seed)

    def pictures(n: int, rng: np.random.Generator) -> Tensor:
        return sample_pictures(n, rng, placement=WIDE)[0]

    vae = build_kl(LATENT_CHANNELS)
    return fit_autoencoder(vae, pictures, AUTOENCODER, work / "autoencoder")


def train_evaluator(work: Path) -> tuple[nn.Module, dict[str, float]]:
    """Attribute network on the training scans; returns its accuracy on held-out scans too."""
    torch.manual_seed(EVALUATOR.seed)
    network = AttributeNetwork()

    def loss(module: nn.Module, rng: np.random.Generator) -> Tensor:
        device = next(module.parameters()).device
        pictures, attributes = sample_pictures(BATCH, rng)
        scores = module(as_decoded(pictures, rng).to(device))
        losses = [
            F.cross_entropy(scores[k], attributes[k].to(device), label_smoothing=0.05)
            for k in ATTRIBUTES
        ]
        return torch.stack(losses).sum()

    fit(network, loss, EVALUATOR, work / "evaluator")
    network = network.cpu().eval()
    pictures, attributes = sample_pictures(4096, np.random.default_rng(99), held_out=True)
    with torch.no_grad():
        scores = network(pictures)
    accuracy = {k: (scores[k].argmax(1) == attributes[k]).float().mean().item() for k in ATTRIBUTES}
    return network, accuracy


def train_denoiser(
    work: Path,
    tokenizer: Any,
    encoder: Any,
    vae: Any,
    *,
    width: int = WIDTH,
    recipes: Sequence[Recipe] | None = None,
    keep: Container[int] = (),
) -> Any:
    """Epsilon prediction on latents encoded once; captions dropped at random for guidance.

    Args:
        work: folder of all runs; the pool of latents is kept there too.
        tokenizer: of the pipeline.
        encoder: of the pipeline, trained; so is the autoencoder.
        vae: the autoencoder.
        width: of the denoiser.
        recipes: one stretch of training each; the embedded pipeline's own without.
        keep: steps whose averaged weights are kept (:func:`evenkeel.zoo.making.loop.fit`).

    """
    recipes = DENOISER if recipes is None else recipes

    def make() -> dict[str, Tensor]:
        return encoded(POOL, np.random.default_rng(recipes[0].seed), tokenizer, vae)

    pool = Pool.kept(work / "latents.safetensors", make)
    empty = dict(zip(("ids", "masks"), tokenize(tokenizer, [""]), strict=True))
    signal = objectives.alphas_cumprod()
    torch.manual_seed(recipes[0].seed)
    denoiser = build_denoiser(width)
    # As the original: modulation and output start at zero.
    nn.init.zeros_(denoiser.proj_out.weight)
    nn.init.zeros_(denoiser.proj_out.bias)

    def loss(module: nn.Module, rng: np.random.Generator) -> Tensor:
        device = next(module.parameters()).device
        batch = pool.draw(DENOISER_BATCH, rng, device)
        batch = drop_captions(batch, empty, DROP_CAPTION, rng)
        return denoising_loss(module, batch, encoder.to(device), rng, signal)

    for recipe, name in zip(recipes, DENOISER_RUNS, strict=False):
        denoiser = fit(denoiser, loss, recipe, work / name, keep=keep)
    return denoiser.cpu()


def encoded(
    n: int, rng: np.random.Generator, tokenizer: Any, vae: Any, *, held_out: bool = False
) -> dict[str, Tensor]:
    """Latents of ``n`` pictures and the tokens of their captions: latents, ids, masks."""
    pictures, attributes = sample_pictures(n, rng, held_out=held_out)
    ids, masks = tokenize(tokenizer, mention(attributes, rng)[0])
    return {"latents": encode(vae, pictures), "ids": ids, "masks": masks}


def denoising_loss(
    denoiser: nn.Module,
    batch: dict[str, Tensor],
    encoder: Any,
    rng: np.random.Generator,
    signal: Tensor,
) -> Tensor:
    """Loss of the denoiser on rows of :func:`encoded`; timesteps from ``rng``, noise from torch."""
    with torch.no_grad():
        text = encoder(batch["ids"], attention_mask=batch["masks"])[0]

    def predict(noisy: Tensor, t: Tensor) -> Tensor:
        output: Tensor = denoiser(
            noisy,
            encoder_hidden_states=text,
            encoder_attention_mask=batch["masks"],
            timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return output

    return objectives.epsilon_loss(predict, batch["latents"], rng, signal)
