"""Every Python block of every page runs, on tiny pipelines, with fewer prompts and steps."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_pipelines
import torch
from PIL import Image
from tiny_pipelines import TinyPipeline

import evenkeel
from evenkeel.quantizers import QuantizerSpec, quantize_module

ROOT = Path(__file__).parents[2]
ELSEWHERE = {"record-format.md"}  # read by that page alone: tests/record/test_format_page.py
PACKAGES = ("comfy_kitchen", "gguf", "modelopt", "optimum", "sdnq", "torchao")
SHORTER = {
    r"num_inference_steps(=|\": )20": r"num_inference_steps\g<1>2",
    r"prompts\(32": "prompts(4",
}


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


PAGES = [p for p in sorted((ROOT / "docs").glob("*.md")) if blocks(p) and p.name not in ELSEWHERE]


def whole(tiny: TinyPipeline) -> dict[str, Any]:
    """What all pages take for granted."""
    quantized, _ = quantize_module(tiny.model, QuantizerSpec.parse("w3a4-g16-r4"))
    prompts = ["a cat", "a dog", "a boat", "a tree"]
    made = {"evenkeel": evenkeel, "pipe": tiny.pipe, "prompts": prompts, "quantized": quantized}
    return {**made, "torch": torch, "copy": copy, "diffusers": diffusers}


def with_record(made: dict[str, Any]) -> dict[str, Any]:
    given = {"prompts": made["prompts"], "num_inference_steps": 2, "progress": False}
    return made | {"record": evenkeel.calibrate(made["pipe"], quantized=made["quantized"], **given)}


def with_pictures(made: dict[str, Any]) -> dict[str, Any]:
    """Image to image: a picture and embeddings per prompt."""
    pipe = diffusers.StableDiffusion3Img2ImgPipeline.from_pipe(made["pipe"])
    pipe.set_progress_bar_config(disable=True)
    texts = made["prompts"]
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(texts, texts, texts)
    pictures = [Image.new("RGB", (32, 32), (60 * i, 90, 120)) for i in range(len(texts))]
    more = {"texts": texts, "embeds": embeds, "pooled": pooled, "pictures": pictures}
    return made | {"pipe": pipe, **more}


def with_backends(made: dict[str, Any]) -> dict[str, Any]:
    """Files and folders that the page names, where it is run; and what its blocks are about."""
    network = made["pipe"].transformer
    flux: Any = tiny_pipelines.flux().pipe.transformer
    made["pipe"].save_pretrained("pixart-sigma")
    flux.save_pretrained("flux/transformer")
    write_gguf(flux, "flux1-dev-Q4_0.gguf")
    layer = torch.nn.Linear(32, 32)

    def run(model: Any) -> None:
        """One call of the denoiser."""
        sizes = {"hidden_states": (1, 4, 16, 16), "encoder_hidden_states": (1, 8, 32)}
        model(**{k: torch.zeros(v) for k, v in sizes.items()}, timestep=torch.ones(1),
              added_cond_kwargs={"resolution": None, "aspect_ratio": None})  # fmt: skip

    model = made["quantized"]
    return made | {"model": model, "layer": layer, "run": run, "network": network}


def write_gguf(network: torch.nn.Module, path: str) -> None:
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType.Q4_0
    writer = gguf.GGUFWriter(path, "flux")
    for name, tensor in network.state_dict().items():
        if tensor.ndim == 2 and "blocks" in name:
            packed = gguf.quants.quantize(tensor.numpy(), kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def before(block: str, made: dict[str, Any]) -> None:
    """Blocks that quantize in place get a network of their own; others a file that they read."""
    if "copy.deepcopy(pipe.transformer)" in block:
        evenkeel.remove(made["pipe"])
        made["pipe"].transformer = made["network"]
    if "quanto" in block or "sdnq" in block or "mtq" in block:
        made["model"] = copy.deepcopy(made["network"])
    if "load_comfy" in block:
        from comfy_kitchen.tensor import QuantizedTensor

        from evenkeel.hosts.comfy_checkpoint import write_comfy

        made["pipe"] = tiny_pipelines.flux().pipe
        network = copy.deepcopy(made["pipe"].transformer)
        for name, layer in network.named_modules():
            if "blocks" in name and isinstance(layer, torch.nn.Linear):
                weight = QuantizedTensor.from_float(layer.weight.detach(), "TensorCoreNVFP4Layout")
                layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        write_comfy(dict(network.named_parameters()), "flux1-dev-nvfp4.safetensors")


PIXART, SD3 = tiny_pipelines.pixart_sigma, tiny_pipelines.sd3
MORE: dict[str, tuple[Callable[[], TinyPipeline], Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "backends.md": (PIXART, with_backends),
    "corrections.md": (PIXART, with_record),
    "prompts.md": (SD3, with_pictures),
}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:transformers .* is not tested:UserWarning")  # ModelOpt
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny, more = MORE.get(page.name, (PIXART, dict))
    made = more(whole(tiny()))
    for number, block in enumerate(blocks(page), 1):
        for package in PACKAGES:
            if re.search(rf"(import|from) {package}", block):
                pytest.importorskip(package)
        before(block, made)
        for old, new in SHORTER.items():
            block = re.sub(old, new, block)
        exec(compile(block, f"{page.name}, block {number}", "exec"), made)


def test_pages_are_found() -> None:
    assert {"start.md", "backends.md", "adapters.md"} <= {p.name for p in PAGES}
