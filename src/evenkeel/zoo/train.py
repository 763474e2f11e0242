"""``python -m evenkeel.zoo.train pixart-sigma --work runs/zoo --out FOLDER``: data to saved pipeline.

Four networks, one after another: text encoder (which attributes does the caption mention?),
autoencoder, evaluator (which attributes does the picture show?), denoiser. Each resumes where a
killed run stopped. The saved folder loads with ``diffusers.DiffusionPipeline.from_pretrained``.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from evenkeel.zoo import networks
from evenkeel.zoo.captions import sample_mentions, write_caption
from evenkeel.zoo.handwriting import ATTRIBUTES, WIDE, sample_attributes, sample_pictures
from evenkeel.zoo.training import Recipe, fit

TEXT_ENCODER = Recipe(steps=1200, learning_rate=2e-3, seed=11)
AUTOENCODER = Recipe(steps=1800, learning_rate=2e-3, seed=12, weight_decay=1e-4)
EVALUATOR = Recipe(steps=1600, learning_rate=2e-3, seed=13, weight_decay=1e-2)
# Cosine with one warm restart (Loshchilov & Hutter 2017): colours and places are learnt first, digits last.
DENOISER = (
    Recipe(steps=9500, learning_rate=1e-3, seed=14, ema=0.999),
    Recipe(steps=9000, learning_rate=1e-3, seed=15, ema=0.999),
)
DENOISER_RUNS = ("denoiser", "denoiser-restart")
BATCH = 128
DENOISER_BATCH = 64
POOL = 40_000  # pictures whose latents are encoded once for the denoiser
DROP_CAPTION = 0.1  # share of empty captions, for classifier-free guidance


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


def tokenize(tokenizer: Any, captions: list[str]) -> tuple[Tensor, Tensor]:
    """As PixArtSigmaPipeline.encode_prompt does: padded to the maximum length."""
    tokens = tokenizer(
        captions,
        padding="max_length",
        max_length=networks.CAPTION_TOKENS,
        truncation=True,
        return_tensors="pt",
    )
    return tokens.input_ids, tokens.attention_mask


def train_text_encoder(work: Path) -> tuple[Any, Any]:
    """T5 encoder that makes the mentioned attributes linearly readable from its mean token."""
    tokenizer = networks.build_tokenizer()
    torch.manual_seed(TEXT_ENCODER.seed)
    encoder = networks.build_text_encoder(len(tokenizer))
    heads = nn.ModuleDict(
        {k: nn.Linear(networks.CAPTION_WIDTH, len(v) + 1) for k, v in ATTRIBUTES.items()}
    )
    both = nn.ModuleDict({"encoder": encoder, "heads": heads})

    def loss(module: nn.Module, rng: np.random.Generator) -> Tensor:
        captions, _, mentions = captioned(BATCH, rng)
        ids, mask = tokenize(tokenizer, captions)
        device = next(module.parameters()).device
        ids, mask = ids.to(device), mask.to(device)
        hidden = encoder(ids, attention_mask=mask).last_hidden_state
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        losses = [
            F.cross_entropy(head(pooled), (mentions[k] % (len(ATTRIBUTES[k]) + 1)).to(device))
            for k, head in heads.items()
        ]
        return torch.stack(losses).sum()

    fit(both, loss, TEXT_ENCODER, work / "text_encoder")
    return tokenizer, encoder.eval().cpu()


def train_autoencoder(work: Path) -> Any:
    """Autoencoder with an L1 and a gradient loss, and a light Kullback-Leibler term."""
    torch.manual_seed(AUTOENCODER.seed)
    vae = networks.build_autoencoder()

    def loss(module: nn.Module, rng: np.random.Generator) -> Tensor:
        pictures, _ = sample_pictures(64, rng, placement=WIDE)
        x = pictures.to(vae.device) * 2 - 1
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        edges = (x.diff(dim=-1) - y.diff(dim=-1)).abs().mean()
        edges = edges + (x.diff(dim=-2) - y.diff(dim=-2)).abs().mean()
        kl: Tensor = posterior.kl().mean() / x[0].numel()
        total: Tensor = (x - y).abs().mean() + 0.5 * F.mse_loss(y, x) + 0.5 * edges + 2e-3 * kl
        return total

    fit(vae, loss, AUTOENCODER, work / "autoencoder")
    vae = vae.cpu()
    with torch.no_grad():
        pictures, _ = sample_pictures(1024, np.random.default_rng(AUTOENCODER.seed))
        latents = vae.encode(pictures * 2 - 1).latent_dist.mode()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return vae


def train_evaluator(work: Path) -> tuple[nn.Module, dict[str, float]]:
    """Attribute network on the training scans; returns its accuracy on held-out scans too."""
    torch.manual_seed(EVALUATOR.seed)
    network = networks.Evaluator()

    def loss(module: nn.Module, rng: np.random.Generator) -> Tensor:
        device = next(module.parameters()).device
        pictures, attributes = sample_pictures(BATCH, rng)
        # Slight blur and noise on half of the pictures: decoders produce both.
        blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
        weight = torch.from_numpy(rng.uniform(0, 0.7, (BATCH, 1, 1, 1)).astype(np.float32))
        weight *= torch.from_numpy((rng.random((BATCH, 1, 1, 1)) < 0.5).astype(np.float32))
        pictures = pictures.lerp(blurred, weight) + 0.02 * weight * torch.randn(pictures.shape)
        scores = module(pictures.to(device))
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


def train_denoiser(work: Path, tokenizer: Any, encoder: Any, vae: Any) -> Any:
    """Epsilon prediction on latents encoded once; captions dropped at random for guidance."""
    from diffusers import DDPMScheduler

    latents, ids, masks = _latent_pool(work, tokenizer, vae)
    empty_ids, empty_mask = tokenize(tokenizer, [""])
    noise_schedule = DDPMScheduler(
        beta_start=networks.SCHEDULER["beta_start"],
        beta_end=networks.SCHEDULER["beta_end"],
        beta_schedule=networks.SCHEDULER["beta_schedule"],
    )
    torch.manual_seed(DENOISER[0].seed)
    denoiser = networks.build_denoiser()
    # As the original: modulation and output start at zero.
    nn.init.zeros_(denoiser.proj_out.weight)
    nn.init.zeros_(denoiser.proj_out.bias)

    def loss(module: nn.Module, rng: np.random.Generator) -> Tensor:
        device = next(module.parameters()).device
        rows = torch.from_numpy(rng.integers(0, len(latents), DENOISER_BATCH))
        drop = torch.from_numpy(rng.random(DENOISER_BATCH) < DROP_CAPTION)[:, None]
        tokens = torch.where(drop, empty_ids, ids[rows]).to(device)
        mask = torch.where(drop, empty_mask, masks[rows]).to(device)
        with torch.no_grad():
            captions = encoder.to(device)(tokens, attention_mask=mask).last_hidden_state
        x, noise = latents[rows].to(device), torch.randn(latents[rows].shape).to(device)
        # Stratified: one timestep per stretch of the schedule, less noise in the gradient.
        strata = (rng.permutation(DENOISER_BATCH) + rng.random(DENOISER_BATCH)) / DENOISER_BATCH
        t = torch.from_numpy((strata * 1000).astype(np.int64)).to(device)
        noisy = noise_schedule.add_noise(x, noise, t)
        predicted = module(
            noisy,
            encoder_hidden_states=captions,
            encoder_attention_mask=mask,
            timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        # Weighted as an error of v = alpha eps - sigma x0: every noise level counts about the same.
        signal = noise_schedule.alphas_cumprod.to(device)[t]
        squared: Tensor = (predicted - noise).pow(2).mean((1, 2, 3))
        weighted: Tensor = (squared / signal).mean()
        return weighted

    for recipe, name in zip(DENOISER, DENOISER_RUNS, strict=True):
        denoiser = fit(denoiser, loss, recipe, work / name)
    return denoiser.cpu()


def _latent_pool(work: Path, tokenizer: Any, vae: Any) -> tuple[Tensor, Tensor, Tensor]:
    path = work / "latents.safetensors"
    if not path.exists():
        rng = np.random.default_rng(DENOISER[0].seed)
        pictures, attributes = sample_pictures(POOL, rng)
        captions, _ = mention(attributes, rng)
        ids, masks = tokenize(tokenizer, captions)
        with torch.no_grad():
            parts = [vae.encode(p * 2 - 1).latent_dist.mode() for p in torch.split(pictures, 500)]
        latents = torch.cat(parts) * vae.config.scaling_factor
        save_file({"latents": latents, "ids": ids, "masks": masks}, path)
    pool = load_file(path)
    return pool["latents"], pool["ids"], pool["masks"]


def train_pixart_sigma(work: Path, out: Path) -> None:
    """Train all four networks and save the pipeline, the evaluator and the training curves."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline

    tokenizer, encoder = train_text_encoder(work)
    vae = train_autoencoder(work)
    evaluator, accuracy = train_evaluator(work)
    print(json.dumps({"evaluator_held_out_accuracy": accuracy}))
    denoiser = train_denoiser(work, tokenizer, encoder, vae)
    pipe = PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae,
        transformer=denoiser.eval(),
        scheduler=DPMSolverMultistepScheduler(**networks.SCHEDULER),
    )
    pipe.save_pretrained(out)
    save_file(evaluator.state_dict(), out / "evaluator.safetensors")
    curves = {}
    for name in ("text_encoder", "autoencoder", "evaluator", *DENOISER_RUNS):
        shutil.copy(work / name / "loss.jsonl", out / f"loss-{name}.jsonl")
        curves[name] = json.loads((work / name / "loss.jsonl").read_text().splitlines()[-1])
    training = {
        "command": "python -m evenkeel.zoo.train pixart-sigma",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, "
        + ("CUDA" if torch.cuda.is_available() else "CPU"),
        "torch": torch.__version__,
        "last": curves,
        "evaluator_held_out_accuracy": accuracy,
    }
    (out / "training.json").write_text(json.dumps(training, indent=2) + "\n")


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=["pixart-sigma"])
    parser.add_argument("--work", type=Path, default=Path("runs/zoo/pixart-sigma"))
    parser.add_argument("--out", type=Path, default=Path("runs/zoo/pixart-sigma/pipeline"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    train_pixart_sigma(options.work, options.out)


if __name__ == "__main__":
    main()
