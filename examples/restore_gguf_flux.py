"""Restore a FLUX from a GGUF file. Run: python examples/restore_gguf_flux.py.

The same from the command line, for your own files, in a folder with card, report and LoRA:

    evenkeel restore black-forest-labs/FLUX.1-schnell --quantized flux1-schnell-Q4_0.gguf \
        --prompts prompts.txt --steps 4 --budget 11% --dtype bfloat16 --device cuda --out restored
"""

import tempfile
from pathlib import Path

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, GGUFQuantizationConfig

import evenkeel
from evenkeel import zoo
from evenkeel.hosts.pipeline.pipelines import call_defaults
from evenkeel.record.lora_file import write_lora
from evenkeel.zoo.pictures import KINDS

SETTINGS = {"num_inference_steps": 2, "guidance_scale": 0.0}  # the model itself: 4 steps
BUDGET = 0.11  # bytes of the adapters over bytes of the quantized denoiser


def twin(folder):
    """Model, GGUF file, dtype and prompts: a twin of FLUX.1 [schnell], its file written here."""
    import gguf

    model = zoo.path_of("flux-schnell")
    network = FluxTransformer2DModel.from_pretrained(model / "transformer")
    file = folder / "twin-Q4_0.gguf"
    writer = gguf.GGUFWriter(file, "flux")
    kind = gguf.GGMLQuantizationType.Q4_0
    for name, tensor in network.state_dict().items():
        value = tensor.numpy()
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 and "blocks" in name:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, file, torch.float32, KINDS["scenes"].prompts(4, seed=0)


def yours(folder):
    """The model itself, the file that you have, and some 32 prompts like those that you use."""
    prompts = Path("prompts.txt").read_text().splitlines()
    return "black-forest-labs/FLUX.1-schnell", "flux1-schnell-Q4_0.gguf", torch.bfloat16, prompts


SOURCE = twin  # or yours


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, file, dtype, prompts = SOURCE(Path(folder))
        pipe = FluxPipeline.from_pretrained(model, torch_dtype=dtype)
        quantized = FluxTransformer2DModel.from_single_file(
            str(file),
            config=str(model),
            subfolder="transformer",
            quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
            torch_dtype=dtype,
        )
        adapters, report = evenkeel.fit_adapters(
            pipe, quantized=quantized, prompts=prompts, budget=BUDGET, **SETTINGS
        )
        print(report.text())
        pipe.transformer = quantized
        evenkeel.apply(pipe, adapters)
        print(pipe(prompts[0], **SETTINGS, **call_defaults(pipe)).images[0].size)
        if adapters.layers:  # for diffusers without this library; evenkeel export has others' names
            write_lora(adapters, Path(folder) / "pytorch_lora_weights.safetensors")


if __name__ == "__main__":
    main()
