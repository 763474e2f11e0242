"""Moments, histograms and spectra against two-pass references, closed forms and laws."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evenkeel.errors import CalibrationError, OutOfRange
from evenkeel.sampling.prediction import PREDICTION_TYPES
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.error_structure import radial_spectrum, step_correlation, step_gram
from evenkeel.statistics.evidence import Evidence, log_snr
from evenkeel.statistics.histogram import BINS, REACH, ErrorHistogram, Frame
from evenkeel.statistics.moments import ORDERS, PairedMoments
from evenkeel.statistics.residual import ResidualHistogram
from evenkeel.statistics.second_order import SecondOrder

Array = npt.NDArray[np.float64]
SEEDS = st.integers(0, 2**32 - 1)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def triple(seed: int, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """(e, D, x), all correlated, D skewed and small."""
    e, r, x = (draw(seed + i, *shape) for i in range(3))
    return e + 0.3 * x, 0.05 * e + 0.02 * r**2 + 0.01 * x, x


def two_pass(e: Tensor, d: Tensor, x: Tensor) -> dict[str, Array]:
    """Moments over the last axis in extended precision, the slow and obvious way."""
    a, b, c = (t.double().numpy().astype(np.longdouble) for t in (e, d, x))
    means = [v.mean(-1, keepdims=True) for v in (a, b, c)]
    a0, b0, c0 = a - means[0], b - means[1], c - means[2]
    found = {
        "mean_e": means[0][..., 0],
        "mean_d": means[1][..., 0],
        "mean_x": means[2][..., 0],
        "central": np.stack([(a0**i * b0**j).sum(-1) for i, j in ORDERS], -1),
        "s_xx": (c0 * c0).sum(-1),
        "s_xe": (c0 * a0).sum(-1),
        "s_xd": (c0 * b0).sum(-1),
    }
    return {name: value.astype(np.float64) for name, value in found.items()}


def assert_moments(found: PairedMoments, wanted: dict[str, Array], tolerance: float) -> None:
    for name, reference in wanted.items():
        scale = np.abs(reference).max() + 1e-300
        error = np.abs(getattr(found, name).numpy() - reference).max() / scale
        assert error < tolerance, (name, error)


# ---- moments


def test_orders_are_all_joint_moments_from_two_to_four() -> None:
    assert {(i, j) for i in range(5) for j in range(5) if 2 <= i + j <= 4} == set(ORDERS)
    assert len(ORDERS) == 12


def test_every_moment_equals_the_two_pass_reference() -> None:
    e, d, x = triple(0, 3, 2, 500)
    moments = PairedMoments.of(e, d, x)
    assert_moments(moments, two_pass(e, d, x), 1e-12)
    assert moments.count.tolist() == [[500, 500]] * 3
    for i, j in ORDERS:
        reference = ((e - e.mean(-1, True)) ** i * (d - d.mean(-1, True)) ** j).sum(-1)
        torch.testing.assert_close(moments.s(i, j), reference, rtol=1e-9, atol=1e-9)


def test_a_mean_of_a_million_costs_no_digits_of_the_moments() -> None:
    e, d, x = triple(1, 400)
    e, d, x = e + 1e6, d - 1e6, x + 1e6
    assert_moments(PairedMoments.of(e, d, x), two_pass(e, d, x), 1e-8)
    raw = (e * e).sum() - e.sum() ** 2 / 400  # what raw power sums would have given
    right = two_pass(e, d, x)["central"][0]
    assert abs(float(raw) - right) > 1e-7 * right


def test_one_element_has_a_mean_and_no_spread() -> None:
    moments = PairedMoments.of(*(torch.tensor([v]) for v in (2.0, -3.0, 5.0)))
    assert (moments.mean_e, moments.mean_d, moments.mean_x) == (2.0, -3.0, 5.0)
    assert not moments.central.any() and not moments.s_xx.any()
    assert SecondOrder.of(moments).gain == 0  # nothing varies, so nothing is explained


def test_all_zero_gives_zero_and_no_nan() -> None:
    zero = torch.zeros(2, 8)
    second = SecondOrder.of(PairedMoments.of(zero, zero, zero))
    for value in (second.gain, second.slope, second.explained):
        assert value.tolist() == [0, 0]
    one = torch.ones(())
    assert second.conditional_variance(one, 0 * one).tolist() == [0, 0]


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_refused(which: int, bad: float) -> None:
    tensors = [t.clone() for t in triple(2, 2, 16)]
    tensors[which][1, 3] = bad
    with pytest.raises(CalibrationError, match="not finite"):
        PairedMoments.of(*tensors)


@pytest.mark.parametrize(
    "shapes", [((2, 4), (2, 5), (2, 4)), ((2, 4), (2, 4), (4,)), ((2, 0), (2, 0), (2, 0))]
)
def test_unequal_or_empty_shapes_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(CalibrationError, match="equal, non-empty"):
        PairedMoments.of(*(torch.zeros(shape) for shape in shapes))


def test_transposed_views_are_read_by_position_and_not_by_storage() -> None:
    e, d, x = (t.transpose(0, 1) for t in triple(3, 64, 5))
    assert not e.is_contiguous()
    assert_moments(PairedMoments.of(e, d, x), two_pass(e, d, x), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_inputs_are_summed_in_float64(dtype: torch.dtype) -> None:
    e, d, x = (t.to(dtype) for t in triple(4, 3, 4000))
    moments = PairedMoments.of(e + 100, d, x)
    assert_moments(moments, two_pass(e + 100, d, x), 1e-11)
    assert moments.central.dtype == torch.float64


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    seed=SEEDS,
    cuts=st.lists(st.integers(1, 39), max_size=6),
    order=st.randoms(use_true_random=False),
    offset=st.sampled_from([0.0, 5.0, -300.0]),
)
def test_merging_any_split_in_any_order_gives_the_moments_of_the_union(
    seed: int, cuts: list[int], order: object, offset: float
) -> None:
    e, d, x = triple(seed, 2, 40)
    e = e + offset
    edges = [0, *sorted(set(cuts)), 40]
    parts = [
        PairedMoments.of(*(t[:, a:b] for t in (e, d, x))) for a, b in itertools.pairwise(edges)
    ]
    order.shuffle(parts)  # type: ignore[attr-defined]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged + part
    assert merged.count.tolist() == [40, 40]
    assert_moments(merged, two_pass(e, d, x), 1e-9)
    assert_moments(
        PairedMoments.joined([p.map(lambda t: t[None]) for p in parts]).pooled(0),
        two_pass(e, d, x),
        1e-9,
    )


def test_pooling_prompts_and_channels_is_the_union_of_their_elements() -> None:
    e, d, x = triple(5, 3, 2, 4, 50)
    e = e + torch.arange(4.0)[:, None]  # channels differ in their means
    joined = [t.movedim(1, 0).reshape(2, -1) for t in (e, d, x)]
    pooled = PairedMoments.of(e, d, x).pooled(0, 2)
    assert_moments(pooled, two_pass(*joined), 1e-11)
    averaged = PairedMoments.of(e, d, x).s(2, 0).sum((0, 2))  # forgets that means differ
    assert (pooled.s(2, 0) - averaged > 0.1 * averaged).all()


# ---- what the moments say: q = (1 + k) e + d + r


def synthetic(k: float, noise: Tensor, seed: int = 6) -> SecondOrder:
    e = 1.7 * draw(seed, 1, noise.shape[-1])
    return SecondOrder.of(PairedMoments.of(e, k * e + 0.2 + noise, draw(seed + 1, *e.shape)))


@pytest.mark.parametrize("k", [-0.3, -0.05, 0.0, 0.1])
def test_gain_slope_and_explained_share_are_recovered(k: float) -> None:
    var_e, var_r = 1.7**2, 0.25
    second = synthetic(k, 0.5 * draw(9, 1, 400_000))
    r2 = (1 + k) ** 2 * var_e / ((1 + k) ** 2 * var_e + var_r)
    assert float(second.gain) == pytest.approx(k, abs=3e-3)
    assert float(second.explained) == pytest.approx(r2, rel=3e-3)
    assert float(second.slope) == pytest.approx(1 - r2 / (1 + k), abs=3e-3)
    backward = float(second.conditional_variance(torch.ones(()), torch.zeros(())))
    assert backward == pytest.approx(var_e * (1 - r2), rel=1e-2)  # Var(D | q) = Var(e | q)
    assert backward < float(second.dd) or k == 0.0


@settings(derandomize=True, deadline=None, max_examples=40)
@given(seed=SEEDS, k=st.floats(-0.4, 0.4), size=st.floats(0.01, 1.0))
def test_forward_variance_is_backward_variance_over_the_explained_share(
    seed: int, k: float, size: float
) -> None:
    """Var(r) / (1 + k)^2 = Var(D | q) / R^2, exactly, for the least-squares r of any sample."""
    s = synthetic(k, size * draw(seed, 1, 50), seed % 1000)
    residual = s.dd - s.gain * s.ed
    forward = residual / (1 + s.gain) ** 2
    backward = s.conditional_variance(torch.ones(()), torch.zeros(()))
    torch.testing.assert_close(forward * s.explained, backward, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(1 - s.slope, s.explained / (1 + s.gain), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("law", "kurtosis"), [("uniform", -1.2), ("laplace", 3.0)])
def test_skewness_and_kurtosis_of_the_residual_follow_from_fourth_order(
    law: str, kurtosis: float
) -> None:
    rng = np.random.default_rng(0)
    n, k = 1_000_000, 0.15
    e = torch.from_numpy(rng.standard_normal(n))
    r = torch.from_numpy(getattr(rng, law)(*((-1, 1) if law == "uniform" else (0, 1)), n))
    m = PairedMoments.of(e, k * e + r, e)
    gain = float(m.s(1, 1) / m.s(2, 0))
    second, third, fourth = (
        sum(c * (-gain) ** i * float(m.s(i, len(row) - 1 - i)) for i, c in enumerate(row)) / n
        for row in ((1, 2, 1), (1, 3, 3, 1), (1, 4, 6, 4, 1))
    )
    assert third / second**1.5 == pytest.approx(0, abs=0.02)
    assert fourth / second**2 - 3 == pytest.approx(kurtosis, abs=0.06)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(seed=SEEDS, shifts=st.lists(st.floats(-3, 3), min_size=3, max_size=3))
def test_pooled_variance_is_never_below_the_mean_of_the_channels(
    seed: int, shifts: list[float]
) -> None:
    e, d, x = triple(seed, 2, 1, 3, 30)
    e, d = e + torch.tensor(shifts)[:, None], d * torch.tensor([1.0, 2.0, 0.5])[:, None]
    evidence = Evidence("epsilon", np.ones(1), np.ones(1), PairedMoments.of(e, d, x))
    for kind in ("conditional", "total", "residual"):
        options = {"kind": kind, "trim": None, "on": "output"}
        pooled = evidence.variance(per_channel=False, **options)
        channels = evidence.variance(per_channel=True, **options)
        assert float(pooled) >= float(channels.mean()) * (1 - 1e-9)


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize(("alpha", "sigma"), [(0.8, 0.6), (0.25, 0.75), (1.0, 4.0)])
def test_variance_given_the_noise_form_equals_direct_conversion_of_the_data(
    prediction: str, alpha: float, sigma: float
) -> None:
    e, d, x = triple(7, 1, 1, 1, 3000)
    evidence = Evidence(prediction, np.array([alpha]), np.array([sigma]), PairedMoments.of(e, d, x))
    q = (e + d).flatten().numpy()
    state = x.flatten().numpy()
    norm = np.hypot(alpha, sigma)
    noise = {
        "epsilon": q,
        "v_prediction": alpha / norm * q + sigma / norm**2 * state,
        "sample": (state - alpha * q) / sigma,
        "flow_prediction": (state + alpha * q) / (alpha + sigma),
    }[prediction]
    error = d.flatten().numpy()
    line = np.stack([np.ones_like(noise), noise], 1)
    left = error - line @ np.linalg.lstsq(line, error, rcond=None)[0]
    options = {"per_channel": True, "kind": "conditional", "trim": None}
    assert float(evidence.variance(on="epsilon", **options)) == pytest.approx(left.var(), rel=1e-9)
    on_output = float(evidence.variance(on="output", **options))
    is_same = on_output == pytest.approx(left.var(), rel=1e-6)
    assert is_same == (prediction == "epsilon")  # elsewhere x adds its own variance


# ---- histograms


def framed(e: Tensor, d: Tensor) -> Frame:
    axes = (0, 3)
    spread = d.std(axes)
    return Frame(d.mean(axes), spread, e.mean(axes), e.std(axes), 0 * spread, spread)


def heavy_tailed(prompts: int = 4, n: int = 2000) -> tuple[Tensor, Tensor]:
    e, d, _ = triple(11, prompts, 2, 3, n)
    return e, d + 0.05 * draw(12, *d.shape) ** 5


def test_histograms_of_parts_add_exactly_in_any_order() -> None:
    e, d = heavy_tailed()
    frame = framed(e, d)
    parts = [ErrorHistogram.of(frame, e[i : i + 1], d[i : i + 1]) for i in range(4)]
    forward = parts[0] + parts[1] + parts[2] + parts[3]
    backward = parts[3] + (parts[1] + parts[2]) + parts[0]
    assert torch.equal(forward.sums, backward.sums)
    whole = ErrorHistogram.of(frame, e, d)
    assert torch.equal(forward.sums[..., 0], whole.sums[..., 0])  # counts: no rounding at all
    assert (forward.sums - whole.sums).abs().max() <= 4  # units of 2^-20: each part rounds once
    assert forward.sums[..., 0].sum(-1).unique().tolist() == [4 * 2000 * 2**20]


def test_histograms_in_different_frames_are_refused() -> None:
    e, d = heavy_tailed(n=50)
    one, other = framed(e, d), framed(e, 2 * d)
    with pytest.raises(CalibrationError, match="different pilot frames"):
        ErrorHistogram.of(one, e, d) + ErrorHistogram.of(other, e, d)


def test_a_value_too_far_from_the_pilot_to_be_counted_is_refused_and_not_wrapped() -> None:
    e, d = heavy_tailed(n=50)
    frame = framed(e, d)
    with pytest.raises(CalibrationError, match="pilot"):
        ErrorHistogram.of(frame, e, d * 1e9)


def kept_covariances(e: Tensor, d: Tensor, kept: Tensor) -> tuple[float, float, float]:
    found = np.cov(e[kept].numpy(), d[kept].numpy())
    return float(found[0, 0]), float(found[0, 1]), float(found[1, 1])


@pytest.mark.parametrize("off", [0.0, 1.7], ids=["pilot like the rest", "pilot far off"])
@pytest.mark.parametrize("spread", [1.0, 2.5, 4.0])
def test_trimmed_covariances_equal_a_two_pass_fit_within_one_bin(spread: float, off: float) -> None:
    e, d = heavy_tailed()
    own = framed(e, d)
    frame = replace(own, mean_d=own.mean_d - off * own.std_d, std_d=(1 + off) * own.std_d)
    ee, ed, dd, share = ErrorHistogram.of(frame, e, d).trimmed_covariances(spread)
    half_bin = REACH / BINS
    for step in range(2):
        for channel in range(3):
            a, b = e[:, step, channel].flatten(), d[:, step, channel].flatten()
            z = (b - frame.mean_d[step, channel]) / frame.std_d[step, channel]
            centre = (torch.floor(z / (2 * half_bin)) + 0.5) * 2 * half_bin
            edge = spread * float(z.std(correction=0))
            kept = ((centre - z.mean()).abs() <= edge) & (z.abs() <= REACH)
            wanted = kept_covariances(a, b, kept)
            found = [float(t[step, channel]) for t in (ee, ed, dd)]
            assert found == pytest.approx(wanted, rel=1e-4)
            assert float(share[step, channel]) == pytest.approx(float(kept.double().mean()))
            from_mean = (z - z.mean()).abs()
            narrow = kept_covariances(a, b, from_mean <= edge - 1.01 * half_bin)
            broad = kept_covariances(a, b, from_mean <= edge + 1.01 * half_bin)
            assert narrow[2] * (1 - 1e-6) <= found[2] <= broad[2] * (1 + 1e-6)
            assert found[2] < 0.999 * float(b.var())  # something was trimmed


def test_trimming_nothing_away_gives_the_plain_covariances() -> None:
    e, d = heavy_tailed()
    ee, ed, dd, share = ErrorHistogram.of(framed(e, d), e, d).trimmed_covariances(float("inf"))
    assert share.unique().tolist() == [1.0]
    for step in range(2):
        wanted = kept_covariances(e[:, step, 0].flatten(), d[:, step, 0].flatten(), ...)
        found = [float(t[step, 0]) for t in (ee, ed, dd)]
        assert found == pytest.approx(wanted, rel=1e-4)


def test_a_pilot_without_any_error_does_not_erase_the_error_of_later_prompts() -> None:
    e, d, _ = triple(13, 1, 1, 1, 500)
    frame = framed(e, torch.zeros_like(d))
    _, ed, dd, _ = ErrorHistogram.of(frame, e, d).trimmed_covariances(100.0)
    assert [float(ed), float(dd)] == pytest.approx(
        kept_covariances(e.flatten(), d.flatten(), ...)[1:], rel=1e-4
    )


@pytest.mark.parametrize("spread", [1.5, 4.0])
def test_one_trim_for_the_heap_of_all_channels_equals_a_two_pass_fit(spread: float) -> None:
    e, d = heavy_tailed()
    d = d + torch.tensor([0.0, 0.5, -2.0])[:, None]  # the heap's mean and spread are no channel's
    e = e + torch.tensor([3.0, 0.0, -1.0])[:, None]
    found = ErrorHistogram.of(framed(e, d), e, d).trimmed_covariances(spread, per_channel=False)
    for step in range(2):
        a, b = e[:, step].flatten(), d[:, step].flatten()
        kept = (b - b.mean()).abs() <= spread * b.std(correction=0)
        ee, ed, dd, share = (float(t[step, 0]) for t in found)
        wanted = kept_covariances(a, b, kept)
        assert (ee, dd) == pytest.approx(wanted[::2], rel=0.05)
        assert ed == pytest.approx(wanted[1], abs=0.05 * (wanted[0] * wanted[2]) ** 0.5)
        assert share == pytest.approx(float(kept.double().mean()), abs=0.03)
    everything = ErrorHistogram.of(framed(e, d), e, d).trimmed_covariances(
        float("inf"), per_channel=False
    )
    a, b = e[:, 0].flatten(), d[:, 0].flatten()
    assert [float(t[0, 0]) for t in everything[:3]] == pytest.approx(
        kept_covariances(a, b, ...), rel=1e-4
    )


def test_trimming_needs_the_histogram() -> None:
    e, d, x = triple(14, 2, 2, 3, 40)
    moments = PairedMoments.of(e, d, x)
    levels = np.array([0.5, 0.9]), np.array([0.8, 0.4])
    bare = Evidence("epsilon", *levels, moments)
    with pytest.raises(CalibrationError, match="histograms=True"):
        bare.variance(per_channel=True, kind="conditional", trim=4.0, on="output")
    full = Evidence("epsilon", *levels, moments, ErrorHistogram.of(framed(e, d), e, d))
    heap = full.variance(per_channel=False, kind="total", trim=1.5, on="output")
    assert (heap < full.by_step.dd).all()
    trimmed = full.variance(per_channel=True, kind="total", trim=1.5, on="output")
    assert (trimmed < full.by_channel.dd).all()


def test_a_bootstrap_sample_of_prompts_has_their_moments_and_gram_and_no_histogram() -> None:
    e, d, x = triple(22, 3, 2, 1, 40)
    frame, gram = framed(e, d), step_gram(d)
    levels = np.array([0.5, 0.9]), np.array([0.8, 0.4])
    histograms = ErrorHistogram.of(frame, e, d), ResidualHistogram.of(frame, e, d)
    whole = Evidence(
        "epsilon", *levels, PairedMoments.of(e, d, x), histograms[0], "here", histograms[1], gram
    )
    rows = torch.tensor([2, 0, 2])
    again = whole.resampled(rows)
    assert again.gram is not None and torch.equal(again.gram, gram[rows])
    assert torch.equal(again.moments.mean_d, whole.moments.mean_d[rows])
    assert again.histogram is None and again.residual is None and again.source == "here"
    bare = Evidence("epsilon", *levels, PairedMoments.of(e, d, x))
    assert bare.gram is None and bare.residual is None and bare.resampled(rows).gram is None


# ---- evidence at other noise levels


def law_at(alpha: Array, sigma: Array) -> StepLaw:
    n = len(alpha) - 1
    square = np.zeros((n, n))
    return StepLaw(
        "Any", "epsilon", np.arange(n), square, square, square[0], alpha, sigma, sigma[1:]
    )


def test_values_are_exact_at_calibrated_levels_and_log_linear_between() -> None:
    sigma = np.array([8.0, 2.0, 0.5])
    moments = PairedMoments.of(*triple(15, 1, 3, 1, 20))
    evidence = Evidence("epsilon", np.ones(3), sigma, moments)
    values = torch.tensor([[1.0], [4.0], [64.0]], dtype=torch.float64)
    law = law_at(np.ones(5), np.array([8.0, 4.0, 2.0, 1.0, 0.0]))
    found, outside = evidence.at(law, values, log=True)
    assert not outside.any()
    assert found[:, 0].tolist() == pytest.approx([1, 2, 4, 16])
    linear, _ = evidence.at(law, values, log=False)
    assert linear[:, 0].tolist() == pytest.approx([1, 2.5, 4, 34])
    evidence.refuse_outside(law, outside)


def test_levels_beyond_the_calibrated_ones_are_nan_and_refused_by_name() -> None:
    moments = PairedMoments.of(*triple(15, 1, 2, 1, 20))
    evidence = Evidence("epsilon", np.ones(2), np.array([8.0, 0.5]), moments)
    law = law_at(np.ones(4), np.array([9.0, 4.0, 0.4, 0.0]))
    found, outside = evidence.at(law, torch.ones(2, 1, dtype=torch.float64), log=True)
    assert outside.tolist() == [True, False, True]
    assert torch.isnan(found[:, 0]).tolist() == [True, False, True]
    with pytest.raises(OutOfRange, match=r"2 of 3 steps .* 9, 0\.4, calibrated 0\.5 to 8"):
        evidence.refuse_outside(law, outside)


def test_log_snr_gives_pure_noise_and_clean_samples_a_finite_place() -> None:
    found = log_snr(np.array([0.0, 1.0, 1.0]), np.array([1.0, 1.0, 0.0]))
    assert found.tolist() == [-20, 0, 20]


# ---- structure of the error


def test_gram_is_the_mean_product_and_exactly_symmetric() -> None:
    d = draw(16, 3, 7, 2, 333)
    gram = step_gram(d)
    reference = torch.einsum("pice,pjce->pij", d, d) / (2 * 333)
    torch.testing.assert_close(gram.double(), reference, rtol=1e-6, atol=1e-7)
    assert torch.equal(gram, gram.transpose(1, 2))
    assert gram.dtype == torch.float32


def test_correlation_tells_independent_from_persistent_errors() -> None:
    white = draw(17, 4, 5, 2, 4000)
    sizes = torch.tensor([1.0, 2.0, 0.5, 10.0, 0.1], dtype=torch.float64)[:, None, None]
    eye = torch.eye(5, dtype=torch.float64)
    assert (step_correlation(step_gram(white * sizes)) - eye).abs().max() < 0.03
    stuck = white[:, :1] * sizes * torch.tensor([1.0, -1, 1, 1, 1])[:, None, None]
    found = step_correlation(step_gram(stuck))
    assert found[0].tolist() == pytest.approx([1, -1, 1, 1, 1], abs=1e-6)


def test_a_step_without_error_correlates_with_nothing() -> None:
    d = draw(18, 2, 3, 1, 50)
    d[:, 1] = 0
    found = step_correlation(step_gram(d))
    assert found[1].tolist() == [0, 0, 0]
    assert float(found[0, 0]) == pytest.approx(1)


@pytest.mark.parametrize("side", [(32, 32), (24, 40), (8, 8), (4, 4)])
def test_white_noise_has_its_variance_in_every_ring(side: tuple[int, int]) -> None:
    cells = 2_000_000 // (side[0] * side[1])
    spectrum = radial_spectrum(1.5 * draw(19, 1, 2, cells, *side))
    assert spectrum.shape[:2] == (1, 2) and spectrum.shape[2] >= 2
    torch.testing.assert_close(spectrum, torch.full_like(spectrum, 2.25), rtol=0.05, atol=0)


def test_low_pass_noise_is_not_flat() -> None:
    noise = draw(20, 1, 1, 200, 32, 32)
    smooth = sum(torch.roll(noise, (i, j), (-2, -1)) for i in range(3) for j in range(3))
    spectrum = radial_spectrum(torch.as_tensor(smooth) / 3)[0, 0]
    assert spectrum[0] > 5 * spectrum[-1]
    assert spectrum[0] == pytest.approx(9, rel=0.3)  # the sum of nine equal shifts at frequency 0


def test_a_spectrum_needs_height_and_width() -> None:
    with pytest.raises(CalibrationError, match="height, width"):
        radial_spectrum(torch.zeros(2, 3, 4))


def test_every_field_of_the_moments_survives_map_and_concatenate() -> None:
    moments = PairedMoments.of(*triple(21, 4, 3, 10))
    halves = [moments.map(lambda t, s=s: t[s]) for s in (slice(0, 1), slice(1, 4))]
    again = PairedMoments.joined(halves)
    for field in fields(PairedMoments):
        assert torch.equal(getattr(again, field.name), getattr(moments, field.name))
