"""Mixed-order pairs: what diffusers' own solvers pass through, the laws of a linear denoiser, who learns."""

from __future__ import annotations

import copy
import json
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from tiny_pipelines import ALL
from torch import Tensor

from evenkeel.errors import CalibrationError, QuantizationError, UnsupportedSampler
from evenkeel.fitting.mixed_order.calibration import mixed_order_set
from evenkeel.fitting.mixed_order.evaluations import MixedOrderRuns, mixed_order_runs
from evenkeel.fitting.mixed_order.solvers import solver_pair
from evenkeel.fitting.mixed_order.trajectories import trajectories
from evenkeel.fitting.quantize import quantize
from evenkeel.hosts.pipeline.pipelines import denoiser_of
from evenkeel.hosts.run import Run
from evenkeel.quantizers import load_quantized
from evenkeel.quantizers.layers.quantized_layers import QuantizedLayer
from evenkeel.quantizers.methods.ptq4dit import PTQ4DiT
from evenkeel.quantizers.methods.q_diffusion import QDiffusion
from evenkeel.quantizers.methods.sa_ptq import SAPTQ
from evenkeel.quantizers.workspace.alignment import MixedOrder
from evenkeel.quantizers.workspace.workspace import Workspace
from evenkeel.testing.pipeline import tiny_pipeline

M = 4
GUIDANCE = 1.5
TEACHERS = ("printed", "midpoint", "same-state")


class Linear(d.DiTTransformer2DModel):
    """eps = (0.4 + 0.0005 t) x, whatever the class: all that a solver makes of it is a number times x."""

    def forward(self, hidden_states: Tensor, timestep: Any = None, **_: Any) -> Any:
        return Transformer2DModelOutput(self.slope(timestep.reshape(-1, 1, 1, 1)) * hidden_states)

    @staticmethod
    def slope(t: Any) -> Any:
        return 0.4 + 0.0005 * t


@pytest.fixture(scope="module")
def dit() -> Any:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def linear() -> Any:
    pipe = tiny_pipeline()
    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 1}
    pipe.transformer = Linear(num_attention_heads=1, attention_head_dim=8, **sizes).eval()
    return pipe


def run_of(pipe: Any, steps: int = M, **options: Any) -> Run:
    return Run(pipe, [3, 7], steps, guidance_scale=GUIDANCE, batch_size=2, **options)


def both(pipe: Any, steps: int = M) -> MixedOrderRuns:
    run = run_of(pipe, steps)
    with run.undisturbed():
        return mixed_order_runs(run, run.batches()[0], steps)


def by_hand(pipe: Any, order: int, steps: int) -> list[Tensor]:
    """States of a loop written here around diffusers' scheduler and the denoiser, guidance included."""
    scheduler = d.DPMSolverSinglestepScheduler.from_config(
        pipe.scheduler.config,
        solver_order=order,
        algorithm_type="dpmsolver",
        final_sigmas_type="sigma_min",
    )
    scheduler.set_timesteps(steps)
    generators = [torch.Generator().manual_seed(s) for s in (0, 1)]
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in generators])
    states = [x]
    for t in scheduler.timesteps:
        with torch.no_grad():
            told, labels = t.expand(4), torch.tensor([3, 7, 1000, 1000])
            out = pipe.transformer(torch.cat([x, x]), timestep=told, class_labels=labels).sample
        conditional, free = out[:, :4].chunk(2)
        x = scheduler.step(free + GUIDANCE * (conditional - free), t, x).prev_sample
        states.append(x)
    return states


# ---------------------------------------------------------------- what the runs are


