"""What happens inside a denoiser call: the level it is told, and one guidance branch's output."""

from __future__ import annotations

import copy
import gc
import pickle
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import pytest
import torch
from tiny_pipelines import ALL, TinyPipeline, generate
from torch import Tensor, nn

import evenkeel
from evenkeel.corrections.base import Correction, Identity
from evenkeel.corrections.composite import Composite
from evenkeel.corrections.plan import OutputEdit, Relabel, SamplerPlan, plain_plan
from evenkeel.errors import Incompatible, UnsupportedPipeline, UnsupportedSampler
from evenkeel.hosts.actuators.correcting import heads_attached, interceptors_of
from evenkeel.hosts.actuators.corrector import Corrector
from evenkeel.hosts.actuators.denoiser_edit import DenoiserEdit
from evenkeel.hosts.actuators.told_level import LevelTeller, argument_of
from evenkeel.hosts.scheduler.interception import installed
from evenkeel.sampling.step_law import StepLaw

STEPS = 3


@dataclass(frozen=True)
class Fixed(Correction):
    """A correction with a plan made by hand: step -> (told over own, scale); or an edit."""

    relabels: dict[int, tuple[float, float]] = field(default_factory=dict)
    edit: OutputEdit | None = None
    steps: int = 0
    stages: tuple[str, ...] = ("level", "branch", "output")
    name = "fixed"
    references = ()
    made_for = None

    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        del allow_range
        timestep, scale = torch.from_numpy(law.timesteps.copy()), torch.ones(law.steps).double()
        active = torch.zeros(law.steps, dtype=torch.bool)
        for k, (ratio, factor) in self.relabels.items():
            k -= self.steps - law.steps if self.steps else 0  # image to image: the last ones
            timestep[k], scale[k], active[k] = timestep[k] * ratio, factor, True
        return plain_plan(law, relabel=Relabel(timestep, scale, active), edit=self.edit)


@dataclass
class Spy:
    """What a denoiser was called with and what it gave, under and above our hooks."""

    times: list[Any] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)
    raw: list[Tensor] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)


def spied(model: nn.Module) -> Spy:
    """Inside the denoiser's forward, and after all hooks (``handle`` in ``seen`` order)."""
    spy = Spy()
    inner: Any = type(model).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        spy.times.append(argument_of(model, args, kwargs, ("timestep",)))
        spy.samples.append(argument_of(model, args, kwargs, ("hidden_states", "sample")).clone())
        out = inner(model, *args, **kwargs)
        spy.raw.append((out[0]).clone())
        return out

    model.forward = forward  # type: ignore[method-assign]
    return spy


def watch_answers(model: nn.Module, spy: Spy) -> Any:
    def keep(module: Any, args: Any, out: Any) -> None:
        spy.seen.append(out[0].clone())

    return model.register_forward_hook(keep)


def with_scheduler(name: str, scheduler: Any = None) -> TinyPipeline:
    tiny = ALL[name]()
    if scheduler is not None:
        tiny.pipe.scheduler = scheduler
    return tiny


def ddim(**options: Any) -> Any:
    return diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, **options)


# ---- relabel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "scheduler", "per_step"),
    [
        ("sdxl", None, 1),  # Euler: one 0-dimensional float timestep, positional arguments
        ("sdxl", ddim, 1),  # the same with a whole number
        ("flux", None, 1),  # keywords, a thousandth of the timestep, one per sample, no guidance
        ("sd3", None, 1),
        ("dit", None, 1),  # rows doubled
        ("pixart_sigma", None, 1),
        ("sana", None, 1),
        ("wan", None, 2),  # one call per branch
        ("cogvideox", None, 1),
    ],
)
def test_the_network_is_told_and_given_what_the_plan_says(
    name: str, scheduler: Any, per_step: int, dtype: torch.dtype
) -> None:
    tiny = with_scheduler(name, scheduler and scheduler())
    tiny.pipe.to(dtype)
    plain = spied(tiny.model)
    generate(tiny, steps=STEPS)
    told = spied(tiny.model)
    own = tiny.pipe.scheduler.timesteps.double()
    up = float((own[1] + 7) / own[1])  # whole numbers stay whole
    with evenkeel.applied(tiny.pipe, Fixed({1: (up, 0.75)})):
        generate(tiny, steps=STEPS)
    assert len(plain.times) == len(told.times) == STEPS * per_step
    for call in range(len(plain.times)):
        changed = call // per_step == 1
        before, after = torch.as_tensor(plain.times[call]), torch.as_tensor(told.times[call])
        assert after.dtype == before.dtype and after.shape == before.shape
        expected = before.double() * (up if changed else 1)
        tolerance = 5e-3 if before.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(after.double(), expected, rtol=tolerance, atol=0)
    for call in range(2 * per_step):  # later states have other outputs behind them
        factor = 0.75 if call >= per_step else 1.0
        assert told.samples[call].dtype == dtype
        # A corrected run steps in float32, so that half-precision states differ by a rounding.
        exact = (
            {"rtol": 0.0, "atol": 0.0} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        )
        torch.testing.assert_close(told.samples[call], plain.samples[call] * factor, **exact)
    assert told.samples[per_step].abs().max() > 0
    assert not torch.equal(told.raw[per_step], plain.raw[per_step])


