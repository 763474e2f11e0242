"""QNCD in real pipelines"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from qncd_hosts import (
    EVERY_OTHER,
    Host,
    Linear,
    euler,
    law_of,
    requery_of,
    states,
)
from tiny_pipelines import ALL, TinyPipeline, generate
from torch import Tensor, nn

import evenkeel
from evenkeel.corrections.composite import Composite
from evenkeel.corrections.epsilon_scaling import EpsilonScaling
from evenkeel.corrections.head_table import HeadTable
from evenkeel.corrections.qncd import QNCD
from evenkeel.errors import (
    Incompatible,
)
from evenkeel.hosts.actuators.correcting import interceptors_of
from evenkeel.hosts.actuators.head_switch import HeadSwitch
from evenkeel.hosts.actuators.heads import find_head
from evenkeel.hosts.actuators.step_change import ImageNoise
from evenkeel.hosts.pipeline.strand import Finished, Strand
from evenkeel.hosts.scheduler.groups import Group
from evenkeel.hosts.scheduler.interception import Interceptor, groups_of, install, install_groups


class Calls:
    """Counts forward passes, also those that run no hooks of the denoiser itself."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.rows: list[int] = []
        inner = next(m for m in denoiser.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
        self.handle = inner.register_forward_hook(lambda m, a, o: self.rows.append(len(a[0])))


# Calls per step: SDXL, SD3, DiT and PixArt put both guidance branches into one, Wan makes two.
PIPELINES = {"sdxl": 1, "sd3": 1, "dit": 1, "flux": 1, "pixart_sigma": 1, "sana": 1, "wan": 2}


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_real_pipelines_make_one_more_call_per_refresh_and_branch(name: str) -> None:
    tiny = ALL[name]()
    plain = generate(tiny, steps=4)
    evenkeel.apply(tiny.pipe, EVERY_OTHER)
    calls = Calls(tiny.model)
    corrected = generate(tiny, steps=4)
    calls.handle.remove()
    plan = evenkeel.summary(tiny.pipe).plan
    assert plan is not None and plan.refresh is not None
    refreshes = int(plan.refresh.active.sum())
    assert refreshes in (1, 2)
    assert len(calls.rows) == PIPELINES[name] * (plan.law.steps + refreshes)
    assert len(set(calls.rows)) == 1
    assert torch.isfinite(corrected).all() and not torch.equal(corrected, plain)
    assert torch.equal(generate(tiny, steps=4), corrected)
    evenkeel.remove(tiny.pipe)
    assert torch.equal(generate(tiny, steps=4), plain)
    assert not tiny.model._forward_hooks and not tiny.model._forward_pre_hooks


def test_a_guided_pipeline_combines_the_second_answers_with_its_scale(sdxl: TinyPipeline) -> None:
    """Taken apart with nothing of ours: the calls are seen inside, guidance is applied here."""
    seen: list[Tensor] = []
    last = sdxl.model.conv_out.register_forward_hook(lambda m, a, o: seen.append(o.detach()))
    evenkeel.apply(sdxl.pipe, QNCD(interval=10))
    generate(sdxl, steps=8, guidance_scale=4.0)
    last.remove()
    assert len(seen) == 9
    uncond, cond = seen[7].chunk(2)  # steps 0 to 6, then the second call of step 6
    combined = uncond + 4.0 * (cond - uncond)
    asked = requery_of(sdxl.pipe).mu
    assert asked is not None
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    n = ImageNoise(start * sdxl.pipe.scheduler.init_noise_sigma, 0).draw(start, uniform=False)
    assert float(asked) == pytest.approx(float((combined - n).mean()), abs=1e-5)
    wrong = uncond + 4.5 * (cond - uncond)
    assert float(asked) != pytest.approx(float((wrong - n).mean()), abs=1e-5)


def test_per_image_results_do_not_depend_on_the_batch_in_a_pipeline(sdxl: TinyPipeline) -> None:
    evenkeel.apply(sdxl.pipe, EVERY_OTHER)
    both = generate(sdxl, seeds=(0, 1))
    alone = generate(sdxl, seeds=(0,))
    torch.testing.assert_close(both[:1], alone, rtol=1e-3, atol=1e-3)
    evenkeel.apply(sdxl.pipe, QNCD(interval=2, per_image=False))
    assert not torch.allclose(generate(sdxl, seeds=(0, 1))[:1], alone, rtol=1e-3, atol=1e-3)


def test_a_run_without_a_refresh_is_the_plain_one_bit_for_bit(sdxl: TinyPipeline) -> None:
    plain = generate(sdxl, steps=4)
    evenkeel.apply(sdxl.pipe, QNCD())
    calls = Calls(sdxl.model)
    assert torch.equal(generate(sdxl, steps=4), plain)
    calls.handle.remove()
    assert len(calls.rows) == 4
    assert not torch.equal(generate(sdxl, steps=8), generate(sdxl, steps=4))
    evenkeel.apply(sdxl.pipe, EVERY_OTHER)
    assert not torch.equal(generate(sdxl, steps=4), plain)


def test_half_precision_is_corrected_in_float32() -> None:
    tiny = ALL["sd3"]()
    tiny.pipe.to(torch.bfloat16)
    evenkeel.apply(tiny.pipe, EVERY_OTHER)
    corrected = generate(tiny)
    assert corrected.dtype == torch.bfloat16 and torch.isfinite(corrected).all()
    asked = requery_of(tiny.pipe).mu
    assert asked is not None and asked.dtype == torch.float32


def test_it_listens_only_during_runs_and_up_to_the_last_refresh(sdxl: TinyPipeline) -> None:
    evenkeel.apply(sdxl.pipe, EVERY_OTHER)
    stamp = len(sdxl.model._forward_hooks)  # which is there as long as the correction is
    listening = []

    def look(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        listening.append(len(sdxl.model._forward_hooks) - stamp)
        return kwargs

    generate(sdxl, steps=4, callback_on_step_end=look)
    assert listening == [1, 1, 0, 0]


def test_an_interrupted_run_does_not_spoil_the_next(sdxl: TinyPipeline) -> None:
    plain = generate(sdxl, steps=4)
    evenkeel.apply(sdxl.pipe, EVERY_OTHER)
    corrected = generate(sdxl, steps=4)

    def stop(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(sdxl, steps=4, callback_on_step_end=stop)
    assert torch.equal(generate(sdxl, steps=4), corrected)
    with pytest.raises(KeyboardInterrupt):
        generate(sdxl, steps=4, callback_on_step_end=stop)
    evenkeel.remove(sdxl.pipe)
    assert torch.equal(generate(sdxl, steps=4), plain)  # what was left behind takes itself off
    assert not sdxl.model._forward_hooks


def test_hooks_of_others_do_not_see_the_second_call(sdxl: TinyPipeline) -> None:
    seen = []
    handle = sdxl.model.register_forward_pre_hook(lambda m, a: seen.append(1))
    evenkeel.apply(sdxl.pipe, EVERY_OTHER)
    generate(sdxl, steps=4)
    handle.remove()
    assert len(seen) == 4


def test_it_combines_with_a_correction_of_another_stage_only(sdxl: TinyPipeline) -> None:
    both = Composite((QNCD(interval=2), EpsilonScaling()))
    assert both.stages == ("output", "refresh")
    evenkeel.apply(sdxl.pipe, both)
    with pytest.raises(Incompatible, match="both correct the output"):
        generate(sdxl, steps=4)


def with_heads(tiny: TinyPipeline, branches: int) -> HeadSwitch:
    """QNCD and another output head at each of eight steps: its bias is raised by the step's number."""
    scheduler = copy.deepcopy(tiny.pipe.scheduler)
    law = law_of(scheduler, 8)
    head = find_head(tiny.model, "conv_out")
    table = HeadTable.of(
        law.alpha[:-1],
        law.sigma[:-1],
        weight=torch.zeros(8, branches, head.features, head.targets),
        constant=torch.arange(8.0)[:, None, None].expand(8, branches, head.targets),
        active=torch.ones(8, branches, dtype=torch.bool),
    )
    switch = HeadSwitch(table, tiny.model, "conv_out")
    install(tiny.pipe.scheduler, *interceptors_of(QNCD(), tiny.pipe, tiny.model), switch)
    switch.attach()
    return switch


def test_the_second_call_has_the_head_of_its_step(sdxl: TinyPipeline) -> None:
    seen = []
    switch = with_heads(sdxl, branches=1)
    look = sdxl.model.conv_out.register_forward_hook(
        lambda m, a, o: seen.append(float((o - m.forward(a[0])).mean()))
    )
    generate(sdxl, steps=8)
    look.remove()
    switch.detach()
    assert seen == pytest.approx([0, 1, 2, 3, 4, 5, 6, 6, 7], abs=1e-5)


def test_heads_told_apart_by_the_order_of_calls_are_refused(sdxl: TinyPipeline) -> None:
    switch = with_heads(sdxl, branches=2)
    with pytest.raises(Incompatible, match="a head per guidance branch"):
        generate(sdxl, steps=8)
    switch.detach()


def test_runs_in_other_threads_are_not_listened_to() -> None:
    """Two runs of one denoiser, paused in turn between steps, as fits in closed loop do it."""
    denoiser = Linear()
    expected = []
    for seed in (0, 1):
        alone = Host(euler(), denoiser)
        evenkeel.apply(alone, EVERY_OTHER)
        expected.append(alone.sample(states(seed=seed), 4))
    strands = []
    for seed in (0, 1):
        host = Host(euler(), denoiser)
        evenkeel.apply(host, EVERY_OTHER)
        strands.append(Strand(lambda s, h=host, n=seed: h.sample(states(seed=n), 4)))
        pausing = Group([Pausing(strands[-1])])
        install_groups(host.scheduler, [*groups_of(host.scheduler), pausing])
    shown = [strand.resume() for strand in strands]
    while not isinstance(shown[0], Finished):
        shown = [strand.resume() for strand in strands]
    for found, wanted in zip(shown, expected, strict=True):
        # Not bit for bit: the same product rounds differently in memory of another alignment.
        torch.testing.assert_close(found.result, wanted, rtol=1e-12, atol=1e-12)


class Pausing(Interceptor):
    """Lets the other run go on after each step: it calls the denoiser before this one does again."""

    def __init__(self, strand: Strand) -> None:
        self.strand = strand

    def after(self, scheduler: Any, output: Tensor, sample: Tensor, result: Tensor) -> Tensor:
        self.strand.pause("between")
        return result
