"""Corrections in their authors' form: what differs from our defaults, and that it acts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers as d
import pytest
import torch
from tiny_pipelines import dit

from evenkeel import calibrate, fit_tac, load
from evenkeel.corrections.catalogue import ALL, CLOSED_LOOP, EVIDENCE, FORMS, available, root_of
from evenkeel.corrections.reconstruction import Reconstruction
from evenkeel.errors import CalibrationError
from evenkeel.fitting.closed_loop.forms import RULES
from evenkeel.hosts.scheduler.probing import probe_scheduler
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.sampling.step_law import StepLaw
from evenkeel.testing import drawn_evidence


def law_of(scheduler: d.SchedulerMixin) -> StepLaw:
    scheduler.set_timesteps(5)
    return probe_scheduler(scheduler)


EULER = law_of(d.EulerDiscreteScheduler())
FLOW = law_of(
    d.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
)


OF_EVIDENCE = [name for name in FORMS if root_of(name) == EVIDENCE]


@pytest.mark.parametrize("name", OF_EVIDENCE)
def test_every_form_is_another_one_of_an_entry(name: str) -> None:
    entry, _, form = name.partition(":")
    assert entry in ALL and form in ("published", "released")
    made, reasons = available(drawn_evidence(EULER, 0.02), {}, forms=True)
    assert name in made, reasons
    assert made[name].name == made[entry].name and made[name].digest() != made[entry].digest()
    assert name not in available(drawn_evidence(EULER, 0.02), {})[0]


def test_q_drift_as_published_stretches_the_last_step_too() -> None:
    made, _ = available(drawn_evidence(EULER, 0.3), {}, forms=True)
    ours, theirs = (made[n].plan(EULER).factor for n in ("q-drift", "q-drift:published"))
    assert bool((ours[-1] == 1).all()) and bool((theirs[-1] > 1).all())
    assert torch.equal(ours[1], theirs[1])


def test_where_the_network_predicts_flow_the_raw_output_is_what_is_given() -> None:
    evidence = drawn_evidence(FLOW, 0.3)
    made, _ = available(evidence, {}, forms=True)
    noise, raw = (
        evidence.variance(per_channel=True, kind="conditional", trim=None, on=on)
        for on in ("epsilon", "output")
    )
    ratio = (made["q-drift:published"].plan(FLOW).factor - 1) / (
        made["q-drift"].plan(FLOW).factor - 1
    )
    assert torch.allclose(ratio[0], (raw / noise)[0])  # the first step has one output
    assert not torch.allclose(raw, noise)


def test_cnc_as_published_drops_the_intercept() -> None:
    made, _ = available(drawn_evidence(EULER, 0.3), {}, forms=True)
    ours, theirs = (made[n].plan(EULER).edit for n in ("cnc", "cnc:published"))
    assert ours is not None and theirs is not None
    assert torch.equal(ours.gain, theirs.gain)
    assert bool((ours.bias != 0).any()) and bool((theirs.bias == 0).all())


def test_tacs_forms_are_fitted_by_name_and_travel_with_the_record(tmp_path: Path) -> None:
    tiny = dit()
    quantized, _ = quantize_module(tiny.model, QuantizerSpec(4))
    asked: dict[str, Any] = {"prompts": [3, 7], "num_inference_steps": 3, "call": tiny.call}
    asked |= {"quantized": quantized, "guidance_scale": 2.0, "progress": False}
    names = [name for name in FORMS if root_of(name) == CLOSED_LOOP]
    assert {*names, "tac", "tac-ibc", "stepbaq"} == RULES.keys()
    record = calibrate(tiny.pipe, closed_loop=names, **asked)
    loaded, reasons = load(record.save(tmp_path / "record")).corrections()
    assert loaded.keys() >= {*names} and "--closed-loop" in reasons["tac"]
    assert len({loaded[name].digest() for name in names}) == len(names)
    for name in names:
        assert loaded[name].digest() == record.closed_loop.corrections[name].digest()
    published, own = (
        fit_tac(tiny.pipe, reconstruction=how, **asked)
        for how in (Reconstruction.published(), Reconstruction.least_squares())
    )
    assert loaded["tac:published"].digest() == published.digest()
    assert loaded["tac-least-squares"].digest() == own.digest()
    with pytest.raises(CalibrationError, match=r"tac-magic cannot be fitted.*tac-ner"):
        calibrate(tiny.pipe, closed_loop=["tac-magic"], **asked)
