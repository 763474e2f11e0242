"""The check before generation: its statistics against brute force, its verdicts where they are known."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
import torch
from tiny_pipelines import ALL

from evenkeel import zoo
from evenkeel.applying import apply, remove, summary
from evenkeel.comparing.generation import Arm
from evenkeel.comparing.marginal_check import marginal_check
from evenkeel.corrections import Identity
from evenkeel.corrections.base import Correction
from evenkeel.corrections.plan import OutputEdit, plain_plan
from evenkeel.errors import CalibrationError, EvenkeelError, UnsupportedSampler
from evenkeel.estimate import Estimate
from evenkeel.hosts.scheduler.interception import installed, plain_class
from evenkeel.metrics.state_scores import (
    HELP,
    HURT,
    NEUTRAL,
    PRACTICAL,
    SCORES,
    scores_of,
    shared_part,
    verdict_of,
)
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.reports.verdicts import check_text
from evenkeel.statistics.error_structure import radial_spectrum
from evenkeel.statistics.marginals import (
    PairedRun,
    PairedStates,
    log_error_ratio,
    mean_of,
    systematic_part,
)
from evenkeel.zoo.evaluation import sample_prompts

EPS = torch.finfo(torch.float32).eps


def random_states(prompts=6, steps=3, seed=0, size=0.1):
    """Full-precision states and another sampler's, per step, (n, 4, 6, 6) float32."""
    noise = torch.Generator().manual_seed(seed)
    x = [torch.randn(prompts, 4, 6, 6, generator=noise) for _ in range(steps)]
    return x, [0.9 * t + size * torch.randn(t.shape, generator=noise) + 0.05 for t in x]


def paired(x, y, rows=slice(None)) -> PairedStates:
    run = PairedRun()
    for reference, state in zip(x, y, strict=True):
        run.add(reference[rows], state[rows], lambda t: t.flatten(2), True)
    return run.result()


# --- statistics ---


def brute_systematic(error):
    d = error.double()
    pairs = list(itertools.permutations(range(len(d)), 2))
    return sum(float((d[i] * d[j]).mean()) for i, j in pairs) / len(pairs)


def test_systematic_part_is_the_mean_over_pairs_of_different_prompts():
    error = torch.randn(7, 11, generator=torch.Generator().manual_seed(1)) + 0.3
    part = systematic_part(error)
    assert part(None) == pytest.approx(brute_systematic(error), rel=1e-12)
    for i in range(7):
        rest = torch.cat([error[:i], error[i + 1 :]])
        assert part(i) == pytest.approx(brute_systematic(rest), rel=1e-10)


def test_systematic_part_is_unbiased_where_the_plain_square_is_not():
    noise = torch.Generator().manual_seed(2)
    error = torch.randn(400, 5, 64, generator=noise) + 0.5
    parts = torch.tensor([systematic_part(e)(None) for e in error])
    plain = error.mean(1).square().mean(1)
    spread = float(parts.std()) / 400**0.5
    assert float(parts.mean()) == pytest.approx(0.25, abs=4 * spread)
    assert float(plain.mean()) > 0.25 + 20 * spread  # 1/5 of the noise is still in it


def test_systematic_part_needs_three_prompts():
    with pytest.raises(CalibrationError, match="at least 3"):
        systematic_part(torch.ones(2, 4))


def test_log_error_ratio_counts_rounding_as_equal():
    floor = torch.full((3,), 1e-14, dtype=torch.float64)
    mine = torch.tensor([0.0, 1e-20, 2.0], dtype=torch.float64)
    theirs = torch.tensor([0.0, 1e-18, 1.0], dtype=torch.float64)
    assert log_error_ratio(mine, theirs, floor).tolist() == [0.0, 0.0, pytest.approx(math.log(2))]


def test_curves_are_what_they_say():
    x, y = random_states()
    curves = paired(x, y).curves()
    for k, (reference, state) in enumerate(zip(x, y, strict=True)):
        e, s = (t.double().transpose(0, 1).flatten(1) for t in (reference, state))
        assert torch.allclose(curves.mean_shift[k], (s - e).mean(1))
        assert torch.allclose(curves.variance_ratio[k], s.var(1) / e.var(1))
        correlation = torch.stack(
            [torch.corrcoef(torch.stack(p))[0, 1] for p in zip(e, s, strict=True)]
        )
        assert torch.allclose(curves.correlation[k], correlation)
        assert float(curves.squared_error[k]) == pytest.approx(float((s - e).square().mean()))
        power = [radial_spectrum(t[:, None]).mean((0, 1)) for t in (state, reference)]
        assert torch.allclose(curves.spectrum_ratio[k], power[0] / power[1])


