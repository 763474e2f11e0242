"""The contract of a correction, as an outside author meets it: told apart, or refused."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import ALL, TinyPipeline
from torch import Tensor

import evenkeel
from evenkeel.comparing.comparison import compare
from evenkeel.comparing.generation import Arm
from evenkeel.corrections import Correction, SamplerPlan
from evenkeel.corrections.base import digest_of
from evenkeel.corrections.plan import OutputEdit, plain_plan
from evenkeel.errors import CalibrationError, MetricError
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.sampling.step_law import StepLaw

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Gain(Correction):
    """Multiplies every output; written to the public contract by someone else."""

    name = "gain"
    references = ("here",)
    stages = ("output",)
    made_for = None

    def __init__(self, gain: float) -> None:
        self.gain = gain

    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        gain = torch.full((law.steps, 1), self.gain, dtype=torch.float64)
        return plain_plan(law, edit=OutputEdit.of(gain))


@dataclass(frozen=True)
class Table(Correction):
    """Holds more numbers than the text of a tensor shows."""

    values: Tensor
    name = "table"
    references = ("here",)
    stages = ("output",)
    made_for = None

    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        return plain_plan(law, edit=OutputEdit.of(self.values[: law.steps, None]))


@pytest.fixture(scope="module")
def tiny() -> TinyPipeline:
    return ALL["dit"]()


@pytest.fixture(scope="module")
def quantized(tiny: TinyPipeline) -> Any:
    return quantize_module(tiny.model, QuantizerSpec.parse("w4a8-g8"))[0]


def tables() -> tuple[Table, Table]:
    """Two that differ in one of 2,000 numbers."""
    values = torch.ones(2000, dtype=torch.float64)
    other = values.clone()
    other[1000] = 1.5
    return Table(values), Table(other)


def test_corrections_of_outside_authors_are_told_apart() -> None:
    one, other = tables()
    found = [digest_of(c) for c in (Gain(1.05), Gain(1.5), one, other, None)]
    assert len(set(found)) == len(found)
    assert digest_of(Gain(1.05)) == found[0] and digest_of(tables()[1]) == found[3]


def test_images_of_another_gain_are_not_taken_for_those_of_this_one(
    tiny: TinyPipeline, quantized: Any, tmp_path: Path
) -> None:
    def images(gain: float, folder: Path) -> Tensor:
        return compare(
            tiny.pipe,
            [Arm("plain", quantized), Arm("gain", quantized, Gain(gain))],
            prompts=[3, 7],
            num_inference_steps=3,
            guidance_scale=tiny.guidance_scale,
            folder=folder,
            progress=False,
        ).images["gain"]

    first = images(1.05, tmp_path / "one")
    assert torch.equal(images(1.05, tmp_path / "one"), first)
    assert not torch.equal(images(1.5, tmp_path / "other"), first)
    with pytest.raises(MetricError, match="other prompts or settings"):
        images(1.5, tmp_path / "one")


class _StoppedError(Exception):
    pass


def test_a_calibration_is_not_resumed_along_another_gain(
    tiny: TinyPipeline, quantized: Any, tmp_path: Path
) -> None:
    calls = itertools.count()

    def stop(*_: Any) -> None:
        if next(calls) == 7:  # in the second batch
            raise _StoppedError

    def run(gain: float) -> None:
        evenkeel.calibrate(
            tiny.pipe,
            quantized=quantized,
            prompts=[3, 7, 3, 7],
            num_inference_steps=3,
            guidance_scale=tiny.guidance_scale,
            batch_size=1,
            trajectory="corrected",
            correction=Gain(gain),
            resume=tmp_path / "parts",
            progress=False,
        )

    handle = quantized.register_forward_hook(stop)
    with pytest.raises(_StoppedError):
        run(1.05)
    handle.remove()
    assert list((tmp_path / "parts").glob("part-*"))
    with pytest.raises(CalibrationError, match="another calibration"):
        run(1.5)