def test_a_first_step_can_be_relabelled_and_the_last() -> None:
    tiny = with_scheduler("sdxl", ddim())
    spy = spied(tiny.model)
    with evenkeel.applied(tiny.pipe, Fixed({0: (1.0, 0.5), 2: (2.0, 1.0)})):
        generate(tiny, steps=STEPS)
    own = tiny.pipe.scheduler.timesteps.tolist()
    assert [int(t) for t in spy.times] == [own[0], own[1], 2 * own[2]]


def test_timestep_zero_can_be_told_another() -> None:
    teller = LevelTeller()
    unet = ALL["dit"]().model
    time = torch.zeros(2, dtype=torch.int64)
    teller.put(0.0, 3.0, 1.0)
    changed = teller(unet, (torch.ones(2, 4, 8, 8),), {"timestep": time})
    assert changed is not None
    assert changed[1]["timestep"].tolist() == [3, 3] and time.tolist() == [0, 0]


def test_python_numbers_and_given_frames_keep_their_kind() -> None:
    teller, model = LevelTeller(), ALL["dit"]().model
    sample = torch.ones(2, 4, 8, 8)
    teller.put(500.0, 600.0, 1.0)
    told = [
        teller(model, (sample,), {"timestep": time})[1]["timestep"]  # type: ignore[index]
        for time in (500.0, 500, torch.tensor([0.0, 500.0]))
    ]
    assert told[0] == 600.0 and type(told[0]) is float
    assert told[1] == 600 and type(told[1]) is int
    assert torch.allclose(told[2], torch.tensor([0.0, 600.0]))


def test_image_to_image_is_told_at_the_right_step() -> None:
    tiny = with_scheduler("sdxl")
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(tiny.pipe)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    spy = spied(tiny.model)
    with evenkeel.applied(tiny.pipe, Fixed({3: (0.5, 1.0)}, steps=4)):
        pipe(
            "a cat",
            image=image,
            strength=0.5,
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
    own = pipe.scheduler.timesteps.tolist()
    assert [float(t) for t in spy.times] == pytest.approx([own[2], 0.5 * own[3]])


# ---- identity, restoring, copies


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["sdxl", "flux", "dit"])
def test_an_identity_plan_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    tiny = ALL[name]()
    tiny.pipe.to(dtype)
    before = generate(tiny, steps=STEPS)
    none = OutputEdit.of(torch.ones(STEPS, 4, dtype=torch.float64), branch=0)
    with evenkeel.applied(tiny.pipe, Fixed({}, none)):
        assert torch.equal(generate(tiny, steps=STEPS), before)
    with evenkeel.applied(tiny.pipe, Fixed({1: (1.0, 0.9)})):
        assert not torch.equal(generate(tiny, steps=STEPS), before)


def test_removing_restores_and_nothing_stays_behind() -> None:
    tiny = ALL["sdxl"]()
    before = generate(tiny, steps=STEPS)
    evenkeel.apply(tiny.pipe, Fixed({1: (0.5, 0.9)}))
    assert tiny.model._forward_hooks
    assert not torch.equal(generate(tiny, steps=STEPS), before)
    assert torch.equal(generate(tiny, steps=STEPS), generate(tiny, steps=STEPS))
    evenkeel.remove(tiny.pipe)
    assert not tiny.model._forward_hooks and not tiny.model._forward_pre_hooks
    assert torch.equal(generate(tiny, steps=STEPS), before)