def test_batches_merge_to_the_whole():
    x, y = random_states()
    whole = paired(x, y)
    merged = PairedStates.joined([paired(x, y, slice(0, 4)), paired(x, y, slice(4, 6))])
    assert torch.allclose(whole.squared_error, merged.squared_error, rtol=1e-12)
    assert torch.equal(whole.final_error, merged.final_error)
    for name in ("mean_shift", "variance_ratio", "correlation", "squared_error", "spectrum_ratio"):
        a, b = getattr(whole.curves(), name), getattr(merged.curves(), name)
        assert torch.allclose(a, b, rtol=1e-12), name


def test_descriptors_are_channel_means_and_spreads():
    x, y = random_states()
    for found, state in zip(paired(x, y).descriptors(), (x[-1], y[-1]), strict=True):
        flat = state.double().flatten(2)
        expected = torch.cat([flat.mean(2), flat.std(2, correction=0)], 1)
        assert torch.allclose(found, expected)


def test_states_that_differ_in_shape_or_are_not_finite_are_refused():
    x, y = random_states()
    with pytest.raises(CalibrationError, match="different shape"):
        paired(x, [t[:, :2] for t in y])
    y[1][0, 0, 0, 0] = math.nan
    with pytest.raises(CalibrationError, match="after step 1 the state is not finite"):
        paired(x, y)


# --- scores and verdict ---


def test_the_shared_part_is_what_all_prompts_errors_have_in_common():
    noise = torch.Generator().manual_seed(5)
    x = [torch.randn(300, 2, 4, 4, generator=noise) for _ in range(2)]
    common = torch.randn(1, 2, 4, 4, generator=noise)
    y = [t + common + torch.randn(t.shape, generator=noise) for t in x]
    found = shared_part(paired(x, y))
    true = float(common.square().mean() / (1 + common.square().mean()))
    assert found.low < true < found.high and found.high - found.low < 0.1
    alone = shared_part(paired(x, [t + torch.randn(t.shape, generator=noise) for t in x]))
    assert abs(alone.value) < 0.01


def test_intervals_are_delete_one_jackknife():
    x, q = random_states(prompts=8)
    _, a = random_states(prompts=8, seed=3, size=0.05)
    a = [s + t for s, t in zip(x, (v - u for u, v in zip(x, a, strict=True)), strict=True)]
    mine, theirs = paired(x, a), paired(x, q)
    scores = scores_of(mine, theirs, EPS)

    def by_hand(keep):
        errors = [(s[-1] - x[-1])[keep].double().flatten(1) for s in (a, q)]
        squared = [e.square().mean(1) for e in errors]
        shared = brute_systematic(errors[0]) - brute_systematic(errors[1])
        ratio = float((squared[0] / squared[1]).log().mean())
        return torch.tensor([ratio, shared / float(squared[1].mean())])

    every = list(range(8))
    whole = by_hand(every)
    left_out = torch.stack([by_hand([j for j in every if j != i]) for i in every])
    stderr = (7 / 8 * (left_out - left_out.mean(0)).square().sum(0)).sqrt()
    for i, name in enumerate(("squared_error", "systematic")):
        assert scores[name].value == pytest.approx(float(whole[i]), rel=1e-4)
        assert scores[name].stderr == pytest.approx(float(stderr[i]), rel=1e-4)


def test_marginal_score_sees_lost_contrast():
    noise = torch.Generator().manual_seed(4)
    x = torch.randn(24, 4, 6, 6, generator=noise)
    d = 0.3 * torch.randn(x.shape, generator=noise)
    quantized, faded = paired([x], [x + d]), paired([x], [0.7 * (x + d)])
    scores = scores_of(faded, quantized, EPS)
    assert scores["marginal"].low > 0
    assert scores_of(quantized, quantized, EPS)["marginal"].value == 0


def test_nothing_to_correct_is_refused():
    x, y = random_states()
    with pytest.raises(CalibrationError, match="nothing to correct"):
        scores_of(paired(x, y), paired(x, x), EPS)


def estimate(value, reach, n=32):
    return Estimate(value, reach / 2.04, value - reach, value + reach, n)


UNSURE = estimate(0.0, 0.1)


@pytest.mark.parametrize(
    ("squared_error", "systematic", "expected"),
    [
        (estimate(-0.2, 0.1), UNSURE, HELP),
        (estimate(0.2, 0.1), UNSURE, HURT),
        (UNSURE, UNSURE, NEUTRAL),
        (estimate(-PRACTICAL / 2, 0.001), UNSURE, NEUTRAL),
        (estimate(PRACTICAL / 2, 0.001), UNSURE, NEUTRAL),
        (estimate(-0.2, 0.1), estimate(0.05, 0.01), NEUTRAL),
        (estimate(0.02, 0.1), estimate(0.05, 0.01), HURT),
        (estimate(-0.02, 0.1), estimate(0.05, 0.01), NEUTRAL),
    ],
)
def test_verdicts(squared_error, systematic, expected):
    scores = {"squared_error": squared_error, "systematic": systematic, "marginal": UNSURE}
    verdict, confidence = verdict_of(scores)
    assert verdict == expected
    assert 0 < confidence <= 1