def test_midpoints_are_the_intermediate_states_of_diffusers_own_solver(dit: Any) -> None:
    found, first, second = both(dit), by_hand(dit, 1, M), by_hand(dit, 2, 2 * M)
    for j in range(M):
        for evaluation, state in (
            (found.first[j], first[j]),
            (found.start[j], second[2 * j]),
            (found.middle[j], second[2 * j + 1]),
        ):
            torch.testing.assert_close(evaluation.sample[:2], state, atol=2e-6, rtol=1e-5)
    assert not torch.allclose(found.first[1].sample, found.start[1].sample, atol=1e-4)
    assert torch.equal(found.first[0].sample, found.start[0].sample)  # one noise


def test_the_pipeline_is_left_as_it_was(dit: Any) -> None:
    before = copy.deepcopy(dit.transformer.state_dict())
    scheduler, name = dit.scheduler, type(dit.scheduler).__name__
    both(dit)
    assert dit.scheduler is scheduler
    assert type(scheduler).__name__ == name == dit.config["scheduler"][1]
    assert not dit.transformer._forward_hooks
    after = dit.transformer.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_the_floor_is_what_full_precision_itself_pays(dit: Any) -> None:
    found = both(dit)
    off = [
        u.output.double() - x.output.double()
        for u, x in zip(found.middle, found.first, strict=True)
    ]
    assert found.floor.tolist() == [float((o * o).mean()) for o in off]
    assert float(found.floor.min()) > 0


