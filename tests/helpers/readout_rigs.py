"""What the tests of readout share."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats
import torch
from tiny_pipelines import ALL, TinyPipeline, generate
from torch import Tensor, nn

import evenkeel
from evenkeel.corrections import Readout
from evenkeel.fitting import fit_readout
from evenkeel.quantizers import QuantizerSpec, quantize_module

UNSEEN = range(100, 108)  # prompts and seeds that no fit sees


def prompts_of(tiny: TinyPipeline, which: Sequence[int]) -> list[Any]:
    return [i if isinstance(tiny.prompts[0], int) else f"prompt number {i}" for i in which]


def fitted(tiny: TinyPipeline, reference: nn.Module, quantized: nn.Module, **changes: Any) -> Any:
    """``fit_readout`` with the full-precision denoiser in the pipeline."""
    options: dict[str, Any] = {
        "prompts": prompts_of(tiny, range(8)),
        "num_inference_steps": 4,
        "guidance_scale": tiny.guidance_scale,
        "call": {k: v for k, v in tiny.call.items() if k != "output_type"},
        "batch_size": 4,
        "progress": False,
        **changes,
    }
    before = tiny.model
    setattr(tiny.pipe, tiny.denoiser, reference)
    try:
        return fit_readout(tiny.pipe, quantized=quantized, **options)
    finally:
        setattr(tiny.pipe, tiny.denoiser, before)


def sampled(tiny: TinyPipeline, steps: int = 4, which: Sequence[int] = UNSEEN, **o: Any) -> Tensor:
    """Final latents of unseen prompts, also of DiT, whose pipeline only gives images."""
    seen: list[Tensor] = []
    hook = tiny.pipe.vae.register_forward_pre_hook(lambda m, a: None)
    if tiny.name == "dit":
        hook = tiny.pipe.vae.post_quant_conv.register_forward_pre_hook(
            lambda m, a: seen.append(a[0].clone())
        )
    given = {"seeds": list(which), "prompts": prompts_of(tiny, which), **o}
    out = generate(tiny, steps=steps, **given)
    hook.remove()
    return seen[0] if seen else out


def squared(a: Tensor, b: Tensor) -> Tensor:
    """(prompts,) mean squared difference."""
    return (a.double() - b.double()).pow(2).flatten(1).mean(1)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in module.state_dict().items()}


def unchanged(module: nn.Module, before: dict[str, Tensor]) -> bool:
    now = module.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[n], before[n]) for n in before)


def is_clean(module: nn.Module) -> bool:
    """No hook of ours and no replaced forward."""
    return "forward" not in vars(module) and not any(
        m._forward_hooks or m._forward_pre_hooks for m in module.modules()
    )


@dataclass
class Rig:
    """A tiny pipeline with its quantized denoiser in place, and a readout for it."""

    tiny: TinyPipeline
    reference: nn.Module
    quantized: nn.Module
    readout: Readout

    @property
    def pipe(self) -> Any:
        return self.tiny.pipe

    def put(self, module: nn.Module) -> None:
        setattr(self.pipe, self.tiny.denoiser, module)

    def refit(self, **changes: Any) -> Readout:
        found: Readout = fitted(self.tiny, self.reference, self.quantized, **changes)
        return found

    @functools.cached_property
    def plain(self) -> Tensor:
        return sampled(self.tiny)

    @functools.cached_property
    def wanted(self) -> Tensor:
        self.put(self.reference)
        out = sampled(self.tiny)
        self.put(self.quantized)
        return out

    @functools.cached_property
    def corrected(self) -> Tensor:
        with evenkeel.applied(self.pipe, self.readout):
            return sampled(self.tiny)


@functools.cache
def shared_rig(name: str) -> Rig:
    tiny = ALL[name]()
    reference = tiny.model
    quantized = quantize_module(reference, QuantizerSpec.parse("w3a4-g16"))[0]
    rig = Rig(tiny, reference, quantized, fitted(tiny, reference, quantized))
    rig.put(quantized)
    return rig


def lent(name: str) -> Iterator[Rig]:
    """The shared rig of a pipeline; afterwards nothing is left on it."""
    rig = shared_rig(name)
    scheduler, before = rig.pipe.scheduler, state_of(rig.quantized)
    yield rig
    evenkeel.remove(rig.pipe)
    rig.pipe.scheduler = scheduler
    rig.put(rig.quantized)
    evenkeel.remove(rig.pipe)
    assert is_clean(rig.quantized) and is_clean(rig.reference)
    assert unchanged(rig.quantized, before)


def lower_bound(gain: Tensor) -> float:
    """One-sided 95 % Student bound of a mean over prompts."""
    n = len(gain)
    return float(gain.mean()) - float(scipy.stats.t.ppf(0.95, n - 1) * gain.std() / np.sqrt(n))
