"""Every correction keeps what every correction promises, and the check that says so can fail."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import diffusers as d
import numpy as np
import pytest
import torch
from made_corrections import MADE

from evenkeel.corrections import (
    DNS,
    Correction,
    Identity,
    SamplerPlan,
    applicable,
)
from evenkeel.corrections.base import FromEvidence, Tables
from evenkeel.corrections.catalogue import ALL, EVIDENCE
from evenkeel.corrections.plan import OutputEdit, plain_plan
from evenkeel.errors import CalibrationError, EvenkeelError, UnsupportedSampler
from evenkeel.hosts.scheduler.probing import probe_scheduler
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.provenance import Provenance
from evenkeel.testing import LINEAR, SOME, Case, check_correction, drawn_evidence
from evenkeel.testing import check as checks
from evenkeel.testing.scheduler_cases import SD_BETAS
from evenkeel.testing.synthetic import evidence_of, law_of

BASELINES = ("qncd", "epsilon-scaling", "tsr")  # they do not look at an error
# The others have no step law of our form, and say so (tests/sampling).
PROBED = [c for c in LINEAR if c.name != "sa-tau1" and not c.name.startswith("edm")]


@pytest.mark.parametrize("name", ALL)
def test_every_correction_keeps_what_all_of_them_promise(name: str) -> None:
    check_correction(MADE[name], needs_error=name not in BASELINES)


def test_every_entry_has_a_row_in_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "corrections.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall("`([^`]+)`", row)} == ALL.keys()


def test_the_catalogue_of_schedulers_is_whole() -> None:
    assert [c for c in LINEAR if c in checks._linear(LINEAR)] == PROBED
    assert set(SOME) <= set(PROBED)


@pytest.mark.parametrize("case", PROBED, ids=str)
def test_identity_changes_no_bit(case: Case) -> None:
    plain = checks.sampled_with(case, None)
    assert torch.equal(checks.sampled_with(case, Identity()), plain)
    without = MADE["self-consistent"](evidence_of(case, 0.0))
    assert torch.equal(checks.sampled_with(case, without), plain)


@pytest.mark.parametrize("case", PROBED, ids=str)
# One for each part of a plan: edit with noise, edit with absorption, edit with stretch, lags.
@pytest.mark.parametrize("name", ["s-d2-dpm", "ptqd", "self-consistent", "tcec-window-1"])
def test_states_stay_finite_or_the_run_is_refused(case: Case, name: str) -> None:
    correction = MADE[name](evidence_of(case, 0.3))
    found, reasons = applicable({name: correction}, law_of(case))
    assert len(found) + len(reasons) == 1 and all(len(r) > 10 for r in reasons.values())
    if found:
        assert bool(torch.isfinite(checks.sampled_with(case, correction)).all())


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        *((d.DDIMScheduler, n) for n in (1, 2)),
        *((d.DPMSolverMultistepScheduler, n) for n in (1, 2, 3)),
        *((d.EulerAncestralDiscreteScheduler, n) for n in (1, 2, 100)),
        pytest.param(d.DDIMScheduler, 1000, marks=pytest.mark.rarely),
        # Not finite itself at 1,000.
        pytest.param(d.DPMSolverMultistepScheduler, 250, marks=pytest.mark.rarely),
    ],
)
def test_any_number_of_steps(kind: Any, steps: int) -> None:
    options = {"clip_sample": False} if kind is d.DDIMScheduler else {}
    scheduler = kind(**SD_BETAS, **options)
    scheduler.set_timesteps(steps)
    law = probe_scheduler(scheduler)
    evidence = drawn_evidence(law, 0.3, channels=2)
    for name, make in MADE.items():
        correction = make(evidence)
        try:
            plan = correction.plan(law)
        except EvenkeelError:
            continue  # with a reason: the check sees to that
        assert bool(torch.isfinite(plan.factor).all() and torch.isfinite(plan.base).all()), name
        if ALL[name].source == EVIDENCE:  # StepbaQ goes up to the level of the error, however high
            assert float((plan.factor - 1).abs().max()) <= 1.0, name
        assert np.isfinite(plan.outputs.abs().sum().item())


# ---- companions: every part of the check can fail


@dataclass(frozen=True)
class Bent(FromEvidence):
    """Keeps all promises; the classes below break one each."""

    strength: float = 1.0
    name = "bent"
    references: ClassVar[tuple[str, ...]] = ("here",)
    stages: ClassVar[tuple[str, ...]] = ("output",)

    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        error = self.evidence.at(law, self.evidence.by_step.dd, log=False)[0]
        return plain_plan(law, edit=OutputEdit.of(1 + self.strength * error))


def test_the_plain_one_passes() -> None:
    check_correction(Bent, schedulers=SOME)


class Unseen(Bent):
    def digest(self) -> str:
        return self.name


class PartlySeen(Bent):
    def digest(self) -> str:
        return Bent(self.evidence, 1.0).digest()


class OfItsAddress(Bent):
    def digest(self) -> str:
        return f"{super().digest()} {id(self)}"


class FitsAnything(Bent):
    made_for = None  # type: ignore[assignment]


class NotFinite(Bent):
    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        gain = torch.full((law.steps, 1), float("nan"), dtype=torch.float64)
        return plain_plan(law, edit=OutputEdit.of(gain))


class Undeclared(Bent):
    stages = ("increment",)


class UnknownStage(Bent):
    stages = ("output", "prompt")


class HeadlessHead(Bent):
    stages = ("head", "output")


class Nameless(Bent):
    name = ""


class NowhereAtHome(Bent):
    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        raise UnsupportedSampler("this one corrects no sampler that there is")


class WithoutReason(Bent):
    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        raise UnsupportedSampler("no")


class Always(Bent):
    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        return plain_plan(law, edit=OutputEdit.of(torch.full((law.steps, 1), 1.1).double()))


class Forgetful(Bent):
    def tables(self) -> Tables:
        return Tables({"strength": self.strength})

    @classmethod
    def from_tables(cls, tables: Tables, made_for: Provenance) -> Correction:
        return Always(evidence_of(SOME[0], 0.3), tables.described["strength"])


class MissesSteps(Bent):
    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        return replace(super().plan(law), explanations=("",))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Unseen, r"its digest does not see \.evidence"),
        (PartlySeen, r"its digest does not see \.strength"),
        (OfItsAddress, "has two digests"),
        (FitsAnything, "is measured, but made_for is None"),
        (NotFinite, "a plan that is not finite"),
        (Undeclared, r"changes \['output'\] on .*, which it does not declare"),
        (UnknownStage, r"not \['prompt'\]"),
        (HeadlessHead, "heads belong together"),
        (Nameless, "name must be a text"),
        (NowhereAtHome, "is refused everywhere: this one corrects no sampler"),
        (WithoutReason, "is refused without a reason"),
        (Always, "acts without an error"),
        (Forgetful, "another one after saving"),
        (MissesSteps, "explains 1 steps of 10"),
    ],
)
def test_every_part_of_the_check_can_fail(kind: type[Bent], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_correction(kind, schedulers=SOME)


def test_what_is_left_behind_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "remove", lambda pipeline: None)
    with pytest.raises(AssertionError, match=r"leaves another .*class of the scheduler"):
        check_correction(Bent, schedulers=SOME)


def test_states_that_run_away_are_seen() -> None:
    class Louder(Bent):
        def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
            gain = torch.full((law.steps, 1), 1e38, dtype=torch.float64)
            return plain_plan(law, edit=OutputEdit.of(gain))

    with pytest.raises(AssertionError, match="leads to NaN or infinity"):
        check_correction(Louder, schedulers=SOME)


def test_tables_of_what_has_none_are_refused() -> None:
    evidence = evidence_of(SOME[0], 0.3)
    assert evidence.source is not None
    with pytest.raises(CalibrationError, match="made from a record's evidence"):
        DNS.from_tables(Tables(), evidence.source)
