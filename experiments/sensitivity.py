"""What every measure sees: the same pictures with less contrast, noise, blur, colour, a shift, brightness.

1,000 full-precision pictures of a twin, changed in seven ways that all cost the same PSNR as contrast x 0.9,
and those of plain W3A4. Every measure with its change against the untouched pictures over the standard error
of that change. Writes sensitivity.json and SENSITIVITY.md beside this file.

    python experiments/sensitivity.py                # both
    python experiments/sensitivity.py --table        # SENSITIVITY.md from the result on disk
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from evenkeel import zoo
from evenkeel.comparing.comparison import FULL_PRECISION, QUANTIZED, measure
from evenkeel.comparing.generation import Arm, generate
from evenkeel.hosts.run import Run
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.zoo.pictures import KINDS

HERE = Path(__file__).parent
TWIN, STEPS, CONTRAST, SPEC = "pixart-sigma", 20, 0.9, "w3a4-g32"
KEYS = (
    "psnr",
    "ssim",
    "perceptual",
    "frechet_full_precision",
    "spatial_frechet_full_precision",
    "kernel_full_precision",
    "frechet_reference",
    "spatial_frechet_reference",
    "kernel_reference",
    "inception_score",
    "precision",
    "recall",
    "alignment",
    "brightness",
    "contrast",
    "saturation",
    "sharpness",
)


def contrast(x: Tensor, amount: float) -> Tensor:
    return 0.5 + (1 - amount) * (x - 0.5)


def brighter(x: Tensor, amount: float) -> Tensor:
    return x + amount


def noise(x: Tensor, amount: float) -> Tensor:
    return x + amount * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def blur(x: Tensor, amount: float) -> Tensor:
    """Towards a mean over 3 x 3 pixels."""
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="replicate")
    return x + amount * (torch.nn.functional.avg_pool2d(padded, 3, 1) - x)


def colour(x: Tensor, amount: float) -> Tensor:
    """Towards grey."""
    return x + amount * (x.mean(1, keepdim=True) - x)


def hue(x: Tensor, amount: float) -> Tensor:
    """Red up, blue down."""
    return x + amount * torch.tensor([1.0, 0.0, -1.0])[:, None, None]


def shift(x: Tensor, amount: float) -> Tensor:
    """To the right, by so many pixels."""
    frequencies = torch.fft.rfftfreq(x.shape[-1])
    turned = torch.fft.rfft(x) * torch.exp(-2j * math.pi * frequencies * amount)
    return torch.fft.irfft(turned, n=x.shape[-1])


WAYS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "contrast": contrast,
    "brightness": brighter,
    "noise": noise,
    "blur": blur,
    "less colour": colour,
    "hue": hue,
    "shift": shift,
}


def psnr(a: Tensor, b: Tensor) -> float:
    """The mean over pictures."""
    return float(-10 * ((a - b).square().mean((1, 2, 3)) + 1e-12).log10().mean())


def as_bytes(x: Tensor) -> Tensor:
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def changed(images: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
    """All ways at the PSNR of contrast x CONTRAST, and how much of each that is."""
    x = images.float() / 255
    wanted = psnr(as_bytes(contrast(x, 1 - CONTRAST)).float() / 255, x)
    found, amounts = {}, {}
    for name, way in WAYS.items():
        low, high = 0.0, 1.0
        for _ in range(12):
            middle = (low + high) / 2
            enough = psnr(as_bytes(way(x, middle)).float() / 255, x) < wanted
            low, high = (low, middle) if enough else (middle, high)
        found[name], amounts[name] = as_bytes(way(x, high)), high
    return found, amounts


def run(n: int) -> dict[str, object]:
    kind = KINDS[zoo.twin(TWIN).pictures]
    pipeline, prompts = zoo.load(TWIN), kind.prompts(n, 1)
    quantized, _ = quantize_module(pipeline.transformer, QuantizerSpec.parse(SPEC))
    asked = Run(
        pipeline,
        prompts,
        STEPS,
        guidance_scale=zoo.twin(TWIN).guidance_scale,
        seed=1_000_000,
        batch_size=50,
    )
    clean, seconds = generate(asked, Arm(FULL_PRECISION, pipeline.transformer))
    ways, amounts = changed(clean)
    # "quantized" is what differences are taken to: the untouched pictures.
    images = {FULL_PRECISION: clean, QUANTIZED: clean, **ways}
    images[SPEC], _ = generate(asked, Arm(SPEC, quantized))
    results = measure(
        images,
        dict.fromkeys(images, seconds),
        prompts,
        kind.evaluator(zoo.path_of(TWIN)),
        kind.references(prompts, 1),
        more=True,
    )
    arms = {r.name: r for r in results}
    rows = {
        key: {
            name: [
                _number(arms[name].measures[key].value),
                _number(_signal(arms[name].difference_to_quantized.get(key))),
            ]
            for name in (*ways, SPEC)
        }
        for key in KEYS
    }
    return {"twin": TWIN, "images": n, "amounts": amounts, "rows": rows}


def _signal(change: object) -> float:
    return math.nan if change is None else change.value / max(change.stderr, 1e-12)  # type: ignore[attr-defined]


def _number(x: float) -> float | None:
    return float(f"{x:.4g}") if math.isfinite(x) else None


def table(found: dict) -> str:
    names = list(found["rows"]["psnr"])
    amounts = ", ".join(f"{k} {v:.3f}" for k, v in found["amounts"].items())
    lines = [
        "# What every measure sees",
        "",
        f"Made by `python experiments/sensitivity.py`: {found['images']} full-precision pictures of "
        f"{found['twin']}, changed in ways that all cost the PSNR of contrast x {CONTRAST} (amounts: "
        f"{amounts}), and {SPEC}. Value, and in brackets the change against the untouched pictures over its "
        "standard error: below 2 in size the measure does not see it. PSNR, SSIM and the perceptual distance "
        "have no value of untouched pictures that a change could be taken to.",
        "",
        f"| measure | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    for key, row in found["rows"].items():
        cells = []
        for name in names:
            value, signal = row[name]
            text = "-" if value is None else f"{value:.3g}"
            cells.append(text if signal is None else f"{text} ({signal:+.1f})")
        lines.append(f"| {key.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    place = HERE / "sensitivity.json"
    if not options.table:
        place.write_text(json.dumps(run(options.images), separators=(",", ":")) + "\n")
    (HERE / "SENSITIVITY.md").write_text(table(json.loads(place.read_text())))


if __name__ == "__main__":
    main()
