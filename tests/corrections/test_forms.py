"""Corrections in their authors' form: what differs from our defaults, and that it acts."""

from __future__ import annotations

import diffusers as d
import pytest
import torch

from evenkeel.corrections.catalogue import ALL, FORMS, available
from evenkeel.hosts.scheduler.probing import probe_scheduler
from evenkeel.sampling.step_law import StepLaw
from evenkeel.testing import drawn_evidence


def law_of(scheduler: d.SchedulerMixin) -> StepLaw:
    scheduler.set_timesteps(5)
    return probe_scheduler(scheduler)


EULER = law_of(d.EulerDiscreteScheduler())
FLOW = law_of(
    d.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
)


@pytest.mark.parametrize("name", FORMS)
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
