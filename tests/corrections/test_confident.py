"""The guard: steps on whose stretch the calibration prompts do not agree are left alone."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from gaussian_data import PIPELINE, SCALARS, error_variance, euler, evidence

import evenkeel
from evenkeel import zoo
from evenkeel.corrections import SelfConsistent
from evenkeel.corrections.confident import NOTE, Confident, resampled_factors
from evenkeel.corrections.covariance_drift import CovarianceDrift
from evenkeel.corrections.dns import DNS
from evenkeel.corrections.exact_drift import ExactDrift
from evenkeel.corrections.q_drift import QDrift
from evenkeel.errors import CalibrationError, Incompatible
from evenkeel.fitting import calibrate
from evenkeel.hosts.actuators.corrector import Corrector
from evenkeel.hosts.scheduler.interception import install, uninstall
from evenkeel.hosts.scheduler.probing import probe_scheduler
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.statistics.moments import PairedMoments
from evenkeel.zoo.evaluation import sample_prompts

STEPS = 12


def of_prompts(law, gains):
    """One prompt for each gain of the error; little noise beside it."""
    errors = error_variance(law, 1e-6)
    each = [evidence(law, 1.0, errors, 0.0, gain) for gain in gains]
    moments = PairedMoments.joined([e.moments for e in each])
    return replace(each[0], moments=moments, gram=torch.cat([e.gram for e in each]))


def test_a_gain_that_all_prompts_show_is_corrected_and_one_that_changes_sign_is_not():
    law = probe_scheduler(euler(STEPS))
    rng = np.random.default_rng(0)
    agreed = CovarianceDrift(of_prompts(law, 0.05 + 0.005 * rng.standard_normal(16)))
    disputed = CovarianceDrift(of_prompts(law, 0.05 * rng.choice([-1, 1], 16)))
    kept, left = Confident(agreed).plan(law), Confident(disputed).plan(law)
    assert torch.equal(kept.factor, agreed.plan(law).factor) and not kept.is_identity
    assert NOTE not in kept.explanations
    moved = disputed.plan(law).factor != 1
    assert moved.any() and torch.equal(left.factor, torch.ones_like(left.factor))
    assert left.is_identity
    assert [n == NOTE for n in left.explanations] == moved.any(-1).tolist()


def test_what_is_left_alone_is_the_samplers_own_step_bit_for_bit():
    law = probe_scheduler(euler(STEPS))
    signs = np.random.default_rng(0).choice([-1, 1], 16)
    guarded = Confident(CovarianceDrift(of_prompts(law, 0.05 * signs)))

    def run(correction):
        scheduler = euler(STEPS)
        if correction is not None:
            install(scheduler, Corrector(correction, PIPELINE, layout=SCALARS))
        generator = torch.Generator().manual_seed(0)
        x = 14.6 * torch.randn(3, 1, 1, 1, generator=generator)
        for t in scheduler.timesteps:
            m = 0.1 * scheduler.scale_model_input(x, t)
            x = scheduler.step(m, t, x, return_dict=False)[0]
        uninstall(scheduler)
        return x

    assert torch.equal(run(guarded), run(None))
    assert not torch.equal(run(guarded.correction), run(None))


def test_one_channel_may_be_sure_where_another_is_not():
    law = probe_scheduler(euler(STEPS))
    rng = np.random.default_rng(0)
    sure = of_prompts(law, np.full(16, 0.05))
    unsure = of_prompts(law, 0.05 * rng.choice([-1, 1], 16))
    both = replace(
        sure,
        moments=type(sure.moments)(
            *(
                torch.cat([getattr(sure.moments, f), getattr(unsure.moments, f)], -1)
                for f in sure.moments.__dataclass_fields__
            )
        ),
    )
    correction = CovarianceDrift(both)
    plain, plan = correction.plan(law), Confident(correction).plan(law)
    assert torch.equal(plan.factor[:, 0], plain.factor[:, 0])
    assert (plan.factor[:, 1] == 1).all() and (plain.factor[:, 1] != 1).any()
    assert bool(plan.active.any())
    changed = plan.factor[:, 0] != 1
    assert (plan.base[changed, 1] == 1).all()
    assert (plan.outputs[changed, :, 1] == 0).all() and (plan.samples[changed, :, 1] == 0).all()


@pytest.mark.parametrize("rule", [partial(QDrift, conditional=False), ExactDrift, DNS])
def test_variances_alone_leave_no_doubt_about_the_sign(rule):
    law = probe_scheduler(euler(STEPS))
    correction = rule(of_prompts(law, np.zeros(4)))
    plan, plain = Confident(correction).plan(law), correction.plan(law)
    assert (plain.factor > 1).any() and torch.equal(plan.factor, plain.factor)
    assert (resampled_factors(correction, law, 20) >= 1).all()


def test_on_a_real_record_it_keeps_a_part_of_the_steps():
    pipe, twin = zoo.load("pixart-sigma"), zoo.twin("pixart-sigma")
    quantized, _ = quantize_module(pipe.transformer, QuantizerSpec.parse("w4a4-g32-r16"))
    record = calibrate(
        pipe,
        quantized=quantized,
        prompts=sample_prompts(6, 0),
        num_inference_steps=6,
        guidance_scale=twin.guidance_scale,
        batch_size=6,
        progress=False,
    )
    correction = CovarianceDrift(record.evidence)
    plain = correction.plan(record.law)
    plan = Confident(correction, resamples=100).plan(record.law)
    same = plan.factor == plain.factor
    assert ((plan.factor == 1) | same).all() and not same.all()
    strict = Confident(correction, level=0.5, resamples=100).plan(record.law)
    assert (strict.factor == plain.factor).sum() >= same.sum()
    pipe.transformer = quantized
    evenkeel.apply(pipe, Confident(correction), guidance_scale=twin.guidance_scale)
    evenkeel.remove(pipe)
    with pytest.raises(Incompatible, match="guidance"):
        evenkeel.apply(pipe, Confident(correction), guidance_scale=1.5)


def test_it_refuses_what_it_cannot_judge():
    law = probe_scheduler(euler(STEPS))
    known = of_prompts(law, np.full(4, 0.05))
    with pytest.raises(CalibrationError, match="does more than stretch steps"):
        Confident(SelfConsistent(known)).plan(law)
    with pytest.raises(CalibrationError, match="at least two prompts"):
        Confident(QDrift(of_prompts(law, [0.05])))
