"""Runs compute with as many threads as they gain from, and leave the process as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits
from tiny_pipelines import ALL
from torch import nn

from evenkeel import threads
from evenkeel.comparing import comparison
from evenkeel.errors import MetricError
from evenkeel.fitting import calibrate
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.threads import sensible_threads


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with threadpool_limits(limits=2, user_api="blas"):
        yield
    torch.set_num_threads(before)


def blas() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_a_small_network_computes_on_one_thread_and_all_is_as_it_was_whatever_happens() -> None:
    assert blas() == {2}
    seen = []

    def interrupted() -> None:
        with sensible_threads(nn.Linear(2, 2)):
            seen.append((torch.get_num_threads(), blas()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert seen == [(1, {1})]
    assert torch.get_num_threads() == 2 and blas() == {2}


def test_a_large_network_and_one_on_a_device_keep_torchs_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with sensible_threads(nn.Linear(2, 2, device="meta")):
        assert torch.get_num_threads() == 2 and blas() == {1}
    monkeypatch.setattr(threads, "SMALL", 6)
    with sensible_threads(nn.Linear(2, 2)):
        assert torch.get_num_threads() == 2
    with sensible_threads(6):
        assert torch.get_num_threads() == 2
    with sensible_threads(5):
        assert torch.get_num_threads() == 1


@pytest.mark.parametrize("fails", [False, True])
def test_small_images_are_measured_on_one_thread_and_the_process_is_as_it_was(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    seen = []
    ssim = comparison.per_image_ssim

    def looked(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        seen.append((torch.get_num_threads(), blas()))
        if fails:
            raise MetricError("none")
        return ssim(images, reference)

    monkeypatch.setattr(comparison, "per_image_ssim", looked)
    images = {n: torch.full((4, 3, 16, 16), 9, dtype=torch.uint8) for n in ("whole", "quantized")}
    before = torch.get_num_threads(), threadpool_info()
    with pytest.raises(MetricError) if fails else nullcontext():
        comparison.measure(images, {name: [1.0, 2.0] for name in images}, ["a"] * 4, None, None)
    assert seen and set(map(str, seen)) == {"(1, {1})"}
    assert (torch.get_num_threads(), threadpool_info()) == before


@pytest.mark.parametrize("fails", [False, True])
def test_calibrating_leaves_the_process_as_it_was(fails: bool) -> None:
    tiny = ALL["sd3"]()
    quantized, _ = quantize_module(tiny.model, QuantizerSpec.parse("w4a8-g8"))
    calls = []

    def look(*_: object) -> None:
        calls.append((torch.get_num_threads(), blas()))
        if fails and len(calls) == 2:
            raise RuntimeError("in the middle of a run")

    quantized.register_forward_pre_hook(look)
    before = torch.get_num_threads(), threadpool_info()
    with pytest.raises(RuntimeError, match="in the middle") if fails else nullcontext():
        calibrate(
            tiny.pipe,
            quantized=quantized,
            prompts=["one", "two"],
            num_inference_steps=3,
            guidance_scale=tiny.guidance_scale,
            call=tiny.call,
            progress=False,
        )
    assert len(calls) >= 2 and set(map(str, calls)) == {"(1, {1})"}
    assert (torch.get_num_threads(), threadpool_info()) == before
