"""Restore an SDXL whose UNet bitsandbytes has as NF4. Run: python examples/restore_nf4_sdxl.py."""

import copy
import tempfile
from pathlib import Path

import torch
from diffusers import BitsAndBytesConfig, StableDiffusionXLPipeline, UNet2DConditionModel

import evenkeel
from evenkeel import zoo
from evenkeel.hosts.pipeline.pipelines import call_defaults
from evenkeel.zoo.pictures import KINDS

STEPS, GUIDANCE_SCALE, BUDGET = 2, 5.0, 0.11  # 30 steps for the model itself


def twin():
    """Pipeline, quantized UNet, prompts: a twin of SDXL, layer by layer, which needs no GPU."""
    import bitsandbytes

    pipe = zoo.load("sdxl")
    unet = copy.deepcopy(pipe.unet)
    for name, layer in list(unet.named_modules()):
        # On a CPU blocks have to divide the layer's inputs, and their scales are to stay as they are.
        if type(layer) is torch.nn.Linear and layer.in_features % 32 == 0 and "blocks" in name:
            sizes = layer.in_features, layer.out_features, layer.bias is not None
            new = bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
            new.support_avx512bf16_for_cpu = False
            new.weight = bitsandbytes.nn.Params4bit(
                layer.weight.data, requires_grad=False, module=new, quant_type="nf4", blocksize=32
            )
            new.bias = layer.bias
            unet.set_submodule(name, new.to("cpu"))
    return pipe, unet.eval(), KINDS["scenes"].prompts(4, seed=0)


def yours():
    """The model itself on a GPU, and some 32 prompts like those that you use."""
    model, dtype = "stabilityai/stable-diffusion-xl-base-1.0", torch.float16
    pipe = StableDiffusionXLPipeline.from_pretrained(model, torch_dtype=dtype).to("cuda")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    unet = UNet2DConditionModel.from_pretrained(
        model, subfolder="unet", quantization_config=config, torch_dtype=dtype
    )
    return pipe, unet, Path("prompts.txt").read_text().splitlines()


SOURCE = twin  # or yours


def main() -> None:
    pipe, quantized, prompts = SOURCE()
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE_SCALE}
    adapters, report = evenkeel.fit_adapters(
        pipe, quantized=quantized, prompts=prompts, budget=BUDGET, **settings
    )
    print(report.text())
    pipe.unet = quantized
    evenkeel.apply(pipe, adapters)
    print(pipe(prompts[0], **settings, **call_defaults(pipe)).images[0].size)
    with tempfile.TemporaryDirectory() as folder:  # a place of yours: the file is loaded next time
        place = evenkeel.save(adapters, Path(folder) / "adapters.safetensors")
        evenkeel.apply(pipe, evenkeel.load(place))


if __name__ == "__main__":
    main()
