"""Recovery adapters that are trained: from the closed form and from zero, kept by held-out samples alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import ALL
from torch import Tensor, nn

import evenkeel
from evenkeel.errors import CalibrationError
from evenkeel.fitting.adapters.fit_adapters import fit_adapters
from evenkeel.fitting.training import train_adapters as module
from evenkeel.fitting.training.adapters_beside import AdaptersBeside, LearnedFactor
from evenkeel.fitting.training.losses import Loss
from evenkeel.fitting.training.same_state import SameState
from evenkeel.fitting.training.step_weights import StepWeighted
from evenkeel.hosts.actuators.beside import attach
from evenkeel.hosts.run import Run
from evenkeel.low_rank.factors import rounded
from evenkeel.quantizers import RoundToNearest, quantize_module

STEPS = 3
SETTINGS: dict[str, Any] = {"rank": 2, "bits": 4}


class Judge:
    """Says in turn what held-out samples would."""

    start = 1.0

    def __init__(self, bound: float) -> None:
        self.bound, self.seen = bound, 0

    def chosen_by(self, denoiser: nn.Module) -> float:
        self.seen += 1
        return float(self.seen)

    def confirmed(self, denoiser: nn.Module) -> tuple[float, float]:
        return self.bound + 1, self.bound


@pytest.fixture(scope="module")
def rig() -> tuple[Any, nn.Module, dict[str, Any]]:
    tiny = ALL["dit"]()
    quantized, _ = quantize_module(tiny.model, RoundToNearest(3, 4, group=16))
    asked = {
        "quantized": quantized,
        "prompts": tiny.prompts,
        "num_inference_steps": STEPS,
        "guidance_scale": tiny.guidance_scale,
        "call": tiny.call,
        "progress": False,
    }
    return tiny.pipe, quantized, asked


@pytest.fixture(scope="module")
def closed(rig: Any) -> Any:
    pipe, _, asked = rig
    return fit_adapters(pipe, **asked, **SETTINGS)[0]


def dense(layers: Any) -> list[Tensor]:
    return [f.dense() for layer in layers for f in (layer.down, layer.up)]


def equal(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(torch.equal, dense(a), dense(b)))


@pytest.mark.parametrize("start", ["closed-form", "zero"])
@pytest.mark.parametrize("bound", [0.5, -0.5], ids=["better", "not better"])
def test_held_out_samples_decide(
    rig: Any, closed: Any, start: Any, bound: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pipe, quantized, asked = rig
    assert closed.layers, "nothing to start from"
    before = {n: t.clone() for n, t in quantized.state_dict().items()}
    monkeypatch.setattr(module, "HeldOut", lambda *_: Judge(bound))
    found, report = evenkeel.train_adapters(
        pipe, **asked, **SETTINGS, start=start, optimizer_steps=6, evaluations=1, rate=0.05
    )
    assert report.confirmed is (bound > 0) and report.optimizer_steps == 6
    if bound < 0:
        assert equal(found.layers, closed.layers if start == "closed-form" else ())
    else:
        assert not equal(found.layers, closed.layers)
        assert [layer.stored_bytes for layer in found.layers] == [
            layer.stored_bytes for layer in closed.layers
        ]
        file = evenkeel.save(found, tmp_path / "trained.safetensors")
        assert equal(evenkeel.load(file).layers, found.layers)
    assert all(torch.equal(t, before[n]) for n, t in quantized.state_dict().items())


def test_the_trained_network_computes_what_the_packed_adapters_do(rig: Any, closed: Any):
    pipe, quantized, asked = rig
    student = AdaptersBeside(quantized, closed.layers, zero=False)
    with torch.no_grad():
        for adapter in student.adapters:
            adapter.up.values.mul_(1.3)
    run = Run(pipe, asked["prompts"], STEPS, guidance_scale=asked["guidance_scale"])
    call = next(SameState(run).epoch(0)).student
    with torch.no_grad():
        found = student.network(*call.arguments, **call.keywords)[0]
    other = AdaptersBeside(quantized, (), zero=False).network
    attach(other, student.packed())
    assert torch.equal(found, call.make(other)[0])
    assert not torch.equal(found, call.make(quantized)[0])


def test_gradients_reach_every_factor_through_rounded_inputs(rig: Any, closed: Any):
    pipe, quantized, asked = rig
    student = AdaptersBeside(quantized, closed.layers, zero=False)
    run = Run(pipe, asked["prompts"], STEPS, guidance_scale=asked["guidance_scale"])
    call = next(SameState(run).epoch(0))
    with torch.enable_grad():
        output = student.network(*call.student.arguments, **call.student.keywords)[0]
        (call.prediction(output) - call.target).square().mean().backward()
    for name, parameter in student.network.named_parameters():
        learned = name.startswith("evenkeel_adapters")
        assert (parameter.grad is not None and bool(parameter.grad.any())) is learned, name


def test_a_learned_factor_is_the_packed_one_with_the_gradient_of_its_values():
    values = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    factor = LearnedFactor(rounded(values, 4))
    with torch.no_grad():
        factor.values.copy_(values)
    out = factor.dense()
    assert torch.equal(out, rounded(values, 4).dense()) and torch.equal(
        out, factor.packed().dense()
    )
    weights = torch.randn(3, 40)
    (out * weights).sum().backward()
    assert torch.equal(factor.values.grad, weights)


def test_the_step_law_weighs_the_outputs(rig: Any):
    pipe, quantized, asked = rig
    run = Run(
        pipe, asked["prompts"], STEPS, guidance_scale=asked["guidance_scale"], quantized=quantized
    )
    source = SameState(run)
    law = torch.as_tensor(run.law(quantized).trajectory[1][-1]).abs() ** 2
    even = Loss()
    loss = StepWeighted(even, run, source.levels, quantized)
    ratios = []
    for call in source.epoch(0):
        output = call.target + 0.1
        ratios.append(loss(call, output) / even(call, output))
    assert torch.stack(ratios).tolist() == pytest.approx((law / law.mean()).tolist(), rel=1e-5)


def test_choices_that_do_not_exist_are_refused(rig: Any):
    pipe, _, asked = rig
    for wrong in ({"start": "random"}, {"weighting": "uniform"}):
        with pytest.raises(CalibrationError, match="start is"):
            evenkeel.train_adapters(pipe, **asked, **wrong)
