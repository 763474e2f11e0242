"""Restore a FLUX whose weights ComfyUI keeps in NVFP4. Run: python examples/restore_nvfp4_flux.py.

comfy-kitchen computes with such weights on a CPU, too; what enters the layers stays in 16 or 32 bits there.
"""

import tempfile
from pathlib import Path

import torch
from diffusers import FluxPipeline

import evenkeel
from evenkeel import zoo
from evenkeel.hosts.comfy_checkpoint import load_comfy, write_comfy
from evenkeel.hosts.pipeline.pipelines import call_defaults
from evenkeel.zoo.pictures import KINDS

SETTINGS = {"num_inference_steps": 2, "guidance_scale": 0.0}  # the model itself: 4 steps
BUDGET = 0.11  # bytes of the adapters over bytes of the quantized denoiser


def twin(folder):
    """Pipeline, checkpoint and prompts: a twin of FLUX.1 [schnell], its file written here."""
    from comfy_kitchen.tensor import QuantizedTensor

    pipe = zoo.load("flux-schnell")
    weights = {
        name: QuantizedTensor.from_float(weight.detach(), "TensorCoreNVFP4Layout")
        if "blocks" in name and name.endswith(".weight") and weight.ndim == 2
        else weight
        for name, weight in pipe.transformer.named_parameters()
    }
    file = write_comfy(weights, folder / "twin-nvfp4.safetensors")
    return pipe, file, KINDS["scenes"].prompts(4, seed=0)


def yours(folder):
    """The model itself, the file that you have, and some 32 prompts like those that you use."""
    model = "black-forest-labs/FLUX.1-schnell"
    pipe = FluxPipeline.from_pretrained(model, torch_dtype=torch.bfloat16).to("cuda")
    return pipe, "flux1-schnell-nvfp4.safetensors", Path("prompts.txt").read_text().splitlines()


SOURCE = twin  # or yours


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pipe, file, prompts = SOURCE(Path(folder))
        quantized = load_comfy(file, pipe.transformer, "FluxPipeline")
        adapters, report = evenkeel.fit_adapters(
            pipe, quantized=quantized, prompts=prompts, budget=BUDGET, **SETTINGS
        )
        print(report.text())
        pipe.transformer = quantized
        evenkeel.apply(pipe, adapters)
        print(pipe(prompts[0], **SETTINGS, **call_defaults(pipe)).images[0].size)


if __name__ == "__main__":
    main()