def test_plms_forgets_its_oldest_output() -> None:
    pipe = tiny_pipeline()
    pipe.scheduler = d.PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    found = both(pipe, 8)
    assert [e.timestep for e in found.first] == [e.timestep for e in found.middle]
    # Orders one to three are the same in both; the fourth needs four outputs.
    parted = [
        not torch.equal(a.sample, b.sample) for a, b in zip(found.first, found.middle, strict=True)
    ]
    assert parted == [False] * 5 + [True] * 4
    e = [evaluation.output for evaluation in found.first]
    three = (23 * e[5] - 16 * e[4] + 5 * e[3]) / 12  # Adams and Bashforth's third order
    t = int(found.first[5].timestep)
    following = pipe.scheduler._get_prev_sample(found.first[5].sample, t, t - 1000 // 8, three)
    torch.testing.assert_close(found.first[6].sample, following, atol=1e-6, rtol=1e-5)


def test_flow_matching_takes_the_explicit_midpoint_rule() -> None:
    tiny = ALL["flux"]()
    run = Run(
        tiny.pipe, ["a"], 2, guidance_scale=tiny.guidance_scale,
        call={k: v for k, v in tiny.call.items() if k != "output_type"},
    )  # fmt: skip
    pair = solver_pair(tiny.pipe, 2)
    assert pair.name == "midpoint/euler"
    with run.undisturbed():
        found = mixed_order_runs(run, run.batches()[0], 2)
    sigma = [e.timestep / 1000 for e in (*found.start, *found.middle)]
    start, middle, following = found.start[0], found.middle[0], found.start[1]
    half = start.sample + (sigma[2] - sigma[0]) * start.output
    whole = start.sample + (sigma[1] - sigma[0]) * middle.output
    euler = start.sample + (sigma[1] - sigma[0]) * start.output
    torch.testing.assert_close(middle.sample, half, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(following.sample, whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.first[1].sample, euler, atol=1e-5, rtol=1e-4)


def test_grids_that_are_not_nested_are_refused(dit: Any) -> None:
    pipe = copy.copy(dit)
    pipe.scheduler = d.DPMSolverSinglestepScheduler(
        use_karras_sigmas=True, final_sigmas_type="sigma_min"
    )
    with pytest.raises(CalibrationError, match="same intervals"):
        both(pipe)
    pipe.scheduler = d.PNDMScheduler(skip_prk_steps=False)
    with pytest.raises(UnsupportedSampler, match="skip_prk_steps=True"):
        both(pipe)


# ---------------------------------------------------------------- a linear denoiser


class Levels:
    """alpha, sigma and lambda of the tiny pipeline's training grid, in float64 from its betas."""

    def __init__(self, pipe: Any) -> None:
        betas = np.linspace(1e-4, 0.02, 1000)
        product = np.cumprod(1 - betas)
        self.alpha, self.sigma = np.sqrt(product), np.sqrt(1 - product)
        self.lam = np.log(self.alpha / self.sigma)

    def step(self, s: float, t: float, x: Any, eps: Any) -> Any:
        """DPM-Solver-1 from time s to t (Lu et al. 2022, Eq. 3.7)."""
        s, t = int(s), int(t)
        h = self.lam[t] - self.lam[s]
        return self.alpha[t] / self.alpha[s] * x - self.sigma[t] * np.expm1(h) * eps

    def second(self, s: float, u: float, t: float, x: Any, eps: Any, middle: Any) -> Any:
        """DPM-Solver-2 with its midpoint at u: the slope is that of the line through both outputs."""
        r = (self.lam[int(u)] - self.lam[int(s)]) / (self.lam[int(t)] - self.lam[int(s)])
        return self.step(s, t, x, eps + (middle - eps) / (2 * r))


def times(found: MixedOrderRuns) -> list[tuple[float, float, float]]:
    starts = [e.timestep for e in found.start]
    return list(zip(starts, [e.timestep for e in found.middle], [*starts[1:], 0.0], strict=True))


def test_printed_makes_an_order_2_step_one_of_order_1(linear: Any) -> None:
    levels, found = Levels(linear), both(linear)
    s, u, t = times(found)[0]
    ((student, teacher), *_) = MixedOrder("printed").paired(found.first, found.middle)
    assert torch.equal(student.sample, found.middle[0].sample)
    learned = teacher.output  # of a student that has learned all there is, at its midpoint
    after = levels.second(s, u, t, found.start[0].sample, found.start[0].output, learned)
    torch.testing.assert_close(after.float(), found.first[1].sample, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(after.float(), found.start[1].sample, atol=1e-3)


def test_midpoint_gives_an_euler_step_the_order_2_result(linear: Any) -> None:
    levels, found = Levels(linear), both(linear)
    s, u, t = times(found)[0]
    ((student, teacher), *_) = MixedOrder("midpoint").paired(found.first, found.middle)
    assert torch.equal(student.sample, found.first[0].sample)
    after = levels.step(s, t, student.sample, teacher.output)
    # Exactly where the midpoint halves the interval in log-SNR; elsewhere what its own r leaves over.
    r = (levels.lam[int(u)] - levels.lam[int(s)]) / (levels.lam[int(t)] - levels.lam[int(s)])
    left = (1 / (2 * r) - 1) * (found.middle[0].output - found.start[0].output)
    h = levels.lam[int(t)] - levels.lam[int(s)]
    expected = found.start[1].sample + levels.sigma[int(t)] * np.expm1(h) * left
    torch.testing.assert_close(after.float(), expected.float(), atol=1e-4, rtol=1e-4)
    assert abs(r - 0.5) > 0.01
    half = float(
        np.interp(
            (levels.lam[int(s)] + levels.lam[int(t)]) / 2, levels.lam[::-1], np.arange(1000)[::-1]
        )
    )
    assert abs(half - u) > 1


def test_whole_runs_follow_the_closed_recursion_of_both(linear: Any) -> None:
    """What a perfect student would put out over its own state, interval by interval."""
    levels, found = Levels(linear), both(linear)
    low = high = 1.0
    for j, (s, u, t) in enumerate(times(found)):
        middle = levels.step(s, u, high, Linear.slope(s) * high)
        for evaluation, factor in (
            (found.first[j], low), (found.start[j], high), (found.middle[j], middle)
        ):  # fmt: skip
            expected = factor * found.first[0].sample
            torch.testing.assert_close(evaluation.sample, expected, atol=2e-4, rtol=2e-4)
        target = found.first[j].output / found.middle[j].sample
        closed = Linear.slope(s) * low / middle
        torch.testing.assert_close(target, torch.full_like(target, closed), atol=1e-3, rtol=1e-3)
        high = levels.second(s, u, t, high, Linear.slope(s) * high, Linear.slope(u) * middle)
        low = levels.step(s, t, low, Linear.slope(s) * low)
    assert abs(low / high - 1) > 0.01


# ---------------------------------------------------------------- who learns from whom


@pytest.mark.parametrize("teacher", TEACHERS)
def test_blocks_learn_from_the_calls_of_their_teacher(dit: Any, teacher: Any) -> None:
    calls = mixed_order_set(run_of(dit), MixedOrder(teacher), M, progress=False)
    found = both(dit)
    students, teachers = zip(*MixedOrder(teacher).paired(found.first, found.middle), strict=True)
    given = [c.arguments[0] for c in calls.calls]
    assert all(
        torch.equal(a, e.calls[0].arguments[0]) for a, e in zip(given, students, strict=True)
    )
    workspace, name = Workspace(dit.transformer, calls), "transformer_blocks.1"
    for target, evaluation in zip(workspace.block_targets(name), teachers, strict=True):
        seen: list[Tensor] = []
        hook = dit.transformer.get_submodule(name).register_forward_hook(
            lambda _, __, out, seen=seen: seen.append(out)
        )
        with torch.no_grad():
            dit.transformer(*evaluation.calls[0].arguments, **evaluation.calls[0].keywords)
        hook.remove()
        assert torch.equal(target, seen[0])
    assert len(workspace.block_calls(name, "quantized")) == len(calls) == M
    assert bool(calls.teachers) == (teacher != "same-state")


def test_the_control_sees_both_runs_with_as_many_calls() -> None:
    first, middle = ["x0", "x1", "x2"], ["u0", "u1", "u2"]
    seen = [p for turn in range(2) for p in MixedOrder("same-state").paired(first, middle, turn)]
    assert sorted(seen) == [(c, c) for c in sorted(first + middle)]
    for teacher in TEACHERS:
        assert len(MixedOrder(teacher, "end").paired(first, middle)) == 3


def test_steps_count_intervals_or_evaluations(dit: Any) -> None:
    evaluations = MixedOrder(counted="evaluations")
    assert len(mixed_order_set(run_of(dit, 4), evaluations, 9, progress=False)) == 2
    assert len(mixed_order_set(run_of(dit, 2), MixedOrder(), 9, progress=False)) == 2
    with pytest.raises(QuantizationError, match="even number"):
        mixed_order_set(run_of(dit, 3), evaluations, 9, progress=False)


def quantized_with(pipe: Any, method: Any, out: Any = None) -> Any:
    settings: dict[str, Any] = {
        "guidance_scale": GUIDANCE,
        "calibration_steps": 2,
        "progress": False,
    }
    return quantize(pipe, method, prompts=[3, 7], num_inference_steps=2, out=out, **settings)


def test_nothing_to_round_and_the_same_state_leave_every_weight(dit: Any) -> None:
    pipe = copy.copy(dit)
    pipe.transformer = copy.deepcopy(dit.transformer)
    with torch.no_grad():
        for layer in pipe.transformer.modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                layer.weight.copy_((layer.weight * 64).round().clamp(-7, 8) / 64)
                rows = layer.weight.flatten(1)
                rows[:, 0], rows[:, 1] = -7 / 64, 8 / 64  # so that 4 bits are exactly this grid
    method = QDiffusion(
        4, 16, weight_range="absmax", iterations=4, alignment="mixed-order", teacher="same-state"
    )
    for full, changes in ((pipe, False), (dit, True)):
        before = dict(full.transformer.named_parameters())
        made, _ = quantized_with(full, method)
        off = [
            float((p - before[n]).detach().abs().max())
            for n, p in made.named_parameters()
            if n in before
        ]
        weights = [layer.weight for layer in made.modules() if isinstance(layer, QuantizedLayer)]
        assert len(weights) > 10
        known = [dict(full.transformer.named_modules())[n].weight for n in names_of(made)]
        off += [float((a - b).detach().abs().max()) for a, b in zip(weights, known, strict=True)]
        assert (max(off) > 1e-3) == changes


def names_of(made: Any) -> list[str]:
    return [n for n, layer in made.named_modules() if isinstance(layer, QuantizedLayer)]


@pytest.mark.parametrize("kind", [SAPTQ, PTQ4DiT])
def test_a_whole_pipeline_is_quantized_saved_and_only_rounding_changes(
    dit: Any, kind: Any, tmp_path: Any
) -> None:
    before = copy.deepcopy(dit.transformer.state_dict())
    method = kind(4, 8, iterations=2, batch_size=4, alignment="mixed-order", teacher="midpoint")
    made, report = quantized_with(dit, method, tmp_path)
    assert report.spec == method.as_dict()
    assert all(torch.equal(dit.transformer.state_dict()[k], v) for k, v in before.items())
    weights = {layer.name for layer in report.layers}
    for name, value in made.state_dict().items():
        if name in before and name.rsplit(".", 1)[0] not in weights:
            assert torch.equal(value, before[name])
    again, _ = load_quantized(tmp_path)
    with torch.no_grad():
        call = both(dit, 2).first[0].calls[0]
        outputs = [
            m(*call.arguments, **call.keywords).sample for m in (made, again, denoiser_of(dit))
        ]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_sa_ptq_keeps_both_ends_at_8_bits_and_says_what_is_wrong() -> None:
    method, layers = SAPTQ.of_bits("w4a8", first=2), ["a", "b", "c", "d"]
    assert [method.bits_of(n, layers) for n in layers] == [(8, 8), (8, 8), (4, 8), (8, 8)]
    assert SAPTQ(granularity="tensor").grid.per_tensor
    assert SAPTQ.from_dict(method.as_dict()) == method
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"granularity": "row"}, "channel or tensor"),
        ({"first": -1}, "at least 0"),
        ({"teacher": "none"}, "printed, midpoint, same-state"),
        ({"alignment": "none", "teacher": "midpoint"}, "alignment='mixed-order'"),
        ({"granularity": "tensor", "split": "shortcuts"}, "cannot be split"),
    ]
    for options, said in wrong:
        with pytest.raises(QuantizationError, match=said):
            SAPTQ(**options)


