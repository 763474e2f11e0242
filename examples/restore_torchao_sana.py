"""Restore a Sana that torchao quantized to 4 bits. Run: python examples/restore_torchao_sana.py."""

import copy
from pathlib import Path

import torch
from diffusers import SanaPipeline
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

import evenkeel
from evenkeel import zoo
from evenkeel.hosts.pipeline.pipelines import call_defaults
from evenkeel.zoo.pictures import KINDS

STEPS, GUIDANCE_SCALE, BUDGET = 2, 4.5, 0.11  # 20 steps for the model itself


def twin():
    """Pipeline and prompts: a twin of Sana 1.6B."""
    return zoo.load("sana"), KINDS["scenes"].prompts(4, seed=0)


def yours():
    """The model itself, and some 32 prompts like those that you use."""
    model = "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"
    pipe = SanaPipeline.from_pretrained(model, torch_dtype=torch.bfloat16).to("cuda")
    return pipe, Path("prompts.txt").read_text().splitlines()


SOURCE = twin  # or yours


def main() -> None:
    pipe, prompts = SOURCE()
    quantized = copy.deepcopy(pipe.transformer)
    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    quantize_(
        quantized,
        config,
        lambda layer, name: (
            type(layer) is torch.nn.Linear and layer.in_features % 32 == 0 and "blocks" in name
        ),
    )
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE_SCALE}
    adapters, report = evenkeel.fit_adapters(
        pipe, quantized=quantized, prompts=prompts, budget=BUDGET, **settings
    )
    print(report.text())
    pipe.transformer = quantized
    evenkeel.apply(pipe, adapters)
    print(pipe(prompts[0], **settings, **call_defaults(pipe)).images[0].size)


if __name__ == "__main__":
    main()
