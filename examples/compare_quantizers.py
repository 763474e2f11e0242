"""Three quantizers of one model, same prompts and noise. Run: python examples/compare_quantizers.py."""

import tempfile
from pathlib import Path

import torch
from diffusers import PixArtSigmaPipeline

import evenkeel
from evenkeel import zoo
from evenkeel.quantizers import RoundToNearest, SVDQuant, ViDiTQ
from evenkeel.reports.html import write_report
from evenkeel.zoo.pictures import KINDS

STEPS, GUIDANCE_SCALE = 2, 4.5  # 20 steps for the model itself
METHODS = {
    "quantized": RoundToNearest(
        weight_bits=4, activation_bits=8
    ),  # the others are compared with it
    "svdquant": SVDQuant(
        weight_bits=4, activation_bits=8, group=32, rank=16, iterations=1, grids=2
    ),
    "vidit-q": ViDiTQ(weight_bits=4, activation_bits=8),
}


def twin():
    """Pipeline and prompts: a twin of PixArt-Sigma."""
    return zoo.load("pixart-sigma"), KINDS["captions"].prompts(6, seed=0)


def yours():
    """The model itself, and some 32 prompts like those that you use."""
    model = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"
    pipe = PixArtSigmaPipeline.from_pretrained(model, torch_dtype=torch.float16).to("cuda")
    return pipe, Path("prompts.txt").read_text().splitlines()


SOURCE = twin  # or yours


def main() -> None:
    pipe, prompts = SOURCE()
    calibrate_on, measure_on = prompts[: len(prompts) // 3], prompts[len(prompts) // 3 :]
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE_SCALE}
    arms = [evenkeel.Arm("full-precision", pipe.transformer)]
    for name, method in METHODS.items():
        quantized, _ = evenkeel.quantize(
            pipe, method, prompts=calibrate_on, calibration_steps=2, **settings
        )
        arms.append(evenkeel.Arm(name, quantized))
    found = evenkeel.compare(pipe, arms, prompts=measure_on, **settings)
    for arm in found.arms[1:]:
        psnr = arm.measures["psnr"]
        print(f"{arm.name:10s} {psnr.value:.1f} dB [{psnr.low:.1f}, {psnr.high:.1f}]")
    results = {"settings": settings, "arms": [arm.as_dict() for arm in found.arms]}
    with tempfile.TemporaryDirectory() as folder:  # a place of yours
        write_report(Path(folder) / "report.html", results, found.images, measure_on)


if __name__ == "__main__":
    main()