# ---------------------------------------------------------------- calls to train on


@pytest.mark.parametrize("teacher", TEACHERS)
def test_training_gets_the_same_pairs(dit: Any, teacher: Any) -> None:
    (source,) = trajectories(run_of(dit), MixedOrder(teacher), [M])
    found = list(source.epoch(1))
    assert len(found) == source.calls == M
    again = list(source.epoch(1))
    for call, other in zip(found, again, strict=True):
        assert torch.equal(call.student.arguments[0], other.student.arguments[0])
        assert call.shares == (GUIDANCE, 1 - GUIDANCE)  # DiT has the conditional branch first
        assert call.target.shape == call.student.arguments[0].shape  # no learned variance
    other = next(iter(source.epoch(2)))
    assert not torch.equal(other.student.arguments[0], found[0].student.arguments[0])
    off = [
        float((call.student.make(dit.transformer).sample[:, :4] - call.target).abs().max())
        for call in found
    ]
    # Nothing is left to learn where full precision stands at its own state, and something elsewhere.
    assert (max(off) == 0) == (min(off) == 0) == (teacher == "same-state")
    times = [float(call.student.keywords["timestep"][0]) for call in found]
    assert set(times) <= set(source.levels)
    assert len(source.levels) == (2 * M if teacher == "same-state" else M)
    json.dumps(source.identity)


def test_a_list_of_step_counts_is_one_source_for_each(dit: Any) -> None:
    found = trajectories(run_of(dit), MixedOrder(counted="evaluations"), [8, 4])
    assert [source.calls for source in found] == [4, 2]
    assert found[0].identity != found[1].identity
