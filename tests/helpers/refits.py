"""A tiny pipeline with quantized layers that have branches, its refit, and what its denoiser is given."""

import torch
from tiny_pipelines import ALL

from evenkeel.fitting.refit.refit_branches import refit_branches
from evenkeel.hosts.pipeline.pipelines import denoiser_swapped
from evenkeel.quantizers import QuantizerSpec, quantize_module

STEPS = 2
SPEC = QuantizerSpec(3, 4, group=16, rank=4)
TRAIN = ("a cat on a mat", "two dogs in the rain", "red house", "the sea at night", "old tree", "7")
TEST = ("a green lamp", "snow on a hill", "three birds")


def make(name, spec=SPEC):
    tiny = ALL[name]()
    quantized, report = quantize_module(tiny.model, spec)
    return tiny, quantized, report


def refit(tiny, quantized, prompts=TRAIN, **extra):
    settled = {"num_inference_steps": STEPS, "guidance_scale": tiny.guidance_scale, "batch_size": 6}
    call = {k: v for k, v in tiny.call.items() if k != "output_type"}
    return refit_branches(
        tiny.pipe,
        quantized=quantized,
        prompts=prompts,
        call=call,
        progress=False,
        **{**settled, **extra},
    )


def inputs_of(tiny, model, prompts):
    """Every call of ``model`` while the pipeline samples with it."""
    calls = []
    hook = model.register_forward_pre_hook(
        lambda m, a, k: calls.append((a, dict(k))), with_kwargs=True
    )
    generators = [torch.Generator().manual_seed(900 + i) for i in range(len(prompts))]
    settled = {"num_inference_steps": STEPS, "guidance_scale": tiny.guidance_scale}
    with denoiser_swapped(tiny.pipe, model), torch.no_grad():
        out = tiny.pipe(
            list(prompts), **tiny.call, **settled, generator=generators, return_dict=False
        )[0]
    hook.remove()
    return calls, out
