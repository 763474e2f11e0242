"""A correction acts in the runs, on the denoiser and at the steps that it was made for, and on no others."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from bound_rigs import (
    Rig,
    edited,
    heads_seen,
    hooks_of,
    image_pipe,
    rigged,
    schedule_of,
    state,
    steps_seen,
)
from tiny_pipelines import ALL
from torch import Tensor

import evenkeel
from evenkeel.errors import EvenkeelError, Incompatible
from evenkeel.hosts.actuators.guidance import combination


@pytest.fixture(scope="module")
def shared() -> Rig:
    return rigged()


@pytest.fixture
def rig(shared: Rig) -> Iterator[Rig]:
    """Lent; afterwards nothing is left on it."""
    pipe, scheduler, same = shared.pipe, shared.pipe.scheduler, state(shared.quantized)
    yield shared
    pipe.unet, pipe.scheduler = shared.quantized, scheduler
    evenkeel.remove(pipe)
    assert same() and hooks_of(shared.quantized) == hooks_of(shared.reference) == 0
    assert type(scheduler) is diffusers.EulerDiscreteScheduler


def correction(rig: Rig, name: str) -> Any:
    return {"drift": rig.drift, "readout": rig.readout}[name]


# ---- which denoiser


@pytest.mark.parametrize("name", ["drift", "readout"])
def test_another_denoiser_in_its_place_is_left_alone_and_that_is_said_once(
    rig: Rig, name: str
) -> None:
    rig.pipe.unet = rig.reference
    plain = rig.sample()
    rig.pipe.unet = rig.quantized
    evenkeel.apply(rig.pipe, correction(rig, name))
    corrected = rig.sample()
    rig.pipe.unet = rig.reference
    with pytest.warns(UserWarning, match="another denoiser"):
        assert torch.equal(rig.sample(), plain)
    assert torch.equal(rig.sample(), plain)
    rig.pipe.unet = rig.quantized
    assert torch.equal(rig.sample(), corrected)


def test_a_denoiser_exchanged_during_a_run_is_left_alone_from_there(rig: Rig) -> None:
    def swap(pipe: Any, i: int, t: Any, kw: Any) -> Any:
        pipe.unet = rig.reference if i == 1 else pipe.unet
        return kw

    evenkeel.apply(rig.pipe, rig.drift)
    with steps_seen(rig.pipe.scheduler) as seen:
        with pytest.warns(UserWarning, match="another denoiser"):
            rig.sample(callback_on_step_end=swap)
        assert len(seen) == 2


def test_a_refiner_that_shares_the_scheduler_is_left_alone(rig: Rig) -> None:
    refiner = image_pipe(rig.sharing(unet=ALL["sdxl"](seed=5).model))
    assert refiner.scheduler is rig.pipe.scheduler
    plain = edited(refiner, 0.5, 4)
    evenkeel.apply(rig.pipe, rig.drift)
    with pytest.warns(UserWarning, match="another denoiser"):
        assert torch.equal(edited(refiner, 0.5, 4), plain)


def test_two_pipelines_on_one_scheduler_keep_a_correction_each(rig: Rig) -> None:
    first, second = rig.pipe, rig.sharing()
    assert second.scheduler is first.scheduler
    plain = rig.sample()
    evenkeel.apply(first, rig.readout)
    with_readout = rig.sample()
    assert torch.equal(rig.sample(second), with_readout)  # it shares what is applied
    evenkeel.apply(second, rig.drift)
    with_drift = rig.sample(second)
    assert not torch.equal(with_drift, with_readout) and not torch.equal(with_drift, plain)
    assert torch.equal(rig.sample(first), with_readout)
    names = [evenkeel.summary(p).correction for p in (first, second)]
    assert names == ["readout", "q-drift"]
    evenkeel.remove(second)
    assert torch.equal(rig.sample(second), plain)
    assert torch.equal(rig.sample(first), with_readout)


def test_a_loop_of_ones_own_is_corrected_and_another_network_in_it_is_not(rig: Rig) -> None:
    def loop(network: Any) -> Tensor:
        scheduler = rig.pipe.scheduler
        scheduler.set_timesteps(4)
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        added = {"text_embeds": torch.ones(1, 32), "time_ids": torch.ones(1, 6)}
        for t in scheduler.timesteps:
            given = scheduler.scale_model_input(x, t)
            with torch.no_grad():
                out = network(given, t, torch.ones(1, 3, 64), added_cond_kwargs=added)[0]
            x = scheduler.step(out, t, x, return_dict=False)[0]
        return x

    plain, other = loop(rig.quantized), loop(rig.reference)
    evenkeel.apply(rig.pipe, rig.readout)
    assert not torch.equal(loop(rig.quantized), plain)
    evenkeel.apply(rig.pipe, rig.drift, allow=("guidance",))
    assert not torch.equal(loop(rig.quantized), plain)
    with pytest.warns(UserWarning, match="another denoiser"):
        assert torch.equal(loop(rig.reference), other)


# ---- which weights


@pytest.mark.parametrize("how", ["copied", "through data", "another head"])
@pytest.mark.parametrize("name", ["drift", "readout"])
def test_weights_that_changed_since_are_noticed_and_kept(rig: Rig, name: str, how: str) -> None:
    evenkeel.apply(rig.pipe, correction(rig, name))
    corrected = rig.sample()
    layer: Any = rig.quantized.conv_out
    own = layer.weight.detach().clone()
    if how == "copied":
        with torch.no_grad():
            layer.weight.copy_(own + 0.5)
    elif how == "through data":
        layer.weight.data = own + 0.5
    else:
        layer.weight = torch.nn.Parameter(own + 0.5)
    try:
        with pytest.warns(UserWarning, match="weights were changed since"):
            changed = rig.sample()
        evenkeel.remove(rig.pipe)
        assert torch.equal(layer.weight, own + 0.5)
        assert torch.equal(rig.sample(), changed)  # left alone
    finally:
        with torch.no_grad():
            layer.weight.copy_(own)
    evenkeel.apply(rig.pipe, correction(rig, name))
    assert torch.equal(rig.sample(), corrected)


def test_weights_that_came_back_are_recognised(rig: Rig) -> None:
    evenkeel.apply(rig.pipe, rig.drift)
    corrected = rig.sample()
    with torch.no_grad():
        for parameter in rig.quantized.parameters():
            parameter.copy_(parameter.clone())
    assert torch.equal(rig.sample(), corrected)


# ---- which guidance


def cut_off(pipe: Any, i: int, t: Any, kw: dict[str, Any]) -> dict[str, Any]:
    if i != 1:
        return kw
    pipe._guidance_scale = 0.0
    return {k: v if k == "latents" else v.chunk(2)[-1] for k, v in kw.items()}


CUT = {
    "callback_on_step_end": cut_off,
    "callback_on_step_end_tensor_inputs": ["prompt_embeds", "add_text_embeds", "add_time_ids"],
}


@pytest.mark.parametrize(
    "knob",
    [{"guidance_rescale": 0.7}, {"guidance_scale": 7.0}, CUT],
    ids=["rescaled", "scale", "cut off"],
)
def test_every_knob_of_guidance_is_noticed(rig: Rig, knob: dict[str, Any]) -> None:
    evenkeel.apply(rig.pipe, rig.drift)
    corrected = rig.sample()
    with pytest.raises(Incompatible, match="guidance"):
        rig.sample(**knob)
    assert torch.equal(rig.sample(), corrected)


def test_guidance_that_no_attribute_tells_is_measured(rig: Rig) -> None:
    class Stronger(diffusers.StableDiffusionXLPipeline):  # type: ignore[misc]
        """Its call is given another scale than it says."""

        @property
        def guidance_scale(self) -> float:
            return 9.0

    pipe = Stronger(**rig.pipe.components)
    pipe.set_progress_bar_config(disable=True)
    evenkeel.apply(pipe, rig.drift)
    with pytest.raises(Incompatible, match=r"as \(-4 5\), this run combines them as \(-8 9\)"):
        rig.sample(pipe)
    evenkeel.remove(pipe)


def test_a_combination_is_read_off_outputs() -> None:
    a, b = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert combination([torch.cat([a, b])], a + 7.5 * (b - a)) == "-6.5 7.5"
    assert combination([b, a], a + 7.5 * (b - a)) == "7.5 -6.5"
    assert combination([a], a) == "1"
    scaled = (a + 7.5 * (b - a)) * torch.tensor([0.7, 0.8, 0.9]).view(3, 1, 1, 1)
    assert combination([a, b], scaled) == "-6.5 7.5 rescaled"
    assert combination([a, b], (a + b).abs()) == "not linear"
    assert combination([a, a], a) == ""


# ---- which step


SCHEDULERS = {
    "Euler": {},
    "DDIM": {"clip_sample": False},
    "DDPM": {"clip_sample": False},
    "PNDM": {"skip_prk_steps": True},
    "LCM": {},
    "DPMSolverMultistep": {},
    "HeunDiscrete": {},
    "UniPCMultistep": {},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_image_to_image_has_the_numbers_of_its_steps_at_every_strength(name: str) -> None:
    config = ALL["sdxl"]().pipe.scheduler.config
    kind = getattr(diffusers, name + ("Scheduler" if "Discrete" in name else ""), None) or getattr(
        diffusers, name + ("DiscreteScheduler" if name == "Euler" else "Scheduler")
    )
    rig = rigged(steps=6, scheduler=kind.from_config(config, **SCHEDULERS[name]))
    pipe, readout = image_pipe(rig.pipe), rig.readout
    times = schedule_of(rig.pipe.scheduler, 6)
    for strength in (1.0, 0.7, 0.3):
        with evenkeel.applied(rig.pipe, rig.drift), steps_seen(pipe.scheduler) as steps:
            edited(pipe, strength, 6)
        assert steps and all(told == planned for told, planned in steps)
        with evenkeel.applied(rig.pipe, readout), heads_seen(rig.quantized, readout) as heads:
            edited(pipe, strength, 6)
        places = list(range(len(times)))[len(times) - len(heads) :]
        assert [t for t, _ in heads] == pytest.approx([times[k] for k in places])
        assert [k for _, k in heads] == places


def test_denoising_start_and_end_have_the_numbers_of_their_steps(rig: Rig) -> None:
    readout, image = rig.readout, image_pipe(rig.pipe)
    evenkeel.apply(rig.pipe, readout)
    with heads_seen(rig.quantized, readout) as first:
        latents = rig.sample(denoising_end=0.5)
    with heads_seen(rig.quantized, readout) as second:
        edited(image, 0.3, 4, image=latents, denoising_start=0.5)
    assert [k for _, k in (*first, *second)] == [0, 1, 2, 3]


@pytest.mark.parametrize("order", ["repeated", "backwards", "some", "twice through"])
def test_steps_in_any_order_have_their_own_numbers(rig: Rig, order: str) -> None:
    pipe = rig.sharing(
        scheduler=diffusers.DDIMScheduler.from_config(rig.pipe.scheduler.config, clip_sample=False)
    )
    places = {
        "repeated": [0, 0, 1, 1, 1, 2, 3, 3],
        "backwards": [3, 2, 1, 0],
        "some": [1, 3],
        "twice through": [0, 1, 2, 3, 0, 1, 2, 3],
    }[order]
    scheduler, readout = pipe.scheduler, rig.readout
    added = {"text_embeds": torch.ones(1, 32), "time_ids": torch.ones(1, 6)}

    def loop() -> None:
        scheduler.set_timesteps(4)
        x = torch.ones(1, 4, 16, 16)
        for k in places:
            t = scheduler.timesteps[k]
            with torch.no_grad():
                out = rig.quantized(x, t, torch.ones(1, 3, 64), added_cond_kwargs=added)[0]
            x = scheduler.step(out, t, x, return_dict=False)[0]

    allow = ("scheduler", "range", "guidance")
    evenkeel.apply(pipe, rig.drift, allow=allow)
    with steps_seen(scheduler) as steps:
        loop()
    times = [float(t) for t in scheduler.timesteps]
    assert [planned for _, planned in steps] == [times[k] for k in places]
    evenkeel.apply(pipe, readout, allow=allow)
    with heads_seen(rig.quantized, readout) as heads:
        loop()
    evenkeel.remove(pipe)
    by_time = dict(heads)
    assert len(by_time) == len(set(places)) and all(by_time[t] == k for t, k in heads)


# ---- whatever ends a run


def stopped(rig: Rig, how: str) -> None:
    """A run that does not reach the end of its schedule."""

    def stop(pipe: Any, i: int, t: Any, kw: Any) -> Any:
        if i == 1 and how == "_interrupt":
            pipe._interrupt = True
        elif i == 1:
            raise {"error": RuntimeError, "Ctrl-C": KeyboardInterrupt}[how]("stop")
        return kw

    if how == "denoising_end":
        rig.sample(denoising_end=0.5)
    elif how == "_interrupt":
        rig.sample(callback_on_step_end=stop)
    elif how == "inside":
        hook = rig.quantized.conv_out.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rig.sample()
        hook.remove()
    else:
        with pytest.raises((RuntimeError, KeyboardInterrupt)):
            rig.sample(callback_on_step_end=stop)


@pytest.mark.parametrize("how", ["denoising_end", "_interrupt", "error", "Ctrl-C", "inside"])
def test_however_a_run_ends_the_denoiser_is_itself(rig: Rig, how: str) -> None:
    other = rig.sharing(scheduler=rig.own_scheduler())
    plain, same = rig.sample(other), state(rig.quantized)
    evenkeel.apply(rig.pipe, rig.readout)
    corrected = rig.sample()
    stopped(rig, how)
    assert same()
    assert torch.equal(rig.sample(other), plain)
    assert torch.equal(rig.sample(), corrected)


def test_a_plain_run_inside_of_a_corrected_one_is_plain(rig: Rig) -> None:
    other = rig.sharing(scheduler=rig.own_scheduler())
    plain = rig.sample(other)
    evenkeel.apply(rig.pipe, rig.readout)
    corrected, inside = rig.sample(), []

    def preview(pipe: Any, i: int, t: Any, kw: Any) -> Any:
        inside.append(rig.sample(other))
        return kw

    assert torch.equal(rig.sample(callback_on_step_end=preview), corrected)
    assert len(inside) == 4 and all(torch.equal(found, plain) for found in inside)


# ---- which schedulers


class Passing(diffusers.EulerDiscreteScheduler):  # type: ignore[misc]
    """Says nothing of what its step takes."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        return super().step(*args, **kwargs)

    def set_timesteps(self, *args: Any, **kwargs: Any) -> Any:
        return super().set_timesteps(*args, **kwargs)


