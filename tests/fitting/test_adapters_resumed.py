"""Recovery adapters after a kill: the same call goes on with what is finished, to the same bits."""

from __future__ import annotations

import itertools
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import ALL, TinyPipeline
from torch import nn

import evenkeel
from evenkeel.comparing import restore as module
from evenkeel.comparing.restore import Restored, restore
from evenkeel.errors import StorageError
from evenkeel.fitting.adapters import final_samples, pairs
from evenkeel.quantizers import QuantizerSpec, quantize_module

SETTINGS: dict[str, Any] = {
    "num_inference_steps": 2,
    "guidance_scale": 3.5,
    "batch_size": 1,
    "call": {"height": 32, "width": 32},
    "progress": False,
}


@pytest.fixture(scope="module")
def flux() -> TinyPipeline:
    return ALL["flux"]()


@pytest.fixture(scope="module")
def flux_w3(flux) -> nn.Module:
    spec = QuantizerSpec.parse("w3a16-g16-r4")
    return quantize_module(flux.model, replace(spec, only=("transformer_blocks.0.*",)))[0]


@pytest.fixture(autouse=True)
def two_pairs_are_held_out_and_confirm(monkeypatch) -> None:
    """Random networks have nothing to recover; here adapters are kept all the same."""
    monkeypatch.setattr(pairs, "HELD_OUT", 2)
    monkeypatch.setattr(pairs, "CHOOSING", 1)
    monkeypatch.setattr(final_samples, "gain", lambda before, after: torch.tensor([1.0, 1.1]))


def fit(tiny: TinyPipeline, quantized: nn.Module, folder: Path | None, **options: Any) -> Any:
    asked = {"prompts": ["a", "b", "c"], "rank": 2, "bits": 4, "rows": 64, "metric": "output"}
    asked |= {**SETTINGS, **options}
    return evenkeel.fit_adapters(tiny.pipe, quantized=quantized, folder=folder, **asked)


def calls_of(quantized: nn.Module) -> tuple[list[None], Any]:
    """A list that grows with every call, and how to stop it."""
    calls: list[None] = []
    hook = quantized.register_forward_hook(lambda *_: calls.append(None))
    return calls, hook.remove


def test_after_kill_9_the_same_call_gives_the_same_adapters(flux, flux_w3, tmp_path):
    calls, stop = calls_of(flux_w3)
    expected, _ = fit(flux, flux_w3, None)
    whole, after, folder = len(calls), 11, tmp_path / "kept"
    stop()
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)
            count = itertools.count(1)

            def die(*_: Any) -> None:
                if next(count) == after:
                    os.kill(os.getpid(), signal.SIGKILL)

            flux_w3.register_forward_hook(die)
            fit(flux, flux_w3, folder)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    calls, stop = calls_of(flux_w3)
    adapters, _ = fit(flux, flux_w3, folder)
    stop()
    assert adapters.layers
    assert adapters.digest() == expected.digest()
    finished = (after - 1) // 2 - 1  # batches of two steps, and one that tells the law
    assert len(calls) == whole - 2 * finished
    # Another rank finds rows and plain samples; the adapters' own samples are made.
    calls, stop = calls_of(flux_w3)
    other, _ = fit(flux, flux_w3, folder, rank=1)
    stop()
    assert 0 < len(calls) < whole - 6
    assert other.layers[0].rank == 1


def test_what_belongs_to_other_prompts_is_not_taken(flux, flux_w3, tmp_path):
    fit(flux, flux_w3, tmp_path)
    changed = {"prompts": ["a", "x", "c"]}
    calls, stop = calls_of(flux_w3)
    found, said = fit(flux, flux_w3, tmp_path, **changed)
    stop()
    alone, report = fit(flux, flux_w3, None, **changed)
    assert len(calls) > 4
    assert said == report
    assert found.digest() == alone.digest()
    for path in tmp_path.glob("rows-*"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StorageError, match=r"rows-.*remove that folder"):
        fit(flux, flux_w3, tmp_path)


def test_restore_goes_on_with_what_is_finished(flux, flux_w3, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "OTHER_STEPS", ())
    asked = {**SETTINGS, "num_inference_steps": 2, "budget": 0.2, "folder": tmp_path}

    def restored() -> tuple[Restored, int]:
        calls, stop = calls_of(flux_w3)
        found = restore(
            flux.pipe, quantized=flux_w3, prompts=["a", "b", "c"], measured_on=["d"], **asked
        )
        stop()
        return found, len(calls)

    first, calls = restored()
    assert calls > 10
    assert first.refitted is not None
    second, again = restored()
    assert again == 0
    assert second.adapters.digest() == first.adapters.digest()
    assert second.sentence == first.sentence
    for a, b in zip(first.refitted.parameters(), second.refitted.parameters(), strict=True):
        assert torch.equal(a, b)
