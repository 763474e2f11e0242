"""An applied readout"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from readout_rigs import (
    UNSEEN,
    Rig,
    fitted,
    is_clean,
    lower_bound,
    sampled,
    shared_rig,
    squared,
    state_of,
    unchanged,
)
from tiny_pipelines import ALL
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import evenkeel
from evenkeel.corrections import Readout
from evenkeel.errors import CalibrationError, Incompatible
from evenkeel.hosts.actuators.heads import find_head, layer_of
from evenkeel.hosts.scheduler.interception import installed
from evenkeel.quantizers import QuantizerSpec, quantize_module

pytestmark = pytest.mark.usefixtures("no_thread_survives")


# ---- application


@pytest.mark.parametrize("order", ["apply, compile", "compile, apply"])
@pytest.mark.parametrize("name", ["pixart_sigma", "wan"])
def test_a_compiled_denoiser_is_one_graph_for_all_steps(name: str, order: str) -> None:
    rig = shared_rig(name)
    plain, corrected = rig.plain, rig.corrected
    torch.compiler.reset()
    counter = CompileCounter()
    actions: dict[str, Callable[[], None]] = {
        "apply": lambda: evenkeel.apply(rig.pipe, rig.readout),
        "compile": lambda: rig.put(torch.compile(rig.quantized, backend=counter)),
    }
    try:
        for action in order.split(", "):
            actions[action]()
        torch.testing.assert_close(sampled(rig.tiny), corrected, rtol=1e-4, atol=1e-4)
        assert counter.frame_count == 1
        sampled(rig.tiny)
        evenkeel.remove(rig.pipe)
        torch.testing.assert_close(sampled(rig.tiny), plain, rtol=1e-4, atol=1e-4)
        assert counter.frame_count == 2  # without what is added beside the head
    finally:
        evenkeel.remove(rig.pipe)
        rig.put(rig.quantized)
        torch.compiler.reset()


def quantized_head_rig(name: str) -> Rig:
    """As a quantization backend does it: the head, too, is a layer whose weight is not its own."""
    tiny = ALL[name]()
    reference = tiny.model
    quantized: Any = quantize_module(reference, QuantizerSpec.parse("w3a4-g16"))[0]
    spec = QuantizerSpec.parse("w8a8-g16")
    if name == "sdxl":
        quantized.conv_out = spec.layer(quantized.conv_out)
    else:
        quantized.proj_out = spec.layer(quantized.proj_out)
    rig = Rig(tiny, reference, quantized, fitted(tiny, reference, quantized))
    rig.put(quantized)
    return rig


@pytest.mark.parametrize("name", ["pixart_sigma", "sdxl", "wan"])
def test_a_quantized_head_gets_the_correction_beside_it(name: str) -> None:
    rig = quantized_head_rig(name)
    before = state_of(rig.quantized)
    change = squared(rig.plain, rig.wanted) - squared(rig.corrected, rig.wanted)
    assert rig.readout.accepted > 0 and lower_bound(change) > 0
    assert unchanged(rig.quantized, before) and is_clean(rig.quantized)
    assert torch.equal(sampled(rig.tiny), rig.plain)


def test_a_quantized_head_that_was_compiled_before_is_corrected_all_the_same() -> None:
    rig = quantized_head_rig("pixart_sigma")
    corrected, plain = rig.corrected, rig.plain
    torch.compiler.reset()
    counter = CompileCounter()
    rig.put(torch.compile(rig.quantized, backend=counter))
    torch.testing.assert_close(sampled(rig.tiny), plain, rtol=1e-4, atol=1e-4)
    evenkeel.apply(rig.pipe, rig.readout)
    torch.testing.assert_close(sampled(rig.tiny), corrected, rtol=1e-4, atol=1e-4)
    graphs = counter.frame_count
    sampled(rig.tiny)
    assert counter.frame_count == graphs == 2  # one without, one with the correction
    evenkeel.remove(rig.pipe)
    torch.testing.assert_close(sampled(rig.tiny), plain, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


def test_guidance_branches_one_after_the_other_have_heads_of_their_own(wan: Rig) -> None:
    table = wan.readout.table
    assert table.branches == 2 and len(wan.readout.fits) == 8
    weight, _ = table.entry(0)
    assert not torch.equal(weight[0], weight[1])
    layer: Any = layer_of(wan.quantized, find_head(wan.quantized))
    seen: list[tuple[Tensor, Tensor]] = []
    evenkeel.apply(wan.pipe, wan.readout)
    hook = layer.register_forward_hook(lambda m, a, o: seen.append((a[0], o - m.forward(a[0]))))
    sampled(wan.tiny, which=UNSEEN[:1])
    hook.remove()
    assert len(seen) == 8
    for call, (features, found) in enumerate(seen):
        change, constant = (part[call % 2] for part in table.entry(call // 2))
        torch.testing.assert_close(found, features @ change + constant, rtol=1e-3, atol=1e-4)


def test_copies_of_the_scheduler_sample_without_touching_the_denoiser(pixart: Rig) -> None:
    evenkeel.apply(pixart.pipe, pixart.readout)
    before = state_of(pixart.quantized)
    for twin in (
        copy.deepcopy(pixart.pipe.scheduler),
        pickle.loads(pickle.dumps(pixart.pipe.scheduler)),
    ):
        twin.set_timesteps(3)
        ones = torch.ones(1, 4, 8, 8)
        with pytest.warns(UserWarning, match="another denoiser"):
            sample = twin.step(ones, twin.timesteps[0], ones).prev_sample
        for timestep in twin.timesteps[1:]:  # said once
            sample = twin.step(ones, timestep, sample).prev_sample
        assert unchanged(pixart.quantized, before)
    assert torch.equal(sampled(pixart.tiny), pixart.corrected)


@pytest.mark.parametrize("name", ["pixart_sigma", "quantized head"])
def test_between_runs_the_denoiser_is_itself(name: str) -> None:
    rig = quantized_head_rig("pixart_sigma") if name == "quantized head" else shared_rig(name)
    before = state_of(rig.quantized)
    plain, corrected = rig.plain, rig.corrected
    evenkeel.apply(rig.pipe, rig.readout)
    assert torch.equal(sampled(rig.tiny), corrected)
    assert unchanged(rig.quantized, before)  # may be saved, copied and recognised now
    twin = replace(rig.tiny, pipe=copy.deepcopy(rig.pipe))
    evenkeel.remove(rig.pipe)
    evenkeel.remove(twin.pipe)
    assert torch.equal(sampled(twin), plain) and torch.equal(sampled(rig.tiny), plain)


def test_a_saved_scheduler_is_plain_diffusers(pixart: Rig, tmp_path: Path) -> None:
    evenkeel.apply(pixart.pipe, pixart.readout)
    pixart.pipe.scheduler.save_pretrained(tmp_path)
    assert "evenkeel" not in (tmp_path / "scheduler_config.json").read_text()
    loaded = diffusers.DPMSolverMultistepScheduler.from_pretrained(tmp_path)
    assert type(loaded) is diffusers.DPMSolverMultistepScheduler


def offloaded(kind: str, pipe: Any) -> None:
    if kind == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    else:  # what enable_sequential_cpu_offload does to every component; it refuses the CPU
        accelerate.cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
        assert pipe.transformer.proj_out.weight.device.type == "meta"


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_offloading_works_with_a_readout(kind: str, order: str) -> None:
    tiny = ALL["pixart_sigma"]()
    rig = shared_rig("pixart_sigma")
    quantized = copy.deepcopy(rig.quantized)
    setattr(tiny.pipe, tiny.denoiser, quantized)
    if order == "before":
        offloaded(kind, tiny.pipe)
    evenkeel.apply(tiny.pipe, rig.readout, allow=("denoiser",))  # no fingerprint of meta tensors
    if order == "after":
        offloaded(kind, tiny.pipe)
    for _ in range(2):
        torch.testing.assert_close(sampled(tiny), rig.corrected, rtol=1e-3, atol=1e-3)
    evenkeel.remove(tiny.pipe)
    torch.testing.assert_close(sampled(tiny), rig.plain, rtol=1e-3, atol=1e-3)


def test_moving_to_another_dtype_keeps_the_correction(flux: Rig) -> None:
    found, own = {}, {}
    for order in ("apply, move", "move, apply"):
        twin = replace(flux.tiny, pipe=copy.deepcopy(flux.pipe))
        for action in order.split(", "):
            if action == "move":
                twin.pipe.to(torch.float64)
            else:
                evenkeel.apply(twin.pipe, flux.readout, allow=("denoiser",))
        found[order] = sampled(twin)
        evenkeel.remove(twin.pipe)
        own[order] = sampled(twin)
    a, b = found.values()
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    c, d = own.values()
    assert torch.equal(c, d) and not torch.equal(a, c)


def test_another_guidance_scale_is_fine_for_heads_and_refused_for_drift(flux: Rig) -> None:
    evenkeel.apply(flux.pipe, flux.readout, guidance_scale=1.5)
    sampled(flux.tiny, guidance_scale=1.5)
    drifting = flux.readout.with_drift()
    assert drifting.name == "readout+exact-drift"
    evenkeel.apply(flux.pipe, drifting)
    assert torch.isfinite(sampled(flux.tiny)).all()
    with pytest.raises(Incompatible, match=r"calibrated at guidance_scale=3\.5"):
        sampled(flux.tiny, guidance_scale=1.5)
    with pytest.raises(Incompatible, match=r"calibrated at guidance_scale=3\.5"):
        evenkeel.apply(flux.pipe, drifting, guidance_scale=1.5)


def test_drift_needs_evidence_and_acts_on_top_of_the_heads(pixart: Rig) -> None:
    with pytest.raises(CalibrationError, match="holds no evidence"):
        replace(pixart.readout, evidence=None).with_drift()
    drifting = pixart.readout.with_drift()
    with evenkeel.applied(pixart.pipe, drifting):
        found = sampled(pixart.tiny)
        assert "readout+exact-drift" in str(evenkeel.summary(pixart.pipe))
    assert torch.equal(sampled(pixart.tiny), pixart.plain)
    assert squared(found, pixart.wanted).mean() < squared(pixart.plain, pixart.wanted).mean()


def test_a_wrong_denoiser_or_scheduler_is_refused_and_nothing_is_applied(pixart: Rig) -> None:
    pixart.put(pixart.reference)
    with pytest.raises(Incompatible, match="full-precision one"):
        evenkeel.apply(pixart.pipe, pixart.readout)
    other = quantize_module(pixart.reference, QuantizerSpec.parse("w4a8-g16"))[0]
    pixart.put(other)
    with pytest.raises(Incompatible, match="not the one the record was made for"):
        evenkeel.apply(pixart.pipe, pixart.readout)
    pixart.put(pixart.quantized)
    pixart.pipe.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(Incompatible, match="DPMSolverMultistepScheduler"):
        evenkeel.apply(pixart.pipe, pixart.readout)
    assert not installed(pixart.pipe.scheduler) and is_clean(pixart.quantized)


def test_a_table_of_another_head_is_refused(flux: Rig, pixart: Rig) -> None:
    foreign = replace(pixart.readout, provenance=flux.readout.provenance)
    with pytest.raises(Incompatible, match="changes a head of"):
        evenkeel.apply(flux.pipe, foreign)
    assert is_clean(flux.quantized) and not installed(flux.pipe.scheduler)


def interrupted(rig: Rig, after: int, error: BaseException) -> None:
    """A run that ends in the middle."""
    calls: list[int] = []

    def stop(*args: Any) -> None:
        calls.append(1)
        if len(calls) > after:
            raise error

    hook = rig.quantized.register_forward_pre_hook(stop)
    with pytest.raises(type(error)):
        sampled(rig.tiny)
    hook.remove()


def test_an_interrupted_run_leaves_the_denoiser_and_the_next_run_as_they_were(pixart: Rig) -> None:
    before = state_of(pixart.quantized)
    evenkeel.apply(pixart.pipe, pixart.readout)
    interrupted(pixart, 2, KeyboardInterrupt())
    assert unchanged(pixart.quantized, before)
    assert torch.equal(sampled(pixart.tiny), pixart.corrected)
    interrupted(pixart, 2, KeyboardInterrupt())
    evenkeel.apply(pixart.pipe, pixart.readout)  # recognises the denoiser all the same
    interrupted(pixart, 2, KeyboardInterrupt())
    evenkeel.remove(pixart.pipe)
    assert unchanged(pixart.quantized, before)


@pytest.mark.parametrize("after", [9, 2])
def test_replacing_the_scheduler_warns_and_leaves_no_head_behind(pixart: Rig, after: int) -> None:
    evenkeel.apply(pixart.pipe, pixart.readout)
    {9: lambda: sampled(pixart.tiny), 2: lambda: interrupted(pixart, 2, KeyboardInterrupt())}[
        after
    ]()
    scheduler = pixart.pipe.scheduler
    pixart.pipe.scheduler = type(scheduler).from_config(scheduler.config)
    with pytest.warns(UserWarning, match="replaced after evenkeel.apply"):
        found = sampled(pixart.tiny)
    assert torch.equal(found, pixart.plain)
    evenkeel.remove(pixart.pipe)
    assert torch.equal(sampled(pixart.tiny), pixart.plain)


def test_a_context_restores_the_readout_before(pixart: Rig, shared_change: Readout) -> None:
    evenkeel.apply(pixart.pipe, pixart.readout)
    with evenkeel.applied(pixart.pipe, shared_change):
        inside = sampled(pixart.tiny)
    assert torch.equal(sampled(pixart.tiny), pixart.corrected)
    assert not torch.equal(inside, pixart.corrected)
    assert evenkeel.summary(pixart.pipe).correction == "readout"
    assert "per-step readout of proj_out" in str(evenkeel.summary(pixart.pipe))


def test_removing_through_a_pipeline_that_shares_the_scheduler(pixart: Rig) -> None:
    before = state_of(pixart.quantized)
    evenkeel.apply(pixart.pipe, pixart.readout)
    interrupted(pixart, 2, KeyboardInterrupt())
    other = copy.copy(pixart.pipe)
    vars(other).update({k: v for k, v in vars(pixart.pipe).items() if "evenkeel" not in k})
    for key in [k for k in vars(other) if "evenkeel" in k]:
        del vars(other)[key]
    evenkeel.remove(other)
    assert unchanged(pixart.quantized, before)