class Proxy:
    """Stands in front of a scheduler and is none."""

    def __init__(self, inner: Any) -> None:
        self.__dict__["inner"] = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)


class Logging(Proxy):
    """Stands in front of a scheduler and takes its steps itself."""

    def step(self, model_output: Any, timestep: Any, sample: Any, **named: Any) -> Any:
        return self.inner.step(model_output, timestep, sample, **named)

    def set_timesteps(self, *args: Any, **named: Any) -> Any:
        return self.inner.set_timesteps(*args, **named)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.inner, name, value) if name != "__class__" else super().__setattr__(
            name, value
        )


def wrapped(scheduler: Any, *names: str) -> Any:
    """As a logger, or a parallel cache, does it."""
    for name in names:
        inner = getattr(scheduler, name)
        setattr(scheduler, name, lambda *a, inner=inner, **k: inner(*a, **k))
    return scheduler


@pytest.mark.parametrize("when", ["before", "after", "both"])
@pytest.mark.parametrize("name", ["drift", "readout"])
def test_a_scheduler_whose_step_is_wrapped_is_corrected(rig: Rig, name: str, when: str) -> None:
    found = correction(rig, name)
    plain = rig.sample()
    with evenkeel.applied(rig.pipe, found):
        corrected = rig.sample()
    rig.pipe.scheduler = scheduler = rig.own_scheduler()
    if when != "after":
        wrapped(scheduler, "step", "set_timesteps")
    evenkeel.apply(rig.pipe, found)
    if when != "before":
        wrapped(scheduler, "step", "set_timesteps")
    assert torch.equal(rig.sample(), corrected)
    evenkeel.remove(rig.pipe)
    assert torch.equal(rig.sample(), plain)


