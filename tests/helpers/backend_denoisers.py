"""The embedded pipeline with denoisers of every backend, each made once."""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Any

import pytest
import torch
from quantized_by import BACKENDS
from torch import Tensor, nn

from evenkeel import Record, calibrate, fit_readout, zoo
from evenkeel.hosts.pipeline.pipelines import denoiser_swapped, run_pipeline
from evenkeel.zoo.evaluation import sample_prompts

STEPS, GUIDANCE = 3, 4.5
PROMPTS = sample_prompts(4, 0)
COARSE = ("torchao int4", "torchao fake w3a4", "bitsandbytes nf4", "bitsandbytes fp4", "gguf Q4_0")
COARSE += ("quanto qint4", "sdnq int4", "sdnq uint4 svd", "modelopt w3a4")
COARSE += ("comfy-kitchen nvfp4", "comfy-kitchen w4a8")

#: What the library says of each.
TEXTS = {
    "torchao int8": "torchao:int8 x 86, plain x 1",
    "torchao int8 dynamic": "torchao:int8-a8 x 86, plain x 1",
    "torchao int4": "torchao:int4-g16 x 86, plain x 1",
    "torchao fake w3a4": "torchao:fake-int3-g16-a4 x 86, plain x 1",
    "bitsandbytes int8": "bitsandbytes:int8 x 86, plain x 1",
    "bitsandbytes nf4": "bitsandbytes:nf4-g32 x 86, plain x 1",
    "bitsandbytes fp4": "bitsandbytes:fp4-g32 x 86, plain x 1",
    "gguf Q8_0": "gguf:Q8_0 x 86, plain x 1",
    "gguf Q5_0": "gguf:Q5_0 x 86, plain x 1",
    "gguf Q4_0": "gguf:Q4_0 x 86, plain x 1",
    "quanto qint8": "quanto:qint8 x 87",
    "quanto qint4": "quanto:qint4 x 78, quanto:qint4-g128 x 9",
    "sdnq int8": "sdnq:int8 x 86, plain x 1",
    "sdnq int4": "sdnq:int4-g16 x 86, plain x 1",
    "sdnq uint4 svd": "sdnq:uint4-g16-r4 x 86, plain x 1",
    "modelopt w3a4": "modelopt:int3-g16-a4 x 87",
    "comfy-kitchen int8": "comfy-kitchen:int8_tensorwise-a8 x 86, plain x 1",
    "comfy-kitchen int8 rotated": "comfy-kitchen:int8_tensorwise-rotated-a8 x 86, plain x 1",
    "comfy-kitchen fp8": "comfy-kitchen:float8_e4m3fn x 86, plain x 1",
    "comfy-kitchen nvfp4": "comfy-kitchen:nvfp4 x 86, plain x 1",
    "comfy-kitchen mxfp8": "comfy-kitchen:mxfp8 x 86, plain x 1",
    "comfy-kitchen w4a8": "comfy-kitchen:asym_w4a8_int8-g16-a8 x 86, plain x 1",
}

logging.getLogger("bitsandbytes.autograd._functions").setLevel("ERROR")  # a line per layer and call


@functools.cache
def pipeline() -> Any:
    pipe = zoo.load("pixart-sigma")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def called(model: nn.Module) -> Tensor:
    """One call of the embedded pipeline's denoiser, always with the same input."""
    g = torch.Generator().manual_seed(5)
    states = {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=g),
        "timestep": torch.tensor([9, 7]),
    }
    text = {"encoder_hidden_states": torch.randn(2, 8, 96, generator=g)}
    with torch.no_grad():
        out: Tensor = model(**states, **text, added_cond_kwargs={}, return_dict=False)[0]
    return out


def quantized(name: str, **options: Any) -> nn.Module:
    """The embedded pipeline's denoiser; the test is skipped where the backend is missing."""
    package, build = BACKENDS[name]
    needs(package)
    if package == "modelopt":
        options["run"] = called
    return build(pipeline().transformer, **options)


def needs(package: str) -> Any:
    return pytest.importorskip(
        package, reason=f"{package} is not installed: pip install 'evenkeel[backends]'"
    )


def is_installed(package: str) -> bool:
    top = package.split(".")[0]
    return all(importlib.util.find_spec(part) is not None for part in (top, package))


shared = functools.cache(quantized)
every = pytest.mark.parametrize("name", BACKENDS)


def sampled(model: nn.Module, seeds: range = range(2)) -> Tensor:
    """Latents of calibrated prompts, from the noise they were calibrated with."""
    with denoiser_swapped(pipeline(), model):
        out: Tensor = run_pipeline(
            pipeline(),
            PROMPTS[: len(seeds)],
            seeds,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            output_type="latent",
            call={},
        )
    return out


def measured(model: nn.Module, **options: Any) -> Record:
    settings: dict[str, Any] = {"prompts": PROMPTS, "num_inference_steps": STEPS, "batch_size": 4}
    settings |= {"guidance_scale": GUIDANCE, "progress": False, **options}
    return calibrate(pipeline(), quantized=model, **settings)


def fitted(model: nn.Module, **options: Any) -> Any:
    settings: dict[str, Any] = {"prompts": PROMPTS, "num_inference_steps": STEPS, "batch_size": 4}
    settings |= {"guidance_scale": GUIDANCE, "progress": False, **options}
    return fit_readout(pipeline(), quantized=model, **settings)
