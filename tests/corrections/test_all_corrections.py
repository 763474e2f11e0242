"""Every correction on every linear scheduler: finite, identity without an error, refused with a reason."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch
from scheduler_catalogue import LINEAR, SD_BETAS, Case

from evenkeel.corrections import Identity, applicable
from evenkeel.corrections.catalogue import ALL, EVIDENCE, available
from evenkeel.hosts.actuators.corrector import Corrector
from evenkeel.hosts.pipeline.layouts import LatentLayout
from evenkeel.hosts.scheduler.interception import install
from evenkeel.hosts.scheduler.probing import probe_scheduler
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.error_structure import step_gram
from evenkeel.statistics.evidence import Evidence
from evenkeel.statistics.moments import PairedMoments

LAYOUT = LatentLayout(ndim=4, axis=1, channels=2, patch=1)
NEEDS_NOTHING = ("qncd", "epsilon-scaling", "tsr")  # they do not look at an error
# One for each part of a plan: edit with noise, edit with absorption, edit with stretch, lags.
SAMPLED = {"s-d2-dpm", "ptqd", "self-consistent", "tcec-window-1"}
# The others have no step law of our form, and say so (tests/test_step_law.py).
PROBED = [c for c in LINEAR if c.name != "sa-tau1" and not c.name.startswith("edm")]
MADE = [name for name, entry in ALL.items() if entry.source == EVIDENCE]
MEASURED = [name for name in MADE if name not in NEEDS_NOTHING]


class Pipeline:
    """Stands for the pipeline that a correction is bound to."""


PIPELINE = Pipeline()


def measured(law: StepLaw, error: float, seed: int = 0) -> Evidence:
    """Evidence from drawn outputs: the error has a gain, a bias, heavy tails and memory."""
    generator = torch.Generator().manual_seed(seed)
    shape = (6, law.steps, 2, 64)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    alpha, sigma = (
        torch.from_numpy(v[:-1].copy()).reshape(1, -1, 1, 1) for v in (law.alpha, law.sigma)
    )
    x = x * (alpha**2 + sigma**2).sqrt()
    e = 0.8 * x / (1 + x.std()) + 0.6 * torch.randn(shape, generator=generator, dtype=torch.float64)
    held = torch.randn(6, 1, 2, 64, generator=generator, dtype=torch.float64)
    fresh = torch.randn(shape, generator=generator, dtype=torch.float64)
    r = fresh * (1 + 0.5 * fresh**2) + held
    noise = error * (0.3 * r + 0.05 * e + 0.02)
    return Evidence(
        law.prediction,
        law.alpha[:-1],
        law.sigma[:-1],
        PairedMoments.of(e, noise, x),
        gram=step_gram(noise),
    )


def unrobust(evidence: Evidence) -> dict[str, Any]:
    """All corrections; those with a robust variance take the plain one (no histogram is drawn here)."""
    from evenkeel.corrections import DCNC, DNS, Composite

    made = {n: c for n, c in available(evidence, {})[0].items() if n in MADE}
    made["dcnc"] = DCNC(evidence, estimator="std")
    made["dcnc+dns"] = Composite((made["dcnc"], DNS(evidence)))
    return made


def sample(case: Case, correction: Any) -> torch.Tensor:
    """A run of the real scheduler with a smooth toy denoiser; generator fixed."""
    scheduler = case.ready()
    if correction is not None:
        install(scheduler, Corrector(correction, PIPELINE, layout=LAYOUT))
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 2, 4, 4, generator=generator) * float(
        getattr(scheduler, "init_noise_sigma", 1.0)
    )
    # Not case.make(): some schedulers take a third of a second to make.
    drawing = {"generator": generator} if _takes_generator(scheduler) else {}
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        m = torch.tanh(seen) * 0.7
        x = scheduler.step(m, t, x, return_dict=False, **case.step, **drawing)[0]
    return x


def _takes_generator(scheduler: Any) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters


@pytest.mark.parametrize("case", PROBED, ids=str)
def test_every_correction_is_finite_or_says_why_not(case: Case) -> None:
    law = probe_scheduler(case.ready(), step_kwargs=case.step)
    found, reasons = applicable(unrobust(measured(law, 0.3)), law)
    assert found.keys() | reasons.keys() >= set(MEASURED)
    assert all(len(reason) > 10 for reason in reasons.values())
    for name, correction in found.items():
        plan = correction.plan(law)
        tables = [plan.factor, plan.noise, plan.base, plan.samples, plan.outputs]
        if plan.edit is not None:
            tables += [plan.edit.gain, plan.edit.sample, plan.edit.bias, plan.edit.std]
        assert all(bool(torch.isfinite(t).all()) for t in tables), name
    for name in found.keys() & SAMPLED:
        assert bool(torch.isfinite(sample(case, found[name])).all()), name


@pytest.mark.parametrize("case", PROBED, ids=str)
def test_without_an_error_nothing_changes_bit_for_bit(case: Case) -> None:
    law = probe_scheduler(case.ready(), step_kwargs=case.step)
    made = unrobust(measured(law, 0.0))
    plain = sample(case, None)
    assert torch.equal(sample(case, Identity()), plain)
    found, _ = applicable({name: made[name] for name in MEASURED}, law)
    assert found == {}
    assert torch.equal(sample(case, made["self-consistent"]), plain)


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        *((d.DDIMScheduler, n) for n in (1, 2, 1000)),
        *((d.DPMSolverMultistepScheduler, n) for n in (1, 2, 3, 250)),  # not finite itself at 1,000
        *((d.EulerAncestralDiscreteScheduler, n) for n in (1, 2, 100)),
    ],
)
def test_any_number_of_steps(kind: Any, steps: int) -> None:
    options = {"clip_sample": False} if kind is d.DDIMScheduler else {}
    scheduler = kind(**SD_BETAS, **options)
    scheduler.set_timesteps(steps)
    law = probe_scheduler(scheduler)
    found, reasons = applicable(unrobust(measured(law, 0.3)), law)
    assert len(found) + len(reasons) == len(MADE)
    for name, correction in found.items():
        plan = correction.plan(law)
        assert bool(torch.isfinite(plan.factor).all() and torch.isfinite(plan.base).all()), name
        assert float((plan.factor - 1).abs().max()) <= 1.0, name
        assert np.isfinite(plan.outputs.abs().sum().item())