@pytest.mark.parametrize("name", ["drift", "readout"])
def test_a_subclass_that_takes_whatever_it_is_given_is_corrected(rig: Rig, name: str) -> None:
    found = correction(rig, name)
    with evenkeel.applied(rig.pipe, found):
        corrected = rig.sample()
    rig.pipe.scheduler = Passing.from_config(rig.pipe.scheduler.config)
    evenkeel.apply(rig.pipe, found, allow=("scheduler",))
    assert torch.equal(rig.sample(), corrected)
    evenkeel.remove(rig.pipe)


@pytest.mark.parametrize("name", ["drift", "readout"])
def test_a_scheduler_behind_a_proxy_is_known_for_what_it_is(rig: Rig, name: str) -> None:
    found = correction(rig, name)
    with evenkeel.applied(rig.pipe, found):
        corrected = rig.sample()
    rig.pipe.scheduler = Logging(rig.own_scheduler())
    evenkeel.apply(rig.pipe, found, allow=("scheduler",))
    assert torch.equal(rig.sample(), corrected)
    evenkeel.remove(rig.pipe)
    law = evenkeel.probe_scheduler(rig.pipe.scheduler)
    assert law.sampler == type(rig.pipe.scheduler.inner).__name__


def test_what_only_stands_in_front_of_a_scheduler_is_refused(rig: Rig) -> None:
    rig.pipe.scheduler = Proxy(rig.own_scheduler())
    with pytest.raises(EvenkeelError, match="only hands them on"):
        evenkeel.apply(rig.pipe, rig.drift, allow=("scheduler",))


def test_what_is_no_correction_is_refused_and_nothing_is_changed(rig: Rig) -> None:
    evenkeel.apply(rig.pipe, rig.drift)
    corrected = rig.sample()
    for wrong in (None, 5, "q-drift", type(rig.drift)):
        with pytest.raises(Incompatible, match="expected a correction"):
            evenkeel.apply(rig.pipe, wrong)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(rig.sample(), corrected)
