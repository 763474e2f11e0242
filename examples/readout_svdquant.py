"""A readout for a FLUX with SVDQuant's weights. Run: python examples/readout_svdquant.py.

Where inputs are rounded to 4 bits, maps beside the layers bring little; a readout is an output layer of its
own for every step, in closed form.
"""

from pathlib import Path

import torch
from diffusers import FluxPipeline

import evenkeel
from evenkeel import zoo
from evenkeel.hosts.pipeline.pipelines import call_defaults
from evenkeel.quantizers import SVDQuant
from evenkeel.zoo.pictures import KINDS

SETTINGS = {
    "num_inference_steps": 2,
    "guidance_scale": 3.5,
}  # 20 steps or more for the model itself


def twin():
    """Pipeline, quantized denoiser, prompts: a twin of FLUX.1 [dev], quantized here, simulated."""
    pipe, prompts = zoo.load("flux-dev"), KINDS["scenes"].prompts(8, seed=0)
    method = SVDQuant(weight_bits=4, activation_bits=4, group=32, rank=16, iterations=1, grids=2)
    quantized, report = evenkeel.quantize(
        pipe, method, prompts=prompts[:2], calibration_steps=2, **SETTINGS
    )
    print(f"{len(report.quantized)} layers quantized")
    return pipe, quantized, prompts


def yours():
    """The model itself with nunchaku's checkpoint, which wants a GPU, and some 32 prompts."""
    from nunchaku import NunchakuFluxTransformer2DModelV2

    pipe = FluxPipeline.from_pretrained(
        "black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16
    ).to("cuda")
    quantized = NunchakuFluxTransformer2DModelV2.from_pretrained(
        "nunchaku-tech/nunchaku-flux.1-dev/svdq-int4_r32-flux.1-dev.safetensors"
    )
    return pipe, quantized, Path("prompts.txt").read_text().splitlines()


SOURCE = twin  # or yours


def main() -> None:
    pipe, quantized, prompts = SOURCE()
    readout = evenkeel.fit_readout(pipe, quantized=quantized, prompts=prompts, **SETTINGS)
    pipe.transformer = quantized
    evenkeel.apply(pipe, readout)
    print(evenkeel.summary(pipe))
    print(pipe(prompts[0], **SETTINGS, **call_defaults(pipe)).images[0].size)


if __name__ == "__main__":
    main()
