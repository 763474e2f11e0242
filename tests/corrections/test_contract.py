"""The contract of a correction, as an outside author meets it: told apart, or refused."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_corrections import MADE
from tiny_pipelines import ALL, TinyPipeline, generate
from torch import Tensor, nn

import evenkeel
from evenkeel.comparing.comparison import compare
from evenkeel.comparing.generation import Arm
from evenkeel.corrections import Composite, Correction, QDrift, Readout, SamplerPlan
from evenkeel.corrections.base import digest_of
from evenkeel.corrections.plan import OutputEdit, plain_plan
from evenkeel.errors import CalibrationError, Incompatible, StorageError
from evenkeel.hosts.scheduler.interception import installed
from evenkeel.hosts.scheduler.probing import probe_scheduler
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.sampling.step_law import StepLaw
from evenkeel.testing import SOME, drawn_evidence
from evenkeel.testing.synthetic import evidence_of

STEPS = 4
ADVICE = r"subclass of evenkeel\.corrections\.Correction"
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
    with pytest.raises(StorageError, match="other prompts or settings"):
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
    with pytest.raises(StorageError, match="another calibration, which differs in correction"):
        run(1.5)


# ---- what a digest sees, and what it refuses


@dataclass(frozen=True)
class Holds(Correction):
    """Holds one thing of any kind."""

    thing: Any
    name = "holds"
    references = ("here",)
    stages = ()
    made_for = None

    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        return plain_plan(law)


class Colour(Enum):
    RED, BLUE = 1, 2


@dataclass
class Slotted:
    __slots__ = ("values",)
    values: Any


class Written:
    """Somebody's object, whose content nobody can see."""