def test_confidence_grows_with_the_evidence():
    found = [
        verdict_of({"squared_error": estimate(v, 0.1), "systematic": UNSURE, "marginal": UNSURE})
        for v in (-0.11, -0.15, -0.3)
    ]
    assert [verdict for verdict, _ in found] == [HELP] * 3
    assert all(a[1] < b[1] for a, b in pairwise(found))
    assert 0.95 < found[0][1] < 0.98


def test_mean_of_leaves_one_out():
    values = torch.tensor([1.0, 4.0, 7.0])
    assert [mean_of(values)(i) for i in (None, 0, 1, 2)] == [4.0, 5.5, 4.0, 2.5]


# --- on a real pipeline ---


@dataclass(frozen=True)
class Scaled(Correction):
    """Multiplies every output."""

    gain: float
    name = "scaled"
    references = ()
    stages = ("output",)
    made_for = None

    def plan(self, law, *, allow_range=False):
        gain = torch.full((law.steps, 1), self.gain, dtype=torch.float64)
        return plain_plan(law, edit=OutputEdit.of(gain))


@dataclass
class Failing(Correction):
    """Cannot be planned."""

    error: BaseException
    name = "failing"
    references = ()
    stages = ()
    made_for = None
    asked: list[int] = field(default_factory=list)

    def plan(self, law, *, allow_range=False):
        self.asked.append(law.steps)
        raise self.error


@pytest.fixture(scope="module")
def pipe():
    return zoo.load("pixart-sigma")


@pytest.fixture(scope="module")
def quantized(pipe):
    return quantize_module(pipe.transformer, QuantizerSpec.parse("w3a4-g32-r16"))[0]


def arms_of(pipe, quantized, **corrections):
    plain = [Arm("full-precision", pipe.transformer), Arm("quantized", quantized)]
    return plain + [Arm(name, quantized, c) for name, c in corrections.items()]


OPTIONS = {"num_inference_steps": 6, "guidance_scale": 4.5, "progress": False}


@pytest.fixture(scope="module")
def failing():
    return Failing(UnsupportedSampler("this sampler cannot be corrected."))


@pytest.fixture(scope="module")
def check(pipe, quantized, failing):
    arms = arms_of(pipe, quantized, identity=Identity(), sabotage=Scaled(0.8), failing=failing)
    return marginal_check(
        pipe, [*arms, Arm("oracle", pipe.transformer)], prompts=sample_prompts(16, 5), **OPTIONS
    )


def test_identity_is_neutral_with_ratio_one(check):
    identity = check["identity"]
    assert identity.verdict == NEUTRAL and identity.confidence == 1
    assert {k: (e.value, e.stderr) for k, e in identity.scores.items()} == dict.fromkeys(
        ("squared_error", "systematic", "marginal"), (0.0, 0.0)
    )
    assert torch.equal(identity.curves.squared_error, check.quantized.squared_error)


def test_full_precision_denoiser_is_expected_to_help(check):
    oracle = check["oracle"]
    assert oracle.verdict == HELP and oracle.confidence > 0.999
    assert not oracle.curves.squared_error.any()
    assert torch.equal(oracle.curves.variance_ratio, torch.ones_like(oracle.curves.variance_ratio))
    assert oracle.scores["marginal"].value == pytest.approx(-1, abs=1e-6)


def test_sabotage_is_expected_to_hurt(check):
    sabotage = check["sabotage"]
    assert sabotage.verdict == HURT and sabotage.confidence > 0.95
    assert sabotage.scores["squared_error"].low > 0
    assert float(check.quantized.squared_error[-1]) < float(sabotage.curves.squared_error[-1])


def test_what_cannot_be_planned_is_listed_and_not_tried_again(check, failing):
    assert check.not_applicable == {"failing": "this sampler cannot be corrected."}
    assert [a.name for a in check.arms] == ["identity", "sabotage", "oracle"]
    assert failing.asked == [6]


def test_curves_cover_every_step_and_time_is_measured(check):
    for arm in check.arms:
        assert arm.curves.squared_error.shape == (6,)
        assert arm.curves.spectrum_ratio.shape[0] == 6
        assert arm.extra_seconds.n == 2  # batches
    assert float(check.quantized.correlation.max()) < 1


