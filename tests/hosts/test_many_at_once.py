"""Several pipelines, threads, copies and lifetimes on one set of weights."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from bound_rigs import Rig, hooks_of, rigged, state
from soaking import Interrupted, Service

import evenkeel
from evenkeel.corrections import EpsilonScaling
from evenkeel.errors import Incompatible
from evenkeel.testing.pipeline import sampled


@pytest.fixture(scope="module")
def shared() -> Rig:
    return rigged()


@pytest.fixture
def rig(shared: Rig) -> Iterator[Rig]:
    """Lent; afterwards nothing is left on it."""
    same = state(shared.quantized)
    yield shared
    evenkeel.remove(shared.pipe)
    gc.collect()
    assert same() and hooks_of(shared.quantized) == 0


def together(jobs: list[Callable[[], Any]]) -> list[Any]:
    """All at once, each in a thread of its own, started together; results or errors."""
    start = threading.Barrier(len(jobs))

    def run(job: Callable[[], Any]) -> Any:
        start.wait()
        try:
            return job()
        except Incompatible as error:
            return error

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(run, jobs))


# ---- threads


def test_corrected_and_plain_pipelines_run_side_by_side_on_the_same_weights(rig: Rig) -> None:
    pipes = [rig.pipe, *(rig.sharing(scheduler=rig.own_scheduler()) for _ in range(3))]
    given = [rig.readout, rig.drift, None, EpsilonScaling(1.05)]
    for pipe, correction in zip(pipes, given, strict=True):
        if correction is not None:
            evenkeel.apply(pipe, correction)
    one_by_one = [rig.sample(pipe) for pipe in pipes]
    assert len({float(x.sum()) for x in one_by_one}) == 4
    for _ in range(2):
        found = together([lambda pipe=pipe: rig.sample(pipe) for pipe in pipes])
        assert all(torch.equal(a, b) for a, b in zip(found, one_by_one, strict=True))
    for pipe in pipes:
        evenkeel.remove(pipe)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copied_schedulers_carry_the_correction_into_threads(rig: Rig, duplicate: Any) -> None:
    evenkeel.apply(rig.pipe, rig.readout)
    corrected = rig.sample()
    pipes = [rig.pipe, *(copy.copy(rig.pipe) for _ in range(2))]
    for pipe in pipes[1:]:
        pipe.scheduler = duplicate(rig.pipe.scheduler)
        pipe.tokenizer, pipe.tokenizer_2 = map(copy.deepcopy, (pipe.tokenizer, pipe.tokenizer_2))
    found = together([lambda pipe=pipe: rig.sample(pipe) for pipe in pipes])
    assert all(torch.equal(x, corrected) for x in found)


def test_one_scheduler_in_two_threads_is_refused_at_once(rig: Rig) -> None:
    evenkeel.apply(rig.pipe, rig.readout)
    corrected, other = rig.sample(), rig.sharing()
    refused: list[Any] = []

    def meanwhile(pipe: Any, i: int, t: Any, kw: Any) -> Any:
        refused.extend(together([lambda: rig.sample(other)]))
        return kw

    assert torch.equal(rig.sample(callback_on_step_end=meanwhile), corrected)
    assert len(refused) == 4 and all("in another thread" in f"{e}" for e in refused)
    assert torch.equal(together([lambda: rig.sample(other)])[0], corrected)  # one after the other


def test_a_run_around_another_on_the_same_scheduler_is_refused(rig: Rig) -> None:
    evenkeel.apply(rig.pipe, rig.drift)
    corrected, other = rig.sample(), rig.sharing()

    def inside(pipe: Any, i: int, t: Any, kw: Any) -> Any:
        with pytest.raises(Incompatible, match="around this call"):
            rig.sample(other)
        return kw

    assert torch.equal(rig.sample(callback_on_step_end=inside), corrected)


def test_a_compiled_denoiser_is_not_told_two_things_at_once() -> None:
    service = Service(threads=3)
    torch.compiler.reset()
    compiled = torch.compile(service.denoiser, backend="eager")
    pipe, plain = service.twin(), service.twin()
    pipe.transformer = plain.transformer = compiled
    before = sampled(plain)
    evenkeel.apply(pipe, service.corrections["readout"], allow=("denoiser",))
    corrected = sampled(pipe)
    assert not torch.equal(corrected, before)
    found = together([lambda: sampled(pipe), lambda: sampled(plain), lambda: sampled(plain)])
    for wanted, got in zip((corrected, before, before), found, strict=True):
        assert isinstance(got, Incompatible) or torch.equal(got, wanted)
    assert torch.equal(sampled(pipe), corrected) and torch.equal(sampled(plain), before)
    evenkeel.remove(pipe)
    torch.compiler.reset()


# ---- copies


def test_whole_copies_keep_all_of_a_correction(rig: Rig) -> None:
    plain = rig.sample()
    for correction in (rig.readout, rig.drift):
        evenkeel.apply(rig.pipe, correction)
        corrected = rig.sample()
        for duplicate in (copy.copy, copy.deepcopy):
            twin = duplicate(rig.pipe)
            assert evenkeel.summary(twin).correction == correction.name
            assert torch.equal(rig.sample(twin), corrected)
            if duplicate is not copy.copy:
                assert torch.equal(rig.sample(), corrected)
                evenkeel.remove(twin)
                assert torch.equal(rig.sample(twin), plain) and hooks_of(twin.unet) == 0
        evenkeel.remove(rig.pipe)


@pytest.mark.parametrize("name", ["readout", "stepbaq", "adapters", "tac"])
def test_pickled_pipelines_keep_all_of_a_correction(name: str) -> None:
    service = Service(threads=1, names=(name,))
    pipe, plain = service.twin(), sampled(service.twin())
    evenkeel.apply(pipe, service.corrections[name], allow=("denoiser", "scheduler", "guidance"))
    twin = pickle.loads(pickle.dumps(pipe))
    assert torch.equal(sampled(twin), service.alone[name])
    assert not torch.equal(service.alone[name], plain)
    evenkeel.remove(twin)
    assert torch.equal(sampled(twin), plain) and hooks_of(twin.transformer) == 0
    evenkeel.remove(pipe)


def test_a_copy_that_never_ran_can_be_stripped(rig: Rig) -> None:
    plain = rig.sample()
    evenkeel.apply(rig.pipe, rig.readout)
    corrected = rig.sample()
    twin = copy.deepcopy(rig.pipe)
    evenkeel.remove(twin)
    assert torch.equal(rig.sample(twin), plain) and hooks_of(twin.unet) == 0
    assert torch.equal(rig.sample(), corrected)


def test_a_copied_scheduler_on_another_network_corrects_nothing(rig: Rig) -> None:
    other = rig.sharing(unet=rig.reference, scheduler=rig.own_scheduler())
    plain = rig.sample(other)
    evenkeel.apply(rig.pipe, rig.drift)
    other.scheduler = copy.deepcopy(rig.pipe.scheduler)
    with pytest.warns(UserWarning, match="another denoiser"):
        assert torch.equal(rig.sample(other), plain)


# ---- lifetimes


@pytest.mark.parametrize("name", ["readout", "drift"])
def test_no_hook_stays_when_its_pipeline_is_gone(rig: Rig, name: str) -> None:
    pipe = rig.sharing(scheduler=rig.own_scheduler())
    evenkeel.apply(pipe, getattr(rig, name))
    rig.sample(pipe)
    assert hooks_of(rig.quantized) > 0
    del pipe
    gc.collect()
    assert hooks_of(rig.quantized) == 0


def test_a_pipeline_made_from_another_that_is_gone_keeps_the_correction(rig: Rig) -> None:
    pipe = rig.sharing(scheduler=rig.own_scheduler())
    evenkeel.apply(pipe, rig.readout)
    corrected = rig.sample(pipe)
    pipe = type(pipe)(**pipe.components)
    pipe.set_progress_bar_config(disable=True)
    gc.collect()
    assert torch.equal(rig.sample(pipe), corrected)
    evenkeel.remove(pipe)


def test_random_interruptions_leave_the_next_run_as_it_was(rig: Rig) -> None:
    cut = Interrupted(rig)
    cut.run(len(Interrupted.WAYS))
    assert cut.wrong == [] and sum(cut.done.values()) == len(Interrupted.WAYS)


def test_a_service_under_load_leaves_nothing_behind() -> None:
    service, before = Service(threads=4), threading.active_count()
    service.run(20)
    assert service.wrong == [] and service.left_behind() == []
    assert sum(service.done.values()) == 20 and threading.active_count() == before