ONES = torch.ones(3)
PAIRS = {
    "a number by its type": (1, 1.0),
    "a truth is no number": (True, 1),
    "the sign of zero": (0.0, -0.0),
    "text is no number": ("1", 1),
    "nothing is no text": (None, "None"),
    "the dtype of a tensor": (ONES, ONES.double()),
    "its shape": (ONES, ONES[None]),
    "its bytes in bfloat16": (ONES.bfloat16(), 2 * ONES.bfloat16()),
    "a truth in it": (ONES > 0, ONES < 0),
    "an empty one by its dtype": (torch.zeros(0), torch.zeros(0).half()),
    "a tensor is no array": (ONES, ONES.numpy()),
    "the shape of an array": (np.zeros((2, 3)), np.zeros((3, 2))),
    "one of its elements": (np.arange(2000), np.r_[np.arange(1999), 0]),
    "the order in a list": ([1, 2], [2, 1]),
    "a list is no tuple": ([1, 2], (1, 2)),
    "where lists end": (([1], [2, 3]), ([1, 2], [3])),
    "where texts end": (("ab", "c"), ("a", "bc")),
    "a value of a mapping": ({"a": 1}, {"a": 2}),
    "a key of it": ({"a": 1}, {"b": 1}),
    "an element of a set": ({1, 2}, {1, 3}),
    "a member of an enumeration": (Colour.RED, Colour.BLUE),
    "a field of a dataclass in a list": ([Slotted(1)], [Slotted(2)]),
    "another correction's field": (Gain(1.0), Gain(1.5)),
    "a correction's class": (Gain(1.0), Table(ONES)),
    "a device by its number": (torch.device("cuda:0"), torch.device("cuda:1")),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_digest_sees(name: str) -> None:
    one, other = (Holds(thing) for thing in PAIRS[name])
    assert one.digest() != other.digest()
    assert copy.deepcopy(one).digest() == one.digest()


def test_what_is_equal_has_one_digest() -> None:
    assert Holds({"a": 1, "b": 2}).digest() == Holds({"b": 2, "a": 1}).digest()
    assert Holds({3, 1, 2}).digest() == Holds({1, 2, 3}).digest()
    rows = torch.arange(6.0).reshape(2, 3)
    assert Holds(rows.T).digest() == Holds(rows.T.contiguous()).digest()
    assert Holds(nn.Parameter(ONES)).digest() == Holds(nn.Parameter(ONES.clone())).digest()


def test_a_digest_sees_what_a_class_took_along() -> None:
    def louder(gain: float) -> Correction:
        class Louder(Gain):
            def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
                return Gain(gain).plan(law)

        return Louder(1.0)

    def named(gain: float) -> Correction:
        return type("Louder", (Gain,), {"gain_of_the_class": gain})(1.0)

    for make in (louder, named):
        assert make(1.05).digest() != make(1.5).digest()
        assert make(1.05).digest() == make(1.05).digest()


def test_a_digest_sees_attributes_that_are_no_fields() -> None:
    one, other = Holds(1), Holds(1)
    object.__setattr__(other, "later", 2.0)
    assert one.digest() != other.digest()


@pytest.mark.parametrize(
    ("thing", "found"),
    [
        (lambda x: x, "function"),
        (print, "builtin_function"),
        (Written(), "Written"),
        (Slotted, "type"),
        ({"a": [Written()]}, r"Holds\.thing\['a'\]\[0\] is a .*Written"),
        (np.array([Written()]), "ndarray"),
        (torch.ones(2, 2).to_sparse(), "Tensor"),
        (torch.empty(2, device="meta"), "Tensor"),
        (nn.Linear(1, 1), "Linear"),
        (iter([1]), "list_iterator"),
    ],
    ids=[
        "lambda",
        "builtin",
        "object",
        "class",
        "nested",
        "array of objects",
        "sparse",
        "meta",
        "module",
        "iterator",
    ],
)
def test_what_a_digest_cannot_see_is_refused(thing: Any, found: str) -> None:
    with pytest.raises(CalibrationError, match=rf"Holds\.thing.*{found}|{found}.*cannot see"):
        Holds(thing).digest()


def test_a_cached_result_does_not_count() -> None:
    evidence = evidence_of(SOME[0], 0.3)
    fresh = replace(evidence)
    assert evidence.by_channel is not None and "by_channel" not in fresh.__dict__
    assert QDrift(evidence).digest() == QDrift(fresh).digest()


# ---- what only looks like a correction


class OldProtocol:
    """What the contract was before: three members, and the rest was guessed."""

    name, references = "old", ()

    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        return plain_plan(law)


@pytest.mark.parametrize("thing", [OldProtocol(), OldProtocol, QDrift, "q-drift"])
def test_what_only_looks_like_one_is_refused_and_told_what_to_do(
    tiny: TinyPipeline, quantized: Any, tmp_path: Path, thing: Any
) -> None:
    asked: dict[str, Any] = {"prompts": [3, 7], "num_inference_steps": 3, "progress": False}
    with pytest.raises(Incompatible, match=ADVICE):
        evenkeel.apply(tiny.pipe, thing)
    arms = [Arm("plain", quantized), Arm("corrected", quantized, thing)]
    with pytest.raises(Incompatible, match=ADVICE):
        compare(tiny.pipe, arms, folder=tmp_path, **asked)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(Incompatible, match=ADVICE):
        evenkeel.calibrate(
            tiny.pipe, quantized=quantized, trajectory="corrected", correction=thing, **asked
        )
    assert installed(tiny.pipe.scheduler) == []


def test_who_declares_too_little_cannot_be_made() -> None:
    class Silent(Correction):
        name = "silent"

    with pytest.raises(TypeError, match=r"abstract .*made_for.*plan.*references.*stages"):
        Silent()  # type: ignore[abstract]


def test_a_stage_that_is_not_declared_is_refused_in_the_run(tiny: TinyPipeline) -> None:
    class Undeclared(Gain):
        stages = ("increment",)  # type: ignore[assignment]

    refused = pytest.raises(Incompatible, match=r"'increment'.*also changes output")
    with evenkeel.applied(tiny.pipe, Undeclared(1.1)), refused:
        generate(tiny, steps=3)
    assert bool(torch.isfinite(generate(tiny, steps=3)).all())


def test_heads_that_are_declared_must_be_there(tiny: TinyPipeline) -> None:
    class Headless(Gain):
        stages = ("head", "output")  # type: ignore[assignment]

    with pytest.raises(Incompatible, match="declares the stage 'head' but no heads"):
        evenkeel.apply(tiny.pipe, Headless(1.1))


# ---- composites


def test_a_composite_changes_the_head_of_its_readout(tiny: TinyPipeline) -> None:
    plain = generate(tiny, steps=STEPS)
    scheduler = copy.deepcopy(tiny.pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    law = probe_scheduler(scheduler)
    readout = MADE["readout"](drawn_evidence(law, 0.3))
    assert isinstance(readout, Readout)
    gain = Gain(1.1)
    allow = ("denoiser", "scheduler", "guidance")
    images = []
    for correction in (readout, gain, Composite((gain, readout)), replace(readout, then=gain)):
        with evenkeel.applied(tiny.pipe, correction, allow=allow):
            images.append(generate(tiny, steps=STEPS))
    assert torch.equal(images[2], images[3])
    assert not any(torch.equal(a, b) for a, b in itertools.combinations([plain, *images[:3]], 2))
    assert torch.equal(generate(tiny, steps=STEPS), plain)
    assert Composite((gain, readout)).stages == ("head", "output")
    with pytest.raises(Incompatible, match="both change the denoiser's head"):
        evenkeel.apply(tiny.pipe, Composite((readout, readout)), allow=allow)
