"""docs/pictures.png: the twin of Stable Diffusion 2.1 at full precision, quantized, and corrected.

Frozen: W3A4 by rounding to nearest in groups of 32 beside a branch of rank 16 (no search for a flattering
quantizer); refit and readout from 48 prompts of seed 0; the first 7 prompts of seed 3, whatever they show;
the same noise in every arm. Prints PSNR to full precision over 100 other images.

    python experiments/front_page.py
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from evenkeel import zoo
from evenkeel.comparing.comparison import FULL_PRECISION, Arm, compare
from evenkeel.comparing.generation import generate
from evenkeel.fitting import fit_readout, refit_branches
from evenkeel.hosts.pipeline.pipelines import denoiser_of
from evenkeel.hosts.run import Run
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.reports.plots import image_grid
from evenkeel.zoo.making.card import fewer_shades
from evenkeel.zoo.pictures import KINDS

TWIN, SPEC, FITTED_ON, SHOWN, MEASURED = "sd-v2.1", "w3a4-g32-r16", 48, 7, 100


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
    fitting = {"prompts": kind.prompts(FITTED_ON, 0), "batch_size": 16, "progress": False}
    refitted, _ = refit_branches(pipe, quantized=quantized, **fitting, **settings)
    readout = fit_readout(pipe, quantized=refitted, **fitting, **settings)
    arms = [
        Arm(FULL_PRECISION, denoiser_of(pipe)),
        Arm("W3A4", quantized),
        Arm("W3A4, refit and readout", refitted, readout),
    ]
    prompts = kind.prompts(SHOWN, 3)
    run = Run(pipe, prompts, seed=3, batch_size=SHOWN, **settings)
    shown: dict[str, torch.Tensor] = {arm.name: generate(run, arm)[0] for arm in arms}
    picture = Image.open(io.BytesIO(image_grid(shown, [str(p) for p in prompts], scale=2)))
    fewer_shades(picture).save(options.out, optimize=True)
    others = kind.prompts(options.measure, 1)
    found = compare(pipe, arms, prompts=others, batch_size=50, seed=1, progress=False, **settings)
    for arm in found.arms:
        print(arm.name, arm.as_dict()["psnr"])


if __name__ == "__main__":
    main()
