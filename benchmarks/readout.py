"""What a readout costs in use: a corrected call of the denoiser against a plain one.

One iteration of a sampling loop (the denoiser's call and ``scheduler.step``) with a head per step, put
in place by a real ``HeadSwitch``, against the same without, at the widths of PixArt and DiT-XL (1,152)
and of FLUX (3,072), 1,024 tokens. The models have one or two blocks: the fewer, the larger the head's
share. What is added is also timed by itself, because the noise of whole calls hides it.
Run: OMP_NUM_THREADS=1 python benchmarks/readout.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from timing import Spread, interleaved, ratio, report
from torch import nn

from evenkeel.corrections.head_table import HeadTable
from evenkeel.hosts.actuators.head_switch import HeadSwitch
from evenkeel.hosts.scheduler.interception import install
from evenkeel.hosts.scheduler.probing import probe_scheduler
from evenkeel.quantizers.methods.spec import QuantizerSpec

STEPS, TOKENS, TEXT = 20, 1024, 16
CALL_REPEATS, SELECT_REPEATS = {"PixArt": 15, "FLUX": 9}, 40


def pixart() -> tuple[nn.Module, Any, dict[str, Any]]:
    """Two of 28 blocks."""
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

    denoiser = PixArtTransformer2DModel(num_layers=2, sample_size=64, caption_channels=4096)
    inputs = {
        "hidden_states": torch.randn(1, 4, 64, 64),
        "encoder_hidden_states": torch.randn(1, TEXT, 4096),
        "timestep": torch.tensor([500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return denoiser, DPMSolverMultistepScheduler(), inputs


def flux() -> tuple[nn.Module, Any, dict[str, Any]]:
    """One of 57 blocks."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    denoiser = FluxTransformer2DModel(num_layers=0, num_single_layers=1)
    inputs = {
        "hidden_states": torch.randn(1, TOKENS, 64),
        "encoder_hidden_states": torch.randn(1, TEXT, 4096),
        "pooled_projections": torch.randn(1, 768),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(TOKENS, 3),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    return denoiser, FlowMatchEulerDiscreteScheduler(shift=3.0), inputs


MODELS = {"PixArt": (pixart, 1152, 2), "FLUX": (flux, 3072, 1)}


def random_table(scheduler: Any, features: int, targets: int) -> HeadTable:
    """A head per step of this schedule, of the size that fits give."""
    law = probe_scheduler(scheduler)
    weight = 1e-3 * torch.randn(law.steps, 1, features, targets)
    constant = 1e-3 * torch.randn(law.steps, 1, targets)
    active = torch.ones(law.steps, 1, dtype=torch.bool)
    return HeadTable.of(law.alpha[:-1], law.sigma[:-1], weight, constant, active)


def ready(scheduler: Any) -> Any:
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(STEPS)
    return scheduler


def with_own_head(denoiser: nn.Module, head: nn.Module) -> Any:
    """The same denoiser around another head; every other weight is shared."""
    shared = {id(t): t for t in denoiser.parameters()}
    other = copy.deepcopy(denoiser, shared)
    other.proj_out = copy.deepcopy(head)
    return other


class Loop:
    """A sampling loop, one iteration at a time; runs follow each other without end."""

    def __init__(self, denoiser: Any, scheduler: Any, inputs: dict[str, Any]) -> None:
        self.denoiser, self.scheduler, self.inputs = denoiser, scheduler, inputs
        self.switch: HeadSwitch | None = None
        self.output = torch.zeros(())
        self._next = STEPS

    def correct(self, table: HeadTable) -> Loop:
        """From now on with a head per step."""
        self.switch = HeadSwitch(table, self.denoiser, "proj_out")
        self.switch.attach()
        install(self.scheduler, self.switch)
        return self

    def __call__(self) -> Callable[[], None]:
        """Begin a run if one is over; the iteration remains to be done."""
        if self._next == STEPS:
            self.scheduler.set_timesteps(STEPS)
            self._next = 0
        return self._iterate

    @torch.no_grad()
    def _iterate(self) -> None:
        sample = self.inputs["hidden_states"]
        output = self.denoiser(**self.inputs, return_dict=False)[0]
        t = self.scheduler.timesteps[self._next]
        self.scheduler.step(output[:, : sample.shape[1]], t, sample, return_dict=False)
        self.output = output
        self._next += 1


def measure_call(name: str) -> None:
    """The corrected iteration against the plain one: head overwritten, and change beside it."""
    make, width, blocks = MODELS[name]
    torch.manual_seed(0)
    denoiser, scheduler, inputs = make()
    denoiser.eval().requires_grad_(False)
    scheduler = ready(scheduler)
    head: Any = denoiser.get_submodule("proj_out")
    quantized = QuantizerSpec(4, 8).layer(head)
    table = random_table(scheduler, head.in_features, head.out_features)
    heads = {"plain": head, "corrected": head, "plain beside": quantized, "beside": quantized}
    loops = {
        n: Loop(with_own_head(denoiser, h), copy.deepcopy(scheduler), inputs)
        for n, h in heads.items()
    }
    for n in ("corrected", "beside"):
        loops[n].correct(table)
    laps = interleaved(loops, repeats=CALL_REPEATS[name], warmup=1)
    for n, base in (("corrected", "plain"), ("beside", "plain beside")):
        assert not torch.equal(loops[n].output, loops[base].output)
    ratios = {
        "corrected": ratio(laps, "corrected", "plain"),
        "beside": ratio(laps, "beside", "plain beside"),
    }
    plain = Spread.of(laps["plain"])
    report(
        {
            "benchmark": "readout",
            "case": "call",
            "model": name,
            "width": width,
            "blocks": blocks,
            "tokens": TOKENS,
            "plain_ms": plain.as_dict(1),
            **{f"{n}_over_plain": r.as_dict() for n, r in ratios.items()},
        },
        f"{name}, {blocks} block(s), width {width}: corrected {ratios['corrected']} x plain; beside "
        f"a quantized head {ratios['beside']} x plain; plain {plain.median:.0f} ms",
    )


def measure_select(name: str) -> None:
    """What is added, by itself: ms per step, where the call's own noise hides it."""
    make, width, _ = MODELS[name]
    torch.manual_seed(0)
    denoiser, scheduler, inputs = make()
    scheduler = ready(scheduler)
    head: Any = denoiser.get_submodule("proj_out")
    h = torch.randn(1, TOKENS, head.in_features)
    quantized = with_own_head(denoiser, QuantizerSpec(4, 8).layer(head))
    table = random_table(scheduler, head.in_features, head.out_features)
    later, beside = Loop(denoiser, scheduler, inputs), Loop(quantized, ready(scheduler), inputs)
    for loop in (later, beside):
        loop.correct(table).scheduler.set_timesteps(STEPS)

    def selections(switch: Any, new: bool) -> Callable[[], None]:
        if new:
            switch._heads.clear()  # as at the first run, or after another schedule
        switch.begin(later.scheduler)
        called = [{**inputs, "timestep": t} for t in later.scheduler.timesteps]

        def work() -> None:
            for given in called:
                switch._called(denoiser, (), given)
                switch._put(None)

        return work

    @torch.no_grad()
    def heads(layer: Any) -> None:
        for _ in range(STEPS):
            layer(h)

    kept: Any = QuantizerSpec(4, 8).layer(head)
    works: Mapping[str, Callable[[], Callable[[], object]]] = {
        "first run": partial(selections, later.switch, True),
        "later runs": partial(selections, later.switch, False),
        "head": lambda: partial(heads, kept),
        "head and beside": lambda: partial(heads, quantized.proj_out),
    }
    laps = interleaved(works, repeats=SELECT_REPEATS)
    ms = {n: Spread.of([t / STEPS for t in laps[n]]) for n in ("first run", "later runs")}
    pairs = zip(laps["head and beside"], laps["head"], strict=True)
    ms["beside"] = Spread.of([(a - b) / STEPS for a, b in pairs])
    report(
        {
            "benchmark": "readout",
            "case": "select",
            "width": width,
            "outputs": head.out_features,
            **{f"{n.replace(' ', '_')}_ms": s.as_dict() for n, s in ms.items()},
        },
        f"{name}: added ms per step: " + ", ".join(f"{n} {s}" for n, s in ms.items()),
    )


def main() -> None:
    torch.set_num_threads(1)
    for name in MODELS:
        measure_select(name)
        measure_call(name)


if __name__ == "__main__":
    main()
