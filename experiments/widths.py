"""The embedded twin's denoiser at widths 48, 96, 192 and 384: how width changes what a byte buys.

Frozen: text encoder, autoencoder, pictures, captions and objective of the embedded twin; 9,500 steps,
batch 64, learning rate 1e-3, seed 14, where the table does not say fewer. Averaged weights are kept after
250, 500, 1,000, 2,000, 4,000, 6,500 and 9,500 steps. Held-out loss: 1,024 pictures of held-out scans, the
same noise and timesteps for every network. Damage: weights rounded to nearest in groups of 16,
DPM-Solver++, 20 steps, guidance 4.5, 200 images, the same noise as at full precision. Effective rank: exp of
the entropy of the eigenvalues' shares (Roy & Vetterli 2007) of the second moments of a linear layer's inputs,
and of the gradients of the loss by its outputs, over its size; median over the layers.

Training and measuring resume after any stop; give --steps to cut all widths to fewer (their learning rate
ends there), and --images to measure with fewer.

    python experiments/widths.py train                 # all four, one after the other
    python experiments/widths.py train 384             # one, for example on a GPU
    python experiments/widths.py measure               # of what is trained; writes WIDTHS.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from evenkeel import zoo
from evenkeel.comparing.comparison import FULL_PRECISION, Arm, compare
from evenkeel.hosts.pipeline.pipelines import denoiser_of
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.storage import write_atomically
from evenkeel.zoo.making import objectives
from evenkeel.zoo.making.loop import Recipe
from evenkeel.zoo.making.twins import pixart_sigma
from evenkeel.zoo.pictures import KINDS

HERE = Path(__file__).parent
RESULTS = HERE / "widths"
WIDTHS = (48, 96, 192, 384)
STEPS = 9500
KEPT = (250, 500, 1000, 2000, 4000, 6500, 9500)
SPECS = {"W4A16": "w4a16-g16", "W3A16": "w3a16-g16"}
IMAGES, HELD_OUT, BATCH, SEED = 200, 1024, 64, 77
TWIN, POOL = "pixart-sigma", "latents.safetensors"


def kept_for(steps: int) -> tuple[int, ...]:
    """Checkpoints of a run of so many steps; its last step is one."""
    return (*(k for k in KEPT if k < steps), steps)


def train(width: int, steps: int, work: Path) -> None:
    """Train one width in a folder of its own, or continue there."""
    pipe = zoo.load(TWIN)
    recipe = Recipe(steps=steps, learning_rate=1e-3, seed=14)
    folder = work / f"{width}-{steps}"
    folder.mkdir(parents=True, exist_ok=True)
    pools = [p / POOL for p in sorted(work.iterdir()) if (p / POOL).is_file()]
    if pools and not (folder / POOL).is_file():  # the same for every width
        write_atomically(folder / POOL, pools[0].read_bytes())
    pixart_sigma.train_denoiser(
        folder,
        pipe.tokenizer,
        pipe.text_encoder,
        pipe.vae,
        width=width,
        recipes=(recipe,),
        keep=kept_for(steps),
    )


def measure(width: int, steps: int, images: int, work: Path) -> list[dict[str, Any]]:
    """A row for every checkpoint: held-out loss, damage, effective ranks."""
    run = work / f"{width}-{steps}" / pixart_sigma.DENOISER_RUNS[0]
    rows = []
    for step in kept_for(steps):
        weights, done = run / f"step-{step}.safetensors", RESULTS / f"{width}-{steps}-{step}.json"
        if not weights.exists():
            continue
        if not done.exists():
            denoiser = pixart_sigma.build_denoiser(width).eval()
            denoiser.load_state_dict(load_file(weights))
            loss, ranks = loss_and_ranks(denoiser)
            row = {
                "width": width,
                "step": step,
                "weights": sum(p.numel() for p in denoiser.parameters()),
                "held_out_loss": loss,
                "effective_rank": ranks,
                "images": images,
                "damage": damage(denoiser, images, work / "images" / f"{width}-{steps}-{step}"),
            }
            write_atomically(done, json.dumps(row) + "\n")
            print(width, step, round(loss, 4), flush=True)
        rows.append(json.loads(done.read_text()))
    return rows


def loss_and_ranks(denoiser: Any) -> tuple[float, dict[str, dict[str, float]]]:
    """Held-out loss, and layer -> effective rank over size of its inputs and gradients."""
    pipe = zoo.load(TWIN)
    rng = np.random.default_rng(SEED)
    pool = pixart_sigma.encoded(HELD_OUT, rng, pipe.tokenizer, pipe.vae, held_out=True)
    signal = objectives.alphas_cumprod()
    layers = {n: m for n, m in denoiser.named_modules() if isinstance(m, nn.Linear)}
    sums: dict[tuple[str, str], Tensor] = {}
    handles = [m.register_forward_hook(_adding(sums, n)) for n, m in layers.items()]
    torch.manual_seed(SEED)
    losses = []
    for start in range(0, HELD_OUT, BATCH):
        batch = {k: v[start : start + BATCH] for k, v in pool.items()}
        loss = pixart_sigma.denoising_loss(denoiser, batch, pipe.text_encoder, rng, signal)
        denoiser.zero_grad(set_to_none=True)
        loss.backward()
        losses.append(loss.item())
    for handle in handles:
        handle.remove()
    ranks: dict[str, dict[str, float]] = {"inputs": {}, "gradients": {}}
    for (name, side), moment in sums.items():
        ranks[side][name] = effective_rank(moment) / len(moment)
    return float(np.mean(losses)), ranks


def _adding(sums: dict[tuple[str, str], Tensor], name: str) -> Any:
    """A hook that adds up second moments of the input and of the gradient by the output."""

    def add(side: str, rows: Tensor) -> None:
        flat = rows.detach().flatten(0, -2).double()
        moment = flat.T @ flat
        sums[name, side] = sums.get((name, side), torch.zeros_like(moment)) + moment

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        add("inputs", inputs[0])
        if output.requires_grad:
            output.register_hook(lambda gradient: add("gradients", gradient))

    return hook


def effective_rank(moment: Tensor) -> float:
    """exp(entropy) of the eigenvalues' shares of a second moment (d, d); 0 where all are 0."""
    values = torch.linalg.eigvalsh(moment).clamp_min(0)
    if not values.sum():
        return 0.0
    shares = values / values.sum()
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))


