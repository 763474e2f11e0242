"""The test material itself: tiny pipelines repeat exactly, and the catalogue says what is true."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from tiny_pipelines import ALL, NO_BFLOAT16, TinyPipeline, generate
from torch import Tensor

from evenkeel.testing.scheduler_cases import BY_NAME, LINEAR, NONLINEAR, STEPS, Case

CASES = [*LINEAR, *NONLINEAR]
NOISY = [case for case in CASES if case.stochastic]
QUIET = [case for case in CASES if not case.stochastic]


@pytest.fixture(scope="module", params=ALL)
def tiny(request: pytest.FixtureRequest) -> TinyPipeline:
    return ALL[request.param]()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# ---- pipelines


def test_same_seeds_give_the_same_latents_to_the_bit(tiny: TinyPipeline) -> None:
    first = generate(tiny)
    assert torch.isfinite(first).all()
    assert torch.equal(first, generate(tiny))


def test_a_rebuilt_pipeline_gives_the_same_latents_to_the_bit(tiny: TinyPipeline) -> None:
    state = torch.get_rng_state()
    rebuilt = ALL[tiny.name]()
    assert torch.equal(state, torch.get_rng_state())  # building draws nothing from the outside
    torch.manual_seed(12345)  # and nothing outside reaches the result
    assert torch.equal(generate(rebuilt), generate(tiny))


def test_seed_prompt_guidance_and_weights_matter(tiny: TinyPipeline) -> None:
    reference = generate(tiny)
    changed = {
        "seed": generate(tiny, seeds=(1,)),
        "prompt": generate(tiny, prompts=tiny.prompts[1:]),
        "guidance": generate(tiny, guidance_scale=tiny.guidance_scale + 2.0),
        "weights": generate(ALL[tiny.name](seed=1)),
    }
    felt = {what: relative(other, reference) for what, other in changed.items()}
    assert min(felt.values()) > 1e-3, felt


def test_a_batch_of_two_equals_two_single_runs(tiny: TinyPipeline) -> None:
    batch = generate(tiny, seeds=(0, 1))
    single = [
        generate(tiny, seeds=(seed,), prompts=(prompt,))
        for seed, prompt in zip((0, 1), tiny.prompts, strict=True)
    ]
    assert relative(batch, torch.cat(single)) < 2e-5
    assert relative(batch.flip(0), torch.cat(single)) > 1e-2  # the order of rows is seen


def test_every_component_is_in_eval_mode(tiny: TinyPipeline) -> None:
    modules = [m for m in tiny.pipe.components.values() if isinstance(m, torch.nn.Module)]
    assert tiny.model in modules
    assert not any(layer.training for module in modules for layer in module.modules())


def test_the_scheduler_sees_the_declared_channels(
    tiny: TinyPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    step = tiny.pipe.scheduler.step

    def recording(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        shapes.append(model_output.shape)
        return step(model_output, *args, **kwargs)

    monkeypatch.setattr(tiny.pipe.scheduler, "step", recording)
    generate(tiny, steps=3)
    packed = {"flux": 2 * 2}.get(tiny.name, 1)  # a patch of FLUX lies in its channels
    assert [shape[tiny.channel_axis] for shape in shapes] == [packed * tiny.latent_channels] * 3


def test_only_wan_calls_its_denoiser_twice_per_step(tiny: TinyPipeline) -> None:
    calls = []
    hook = tiny.model.register_forward_hook(lambda *_: calls.append(1))
    generate(tiny, steps=3)
    hook.remove()
    assert len(calls) == 3 * {"wan": 2}.get(tiny.name, 1)


def test_denoiser_has_two_blocks_that_can_be_quantized_in_groups_of_16(tiny: TinyPipeline) -> None:
    stacks = [m for m in tiny.model.modules() if isinstance(m, torch.nn.ModuleList)]
    linears = [
        {m.in_features for m in block.modules() if isinstance(m, torch.nn.Linear)}
        for stack in stacks
        for block in stack
    ]
    assert sum(any(width % 16 == 0 for width in widths) for widths in linears) >= 2


def test_latents_decode_to_finite_pixels(tiny: TinyPipeline) -> None:
    pixels = generate(tiny, steps=2, output_type="pt")
    assert pixels.shape[-3] == 3
    assert torch.isfinite(pixels).all()
    assert pixels.std() > 1e-3  # not one flat colour


@pytest.mark.parametrize("name", [name for name in ALL if name not in NO_BFLOAT16])
def test_bfloat16_runs_end_to_end(name: str) -> None:
    full, half = ALL[name](), ALL[name]()
    half.pipe.to(torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    error = relative(generate(half, seeds=(0, 1)), generate(full, seeds=(0, 1)))
    assert 1e-5 < error < 0.2  # rounding is felt, and nothing worse


def test_one_prompt_per_seed_is_demanded() -> None:
    with pytest.raises(ValueError, match="one per seed"):
        generate(ALL["dit"](), seeds=(0, 1), prompts=(3,))


# ---- schedulers


def drive(case: Case, start: Tensor, outputs: Tensor, noise_seed: int = 0) -> Tensor:
    """Run the scheduler on fixed model outputs: the final sample."""
    scheduler = case.ready()
    random = {"generator": torch.Generator().manual_seed(noise_seed)}
    accepted = inspect.signature(scheduler.step).parameters.keys() & random.keys()
    step = case.step | {name: random[name] for name in accepted}
    scale = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    sample = start
    for output, timestep in zip(outputs, scheduler.timesteps, strict=True):
        scale(sample, timestep)  # some schedulers look up their index here
        sample = scheduler.step(output, timestep, sample, return_dict=False, **step)[0]
    return sample


def draw(case: Case, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, 4, 4)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    calls = len(case.ready().timesteps)
    return start, torch.randn((calls, *shape), generator=generator, dtype=torch.float64)


def departure_from_affine(case: Case) -> float:
    """f - f(0) is additive for an affine f; the noise is the same in all four runs."""
    (x_a, m_a), (x_b, m_b) = draw(case, 1), draw(case, 2)
    noise = drive(case, 0 * x_a, 0 * m_a)
    apart = drive(case, x_a, m_a) - noise + drive(case, x_b, m_b) - noise
    return relative(apart, drive(case, x_a + x_b, m_a + m_b) - noise)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_runs_ten_finite_steps(case: Case) -> None:
    final = drive(case, *draw(case, 0))
    assert torch.isfinite(final).all()
    assert final.shape == (2, 3, 4, 4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_declares_its_stages_and_prediction_type(case: Case) -> None:
    scheduler = case.ready()
    assert getattr(scheduler, "order", None) in (case.order_stages, None)
    assert len(scheduler.timesteps) >= case.order_stages * (STEPS - 1) + 1
    declared = scheduler.config.get("prediction_type", case.prediction_type)
    assert declared == case.prediction_type


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_linear_case_superposes(case: Case) -> None:
    assert departure_from_affine(case) < 3e-6  # float32 inside some schedulers


@pytest.mark.parametrize("case", NONLINEAR, ids=str)
def test_nonlinear_case_does_not_superpose(case: Case) -> None:
    assert departure_from_affine(case) > 1e-2


@pytest.mark.parametrize("case", NOISY, ids=str)
def test_stochastic_case_follows_its_generator(case: Case) -> None:
    inputs = draw(case, 0)
    assert torch.equal(drive(case, *inputs), drive(case, *inputs))
    assert not torch.equal(drive(case, *inputs), drive(case, *inputs, noise_seed=1))


@pytest.mark.parametrize("case", QUIET, ids=str)
def test_deterministic_case_ignores_its_generator(case: Case) -> None:
    inputs = draw(case, 0)
    assert torch.equal(drive(case, *inputs), drive(case, *inputs, noise_seed=1))


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(CASES)