def test_between_runs_and_in_copies_the_denoiser_is_itself() -> None:
    tiny = ALL["dit"]()
    call = {"timestep": torch.tensor([500]), "class_labels": torch.tensor([3])}
    sample = torch.ones(1, 4, 8, 8)
    with torch.no_grad():
        before = tiny.model(sample, **call)[0]
        evenkeel.apply(tiny.pipe, Fixed({0: (0.5, 0.5)}))
        assert torch.equal(tiny.model(sample, **call)[0], before)  # no run has begun
        generate(tiny, steps=STEPS)
        assert torch.equal(tiny.model(sample, **call)[0], before)
        tiny.pipe.scheduler.set_timesteps(STEPS)  # a run begins: the coming step is relabelled
        coming = {**call, "timestep": tiny.pipe.scheduler.timesteps[:1]}
        during = tiny.model(sample, **coming)[0]
        twin = copy.deepcopy(tiny.model)
        assert torch.equal(twin(sample, **call)[0], before)
        assert not torch.equal(twin(sample, **coming)[0], during)
    (found,) = [i for i in installed(tiny.pipe.scheduler) if isinstance(i, DenoiserEdit)]
    for twin in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        twin.attach()
        assert twin._denoiser is None and twin._handles == [] and twin.is_dead


def test_neither_pipeline_nor_denoiser_is_kept_alive() -> None:
    tiny = ALL["dit"]()
    edit = DenoiserEdit(Corrector(Fixed(), tiny.pipe), tiny.model)
    object.__setattr__(tiny, "pipe", None)
    gc.collect()
    assert edit._denoiser is not None and edit._denoiser() is None
    edit.attach()
    assert edit._handles == []


def test_a_scheduler_exchanged_after_an_interrupted_run_is_not_told() -> None:
    tiny = ALL["sdxl"]()
    before = generate(tiny, steps=STEPS)
    evenkeel.apply(tiny.pipe, Fixed({0: (0.5, 0.5), 1: (0.5, 0.5)}))

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(tiny, steps=STEPS, callback_on_step_end=stop)
    scheduler = tiny.pipe.scheduler
    tiny.pipe.scheduler = type(scheduler).from_config(scheduler.config)
    with pytest.warns(UserWarning, match="replaced after evenkeel.apply"):
        assert torch.equal(generate(tiny, steps=STEPS), before)


def test_only_corrections_that_say_so_get_the_hooks() -> None:
    tiny = ALL["dit"]()

    def kinds(correction: Any) -> list[type]:
        return [type(i) for i in interceptors_of(correction, tiny.pipe, tiny.model)]

    assert kinds(Identity()) == [Corrector]
    assert kinds(Fixed(stages=("output", "increment"))) == [Corrector]
    assert kinds(Fixed()) == [Corrector, DenoiserEdit]
    assert kinds(Composite((Identity(), Fixed()))) == [Corrector, DenoiserEdit]
    assert kinds(Composite((Identity(),))) == [Corrector]


def test_attached_only_inside_the_context() -> None:
    tiny = ALL["dit"]()
    found = interceptors_of(Fixed(), tiny.pipe, tiny.model)
    with heads_attached(found):
        assert len(tiny.model._forward_pre_hooks) == len(tiny.model._forward_hooks) == 1
    assert not tiny.model._forward_pre_hooks and not tiny.model._forward_hooks


# ---- one guidance branch


def branch_edit(branch: int, channels: int = 4) -> OutputEdit:
    """Active at step 1 only; another gain and bias for every channel."""
    gain = torch.ones(STEPS, channels, dtype=torch.float64)
    bias = torch.zeros_like(gain)
    gain[1] += 0.5 + torch.arange(channels)
    bias[1] = 10.0 * torch.arange(1, channels + 1)
    return OutputEdit.of(gain, bias, branch=branch)


@pytest.mark.parametrize("branch", [0, 1])
@pytest.mark.parametrize(
    ("name", "learned"), [("dit", True), ("pixart_sigma", True), ("sd3", False), ("sdxl", False)]
)
def test_a_branch_edit_multiplies_only_its_half(name: str, learned: bool, branch: int) -> None:
    tiny = ALL[name]()
    spy, edit = spied(tiny.model), branch_edit(branch)
    evenkeel.apply(tiny.pipe, Fixed({}, edit))
    handle = watch_answers(tiny.model, spy)
    generate(tiny, steps=STEPS, seeds=(0, 1))
    handle.remove()
    assert len(spy.raw) == STEPS
    for k in (0, 2):
        assert torch.equal(spy.seen[k], spy.raw[k])
    raw, seen = spy.raw[1], spy.seen[1]
    assert raw.shape == (4, 8 if learned else 4, *raw.shape[2:])
    ours, other = (slice(0, 2), slice(2, 4))[:: 1 if branch == 0 else -1]
    assert torch.equal(seen[other], raw[other])
    assert torch.equal(seen[ours, 4:], raw[ours, 4:])  # the learned variance
    expected = edit.gain[1].view(-1, 1, 1) * raw[ours, :4] + edit.bias[1].view(-1, 1, 1)
    torch.testing.assert_close(seen[ours, :4].double(), expected)


