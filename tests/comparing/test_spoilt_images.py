"""Images of NaN, and black ones: never scored as if nothing were the matter."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

import pytest
import torch
from tiny_pipelines import ALL, TinyPipeline
from torch import nn

from evenkeel.comparing.comparison import ArmResult, compare, standard_arms
from evenkeel.comparing.generation import Arm, generate
from evenkeel.comparing.marginal_check import marginal_check
from evenkeel.errors import CalibrationError, MetricError
from evenkeel.hosts.run import Run
from evenkeel.metrics import BlackImages
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.reports.table import markdown_table, text_table

PROMPTS = ["a cat", "a dog", "a boat", "a tree"]


@pytest.fixture(scope="module")
def tiny() -> TinyPipeline:
    return ALL["sd3"]()


@pytest.fixture(scope="module")
def quantized(tiny: TinyPipeline) -> nn.Module:
    return quantize_module(tiny.model, QuantizerSpec.parse("w4a8-g8"))[0]


def asked(tiny: TinyPipeline) -> dict[str, Any]:
    call = {k: v for k, v in tiny.call.items() if k != "output_type"}
    return {"prompts": PROMPTS, "num_inference_steps": 2, "call": call, "batch_size": 2}


class Spoilt(nn.Module):
    """A denoiser whose output is not finite for the second prompt of a batch."""

    def __init__(self, inner: nn.Module, value: float) -> None:
        super().__init__()
        self.inner, self.value = inner, value
        self.config, self.dtype, self.device = inner.config, torch.float32, torch.device("cpu")

    def forward(self, *given: Any, **named: Any) -> Any:
        output = self.inner(*given, **{**named, "return_dict": False})[0].clone()
        output[1] = self.value
        return (output,)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_arm_that_gives_no_finite_images_is_named(
    tiny: TinyPipeline, quantized: nn.Module, value: float
) -> None:
    arms = standard_arms(tiny.pipe, quantized, [])
    arms.append(Arm("spoilt", Spoilt(copy.deepcopy(quantized), value)))
    with pytest.raises(MetricError, match=r"'spoilt'.*1 of 2.*prompt 1 \('a dog', seed 1000001\)"):
        compare(tiny.pipe, arms, progress=False, **asked(tiny))
    with pytest.raises(CalibrationError, match="state after step 0"):
        marginal_check(tiny.pipe, arms[::2], progress=False, **asked(tiny))


def test_a_codebook_does_not_hide_what_is_not_finite(
    tiny: TinyPipeline, quantized: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = tiny.pipe.vae.decode
    monkeypatch.setattr(
        tiny.pipe.vae, "decode", lambda z, **named: decode(z.nan_to_num(0.0), **named)
    )
    run = Run(tiny.pipe, **asked(tiny))
    with pytest.raises(MetricError, match=r"NaN or infinite"):
        generate(run, Arm("spoilt", Spoilt(quantized, float("nan"))))


def test_black_images_are_counted_and_named(
    tiny: TinyPipeline, quantized: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*given: Any, **named: Any) -> Any:
        images = decoded(*given, **named)[0].tanh()
        if tiny.pipe.transformer is quantized:
            images[-1] = -1
        return (images,)

    decoded = tiny.pipe.vae.decode
    monkeypatch.setattr(tiny.pipe.vae, "decode", decode)
    arms = standard_arms(tiny.pipe, quantized, {})
    with pytest.warns(BlackImages, match=r"arm 'quantized': 2 of 4 .*number 1, 3"):
        found = compare(tiny.pipe, arms, progress=False, **asked(tiny))
    assert [arm.black for arm in found.arms] == [[], [1, 3]]
    said = {"arms": [arm.as_dict() for arm in found.arms]}
    assert ArmResult.of(asdict(found.arms[1])) == found.arms[1]
    assert "- quantized: 2, number 1, 3" in text_table(said)
    assert "- quantized: 2, number 1, 3" in markdown_table(said)
