"""docs/pictures.png: the twin of Stable Diffusion 2.1 at full precision, quantized, and corrected.

Frozen: weights rounded to nearest to 3 bits in groups of 32 (no search for a flattering quantizer); recovery
adapters of 11 % more bytes from 32 prompts of seed 0; the first 7 prompts of seed 3, whatever they show; the
same noise in every arm. Writes PSNR to full precision over other images to front_page.json.

    python experiments/front_page.py
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from evenkeel import zoo
from evenkeel.comparing.comparison import FULL_PRECISION, QUANTIZED, Arm, compare
from evenkeel.comparing.generation import generate
from evenkeel.fitting import fit_adapters
from evenkeel.hosts.pipeline.pipelines import denoiser_of
from evenkeel.hosts.run import Run
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.reports.plots import image_grid
from evenkeel.storage import write_atomically
from evenkeel.zoo.making.card import fewer_shades
from evenkeel.zoo.pictures import KINDS

TWIN, SPEC, BUDGET, FITTED_ON, SHOWN, MEASURED = "sd-v2.1", "w3a16-g32", 0.11, 32, 7, 60
RESULT = Path(__file__).parent / "front_page.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/pictures.png"))
    parser.add_argument("--measure", type=int, default=MEASURED, metavar="IMAGES")
    options = parser.parse_args()
    twin, kind = zoo.twin(TWIN), KINDS[zoo.twin(TWIN).pictures]
    pipe = zoo.load(TWIN)
    settings: dict[str, Any] = {
        "num_inference_steps": twin.num_inference_steps,
        "guidance_scale": twin.guidance_scale,
    }
    quantized, _ = quantize_module(denoiser_of(pipe), QuantizerSpec.parse(SPEC))
    adapters, report = fit_adapters(
        pipe,
        quantized=quantized,
        prompts=kind.prompts(FITTED_ON, 0),
        budget=BUDGET,
        batch_size=16,
        **settings,
    )
    print(report.text(), flush=True)
    arms = [
        Arm(FULL_PRECISION, denoiser_of(pipe)),
        Arm(QUANTIZED, quantized),
        Arm(f"restored, +{100 * BUDGET:.0f} % bytes", quantized, adapters),
    ]
    prompts = kind.prompts(SHOWN, 3)
    run = Run(pipe, prompts, seed=3, batch_size=SHOWN, **settings)
    titles = ("full precision", "3-bit weights", arms[2].name)
    pictures = [generate(run, arm)[0] for arm in arms]
    shown: dict[str, torch.Tensor] = dict(zip(titles, pictures, strict=True))
    picture = Image.open(io.BytesIO(image_grid(shown, [str(p) for p in prompts], scale=2)))
    fewer_shades(picture).save(options.out, optimize=True)
    others = kind.prompts(options.measure, 1)
    found = compare(pipe, arms, prompts=others, batch_size=50, seed=1, progress=False, **settings)
    before, after = (arm.as_dict() for arm in found.arms[1:])
    change = after["difference_to_quantized"]["psnr"]
    numbers = {"quantized": before["psnr"], "restored": after["psnr"], "change": change}
    write_atomically(RESULT, json.dumps(numbers, indent=1) + "\n")
    print(numbers)


if __name__ == "__main__":
    main()