def test_branch_zero_of_dit_is_the_conditional_one() -> None:
    """Guidance of scale g gives the conditional branch the share g: that is how a bias arrives."""
    tiny = ALL["dit"]()
    found = {}
    for branch in (None, 0, 1):
        outputs: list[Tensor] = []
        edit = replace(branch_edit(0), gain=torch.ones(STEPS, 4).double(), branch=branch)
        evenkeel.apply(tiny.pipe, Fixed({}, edit))
        corrector = installed(tiny.pipe.scheduler)[0]
        corrector.after = (  # type: ignore[method-assign]
            lambda scheduler, output, sample, result, kept=outputs: (kept.append(output), result)[1]
        )
        generate(tiny, steps=STEPS)
        found[branch] = outputs[1]
        evenkeel.remove(tiny.pipe)
    bias = branch_edit(0).bias[1].view(1, -1, 1, 1).float()
    plain = found[None] - bias
    torch.testing.assert_close(found[0] - plain, 4.0 * bias.expand_as(plain), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[1] - plain, -3.0 * bias.expand_as(plain), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("branch", [0, 1])
def test_one_call_per_branch(branch: int) -> None:
    tiny = ALL["wan"]()
    spy, edit = spied(tiny.model), branch_edit(branch)
    evenkeel.apply(tiny.pipe, Fixed({}, edit))
    handle = watch_answers(tiny.model, spy)
    generate(tiny, steps=STEPS)
    handle.remove()
    changed = [not torch.equal(a, b) for a, b in zip(spy.raw, spy.seen, strict=True)]
    assert changed == [False, False, branch == 0, branch == 1, False, False]
    raw, seen = spy.raw[2 + branch], spy.seen[2 + branch]
    expected = edit.gain[1].view(-1, 1, 1, 1) * raw + edit.bias[1].view(-1, 1, 1, 1)
    torch.testing.assert_close(seen.double(), expected)


# ---- what is refused


def test_a_branch_that_does_not_exist_is_refused() -> None:
    tiny = ALL["flux"]()  # its guidance is distilled: one call, one branch
    evenkeel.apply(tiny.pipe, Fixed({}, branch_edit(0)))
    with pytest.raises(Incompatible, match="called 1 times, without the same latents"):
        generate(tiny, steps=STEPS)


def test_a_branch_edit_with_the_sample_or_noise_is_refused() -> None:
    tiny = ALL["dit"]()
    one = torch.ones(STEPS, 4, dtype=torch.float64)
    evenkeel.apply(tiny.pipe, Fixed({}, OutputEdit.of(one, sample=one, branch=0)))
    with pytest.raises(UnsupportedSampler, match="takes a gain and a bias"):
        generate(tiny, steps=STEPS)


def test_a_fraction_is_not_told_as_a_whole_number() -> None:
    tiny = with_scheduler("sdxl", ddim())
    evenkeel.apply(tiny.pipe, Fixed({1: (1.0007, 1.0)}))
    with pytest.raises(UnsupportedSampler, match="cannot be told 3"):
        generate(tiny, steps=STEPS)


def test_a_time_that_is_no_multiple_of_the_schedulers_is_refused() -> None:
    teller, model = LevelTeller(), ALL["dit"]().model
    sample = torch.ones(1, 4, 8, 8)
    teller.put(900.0, 900.0, 1.0)
    assert teller(model, (sample,), {"timestep": torch.tensor(1 - 0.9)}) is None  # as Lumina does
    teller.put(500.0, 600.0, 1.0)
    with pytest.raises(UnsupportedPipeline, match=r"time 0\.5 at the scheduler's timestep 500"):
        teller(model, (sample,), {"timestep": torch.tensor(1 - 0.5)})


def test_latents_with_something_joined_to_them_are_refused() -> None:
    teller, model = LevelTeller(), ALL["dit"]().model
    teller.shape = (4, 8, 8)
    teller.put(500.0, 600.0, 0.9)
    for sample in (torch.ones(1, 9, 8, 8), [torch.ones(4, 8, 8)]):
        with pytest.raises(UnsupportedPipeline, match="something is joined"):
            teller(model, (sample,), {"timestep": torch.tensor(500.0)})


def test_a_denoiser_without_such_arguments_is_refused() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(UnsupportedPipeline, match="Linear takes \\['input'\\]"):
        argument_of(layer, (torch.ones(2),), {}, ("timestep",))
    with pytest.raises(UnsupportedPipeline, match="called without timestep"):
        argument_of(ALL["dit"]().model, (torch.ones(2),), {}, ("timestep",))