def damage(denoiser: nn.Module, images: int, folder: Path) -> dict[str, Any]:
    """What full precision shows, and what rounding the weights does to its pictures."""
    twin, kind = zoo.twin(TWIN), KINDS["captions"]
    pipe = zoo.load(TWIN)
    pipe.transformer = denoiser
    arms = [Arm(FULL_PRECISION, denoiser_of(pipe))]
    for label, text in SPECS.items():
        arms.append(Arm(label, quantize_module(denoiser_of(pipe), QuantizerSpec.parse(text))[0]))
    prompts = kind.prompts(images, 1)
    comparison = compare(
        pipe,
        arms,
        prompts=prompts,
        num_inference_steps=twin.num_inference_steps,
        guidance_scale=twin.guidance_scale,
        batch_size=50,
        evaluator=kind.evaluator(zoo.path_of(TWIN)),
        reference_images=kind.references(prompts, 1),
        folder=folder,
    )
    return {arm.name: arm.as_dict() for arm in comparison.arms}


def write_table(runs: dict[int, list[dict[str, Any]]]) -> None:
    """WIDTHS.md: all checkpoints, read at equal steps; and for each width the first at an equal loss."""
    lines = ["# Widths", "", *(__doc__ or "").splitlines()[2:9], ""]
    ran = {f"{max(r['step'] for r in rows):,} steps" for rows in runs.values()}
    counts = {f"{r['images']} images" for rows in runs.values() for r in rows}
    lines += [f"Here: {', '.join(sorted(ran))}; {', '.join(sorted(counts))}.", ""]
    lines += ["## At equal steps", "", *_head()]
    steps = sorted({row["step"] for rows in runs.values() for row in rows})
    for step in steps:
        lines += [_line(row) for rows in runs.values() for row in rows if row["step"] == step]
    reached = max(min(row["held_out_loss"] for row in rows) for rows in runs.values())
    lines += ["", f"## At equal loss: the first checkpoint at or below {reached:.4f}", "", *_head()]
    for rows in runs.values():
        lines.append(_line(next(r for r in rows if r["held_out_loss"] <= reached)))
    (HERE / "WIDTHS.md").write_text("\n".join(lines) + "\n")


def _head() -> list[str]:
    names = ["step", "width", "weights, M", "held-out loss", "alignment, %", "FD to held-out scans"]
    names += [f"{label}: {what}" for label in SPECS for what in ("PSNR, dB", "FD to full")]
    names += ["effective rank, inputs", "gradients"]
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


def _line(row: dict[str, Any]) -> str:
    def value(arm: str, key: str, scale: float = 1.0) -> str:
        found = row["damage"][arm][key]
        if found["value"] is None:
            return "-"
        return f"{scale * found['value']:.2f} ± {scale * (found['stderr'] or 0):.2f}"

    cells = [f"{row['step']:,}", str(row["width"]), f"{row['weights'] / 1e6:.2f}"]
    cells += [f"{row['held_out_loss']:.4f}", value(FULL_PRECISION, "alignment", 100)]
    cells.append(value(FULL_PRECISION, "frechet_reference"))
    for label in SPECS:
        cells += [value(label, "psnr"), value(label, "frechet_full_precision")]
    for side in ("inputs", "gradients"):
        cells.append(f"{np.median(list(row['effective_rank'][side].values())):.3f}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=("train", "measure"))
    parser.add_argument("widths", nargs="*", type=int, default=list(WIDTHS), metavar="WIDTH")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--work", type=Path, default=Path("runs/experiments/widths"))
    options = parser.parse_args()
    if options.action == "train":
        for width in options.widths:
            train(width, options.steps, options.work)
        return
    RESULTS.mkdir(exist_ok=True)
    found = {
        width: measure(width, options.steps, options.images, options.work)
        for width in options.widths
    }
    write_table({width: rows for width, rows in found.items() if rows})


if __name__ == "__main__":
    main()