def test_json_and_text(check):
    read = json.loads(json.dumps(check.as_dict(), allow_nan=False))
    assert [a["verdict"] for a in read["arms"]] == [NEUTRAL, HURT, HELP]
    assert read["arms"][0]["scores"]["squared_error"]["value"] == 0
    for by in SCORES:
        values = [check[name].scores[by].value for name in read["ranking"][by]]
        assert values == sorted(values)
    assert read["ranking"]["squared_error"] == ["oracle", "identity", "sabotage"]
    assert read["ranking"]["marginal"][0] == "oracle"
    assert -0.5 < read["shared"]["value"] < 1
    text = check_text(check)
    assert "is the same for every prompt" in text
    assert text.index("\noracle ") < text.index("\nidentity ") < text.index("\nsabotage ")
    assert f"By the marginal: {', '.join(read['ranking']['marginal'])}." in text
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert HURT in lines["sabotage"] and "+0.0% [+0.0%, +0.0%]" in lines["identity"]
    assert "-100.0% [-100.0%, -100.0%]" in lines["oracle"]
    assert text.endswith("- failing: this sampler cannot be corrected.")
    empty = replace(check, arms=[], not_applicable={})
    assert check_text(empty).endswith("No correction could be checked.")


def test_ranking_takes_what_is_not_finite_last_and_known_scores_only(check):
    far = Estimate(math.nan, math.nan, math.nan, math.nan, 6)
    oracle = check["oracle"]
    spoilt = replace(oracle, scores={**oracle.scores, "marginal": far})
    others = [spoilt, *(a for a in check.arms if a is not oracle)]
    ranked = replace(check, arms=others).ranked("marginal")
    assert check.ranked("marginal")[0].name == "oracle" == ranked[-1].name
    with pytest.raises(EvenkeelError, match="squared_error, systematic, marginal"):
        check.ranked("beauty")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_pipeline_is_restored_after_an_exception(pipe, quantized, error):
    before, scheduler = pipe.transformer, pipe.scheduler
    config = dict(pipe._progress_bar_config) if hasattr(pipe, "_progress_bar_config") else {}
    apply(pipe, Scaled(0.9))
    kept = installed(scheduler)
    try:
        with pytest.raises(type(error)):
            marginal_check(
                pipe,
                arms_of(pipe, quantized, failing=Failing(error)),
                prompts=sample_prompts(3, 5),
                **{**OPTIONS, "num_inference_steps": 2},
            )
        assert pipe.transformer is before and pipe.scheduler is scheduler
        assert installed(scheduler) == kept and summary(pipe).correction == "scaled"
    finally:
        remove(pipe)
    assert type(scheduler) is plain_class(scheduler)
    assert pipe._progress_bar_config.get("disable") == config.get("disable")


def test_an_applied_correction_is_set_aside(pipe, quantized):
    options = {**OPTIONS, "num_inference_steps": 2, "prompts": sample_prompts(3, 5)}
    arms = arms_of(pipe, quantized)
    plain = marginal_check(pipe, arms, **options)
    apply(pipe, Scaled(0.5))
    try:
        again = marginal_check(pipe, arms, **options)
    finally:
        remove(pipe)
    assert torch.equal(plain.quantized.squared_error, again.quantized.squared_error)


@pytest.mark.parametrize(("name", "prompts"), [("dit", [1, 2, 3, 4]), ("flux", list("abcd"))])
def test_doubled_rows_and_packed_latents(name, prompts):
    tiny = ALL[name]()
    model = quantize_module(tiny.model, QuantizerSpec.parse("w4a8-g8"))[0]
    options = {
        "prompts": prompts,
        "num_inference_steps": 2,
        "guidance_scale": tiny.guidance_scale,
        "call": {k: v for k, v in tiny.call.items() if k != "output_type"},
        "progress": False,
    }
    arms = arms_of(tiny.pipe, model, identity=Identity())
    check = marginal_check(tiny.pipe, arms, batch_size=3, **options)
    # Four prompts are four independent rows, however often the pipeline repeats them.
    assert {e.n for e in check["identity"].scores.values()} == {4}
    assert (check.quantized.spectrum_ratio is None) == (name == "flux")
    assert float(check.quantized.squared_error[-1]) > 0


def test_requests_that_make_no_sense_are_refused(pipe, quantized):
    arms = arms_of(pipe, quantized)
    with pytest.raises(CalibrationError, match="full-precision one without a correction first"):
        marginal_check(pipe, arms[:1], prompts=["a", "b", "c"], **OPTIONS)
    with pytest.raises(CalibrationError, match="at least 3 prompts"):
        marginal_check(pipe, arms, prompts=["a", "b"], **OPTIONS)
    with pytest.raises(CalibrationError, match="nothing to correct"):
        marginal_check(
            pipe,
            arms_of(pipe, pipe.transformer, identity=Identity()),
            prompts=sample_prompts(3, 5),
            **{**OPTIONS, "num_inference_steps": 2},
        )
