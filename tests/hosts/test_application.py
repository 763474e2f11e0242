"""Applying a correction to real pipelines: exact where nothing changes, refused where it must be."""

from __future__ import annotations

import ast
import copy
import gc
import inspect
import pickle
import subprocess
import sys
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny_pipelines import ALL, TinyPipeline, generate
from torch import Tensor, nn

import evenkeel
from evenkeel.applying import Summary
from evenkeel.corrections import ExactDrift, Identity, QDrift
from evenkeel.corrections.plan import SamplerPlan
from evenkeel.errors import EvenkeelError, Incompatible, OutOfRange
from evenkeel.fitting import calibrate
from evenkeel.hosts.scheduler.interception import installed
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.record import Record


@dataclass
class Rig:
    """A tiny pipeline with its quantized denoiser in place, calibrated at four steps."""

    tiny: TinyPipeline
    reference: nn.Module
    quantized: nn.Module
    record: Record

    @property
    def pipe(self) -> Any:
        return self.tiny.pipe

    @property
    def strong(self) -> QDrift:
        """Strong enough to be seen in every sample."""
        return QDrift(self.record.evidence, strength=100.0, min_explained=0.0)

    def sample(self, **options: Any) -> Tensor:
        return generate(self.tiny, **options)


def measured(tiny: TinyPipeline, quantized: nn.Module, steps: int = 4, **options: Any) -> Record:
    return calibrate(
        tiny.pipe,
        quantized=quantized,
        prompts=list(tiny.prompts),
        num_inference_steps=steps,
        guidance_scale=tiny.guidance_scale,
        call=tiny.call,
        progress=False,
        **options,
    )


def rigged(name: str) -> Rig:
    tiny = ALL[name]()
    quantized = quantize_module(tiny.model, QuantizerSpec.parse("w3a4-g8"))[0]
    rig = Rig(tiny, tiny.model, quantized, measured(tiny, quantized))
    setattr(tiny.pipe, tiny.denoiser, quantized)
    return rig


@pytest.fixture(scope="module")
def sdxl_rig() -> Rig:
    return rigged("sdxl")


@pytest.fixture(scope="module")
def sd3_rig() -> Rig:
    return rigged("sd3")


@pytest.fixture
def sdxl(sdxl_rig: Rig) -> Iterator[Rig]:
    yield from untouched(sdxl_rig)


@pytest.fixture
def sd3(sd3_rig: Rig) -> Iterator[Rig]:
    yield from untouched(sd3_rig)


def untouched(rig: Rig) -> Iterator[Rig]:
    """Lend the rig; afterwards scheduler and denoiser are the shared ones without a correction."""
    scheduler = rig.pipe.scheduler
    yield rig
    evenkeel.remove(rig.pipe)
    rig.pipe.scheduler = scheduler
    evenkeel.remove(rig.pipe)
    setattr(rig.pipe, rig.tiny.denoiser, rig.quantized)
    assert not rig.quantized._forward_pre_hooks


def plan_of(pipe: Any) -> SamplerPlan:
    plan = evenkeel.summary(pipe).plan
    assert plan is not None
    return plan


def plan_after(rig: Rig, **options: Any) -> SamplerPlan:
    rig.sample(**options)
    return plan_of(rig.pipe)


# ---- nothing changes that should not


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["flux", "pixart_sigma", "dit", "wan", "cogvideox"])
def test_the_identity_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    tiny = ALL[name]()
    tiny.pipe.to(dtype)
    before = generate(tiny, steps=3)
    evenkeel.apply(tiny.pipe, Identity())
    during = generate(tiny, steps=3)
    assert torch.equal(during, before) and during.dtype == before.dtype
    evenkeel.remove(tiny.pipe)
    assert torch.equal(generate(tiny, steps=3), before)


def test_a_correction_without_any_strength_changes_no_bit(sd3: Rig) -> None:
    before = sd3.sample()
    evenkeel.apply(sd3.pipe, replace(sd3.strong, strength=0.0))
    assert torch.equal(sd3.sample(), before)
    evenkeel.apply(sd3.pipe, sd3.strong)
    assert not torch.equal(sd3.sample(), before)


def test_running_twice_gives_the_same_result(sdxl: Rig) -> None:
    evenkeel.apply(sdxl.pipe, sdxl.strong)
    first = sdxl.sample()
    assert torch.equal(sdxl.sample(), first)
    assert not torch.equal(sdxl.sample(seeds=(1,)), first)


def test_applying_again_replaces_the_correction_before(sd3: Rig) -> None:
    evenkeel.apply(sd3.pipe, sd3.strong)
    once = sd3.sample()
    evenkeel.apply(sd3.pipe, ExactDrift(sd3.record.evidence))
    evenkeel.apply(sd3.pipe, sd3.strong)
    assert torch.equal(sd3.sample(), once)
    assert len(installed(sd3.pipe.scheduler)) == len(sd3.quantized._forward_pre_hooks) == 1


def test_factors_do_not_depend_on_the_batch(sd3: Rig) -> None:
    evenkeel.apply(sd3.pipe, sd3.strong)
    factors = plan_after(sd3, seeds=(0,)).factor
    assert torch.equal(plan_after(sd3, seeds=(0, 1)).factor, factors)
    assert (factors > 1).any()


def test_the_scheduler_looks_the_same_from_outside(sdxl: Rig) -> None:
    scheduler = sdxl.pipe.scheduler
    signatures = [inspect.signature(getattr(scheduler, n)) for n in ("step", "set_timesteps")]
    evenkeel.apply(sdxl.pipe, sdxl.strong)
    assert sdxl.pipe.scheduler is scheduler
    assert isinstance(scheduler, diffusers.EulerDiscreteScheduler)
    assert type(scheduler).__name__ == "EulerDiscreteScheduler"
    found = [inspect.signature(getattr(scheduler, n)) for n in ("step", "set_timesteps")]
    assert found == signatures
    assert len(scheduler.config) == len(diffusers.EulerDiscreteScheduler().config)
    evenkeel.remove(sdxl.pipe)
    assert type(scheduler) is diffusers.EulerDiscreteScheduler
    assert [n for n in vars(scheduler) if "evenkeel" in n] == []
    assert [n for n in vars(sdxl.pipe) if "evenkeel" in n] == []
    evenkeel.remove(sdxl.pipe)  # harmless


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_of_the_scheduler_are_corrected_and_independent(sdxl: Rig, duplicate: Any) -> None:
    plain = sdxl.sample()
    evenkeel.apply(sdxl.pipe, sdxl.strong)
    corrected = sdxl.sample()
    scheduler = sdxl.pipe.scheduler
    twin = replace(sdxl.tiny, pipe=copy.copy(sdxl.pipe))
    twin.pipe.scheduler = duplicate(scheduler)
    assert torch.equal(generate(twin), corrected) and not torch.equal(corrected, plain)
    index = scheduler.step_index
    twin.pipe.scheduler.set_timesteps(3)
    assert scheduler.step_index == index and len(scheduler.timesteps) == 4
    evenkeel.remove(sdxl.pipe)
    assert torch.equal(sdxl.sample(), plain)
    assert torch.equal(generate(twin), corrected)
    evenkeel.remove(twin.pipe)
    assert torch.equal(generate(twin), plain)


def test_a_copy_of_the_whole_pipeline_is_corrected_and_independent(sd3: Rig) -> None:
    plain = sd3.sample()
    evenkeel.apply(sd3.pipe, sd3.strong)
    corrected = sd3.sample()
    twin = replace(sd3.tiny, pipe=copy.deepcopy(sd3.pipe))
    evenkeel.remove(sd3.pipe)
    assert torch.equal(sd3.sample(), plain)
    assert torch.equal(generate(twin), corrected)
    evenkeel.remove(twin.pipe)
    assert torch.equal(generate(twin), plain)


def test_a_saved_pipeline_is_plain_diffusers(tmp_path: Path) -> None:
    rig = rigged("dit")
    setattr(rig.pipe, rig.tiny.denoiser, rig.reference)  # quantized layers have their own files
    plain = rig.sample()
    evenkeel.apply(rig.pipe, rig.strong, allow=("denoiser",))
    assert not torch.equal(rig.sample(), plain)
    rig.pipe.save_pretrained(tmp_path)
    for path in tmp_path.rglob("*.json"):
        assert "evenkeel" not in path.read_text()
    loaded = diffusers.DiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is diffusers.DDIMScheduler
    assert torch.equal(generate(replace(rig.tiny, pipe=loaded)), plain)


def test_model_offloading_works_with_a_correction() -> None:
    rig = rigged("sd3")
    evenkeel.apply(rig.pipe, rig.strong)
    corrected = rig.sample()
    rig.pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(rig.sample(), corrected)
    evenkeel.apply(rig.pipe, rig.strong)  # also afterwards
    assert torch.equal(rig.sample(), corrected)


def test_compiled_denoisers_are_the_same_denoiser(sd3: Rig) -> None:
    plain = sd3.sample()
    evenkeel.apply(sd3.pipe, sd3.strong)
    corrected = sd3.sample()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    sd3.pipe.transformer = torch.compile(sd3.quantized, backend=backend, fullgraph=True)
    torch.testing.assert_close(sd3.sample(), corrected, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1  # nothing in the graph depends on the step
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        evenkeel.remove(sd3.pipe)
        torch.testing.assert_close(sd3.sample(), plain, rtol=1e-4, atol=1e-4)
    evenkeel.apply(sd3.pipe, sd3.strong)  # the compiled one has the fingerprint of the plain one
    torch.testing.assert_close(sd3.sample(), corrected, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


# ---- a replaced scheduler, a replaced denoiser


def test_replacing_the_scheduler_warns_once_at_the_next_run(sdxl: Rig) -> None:
    plain = sdxl.sample()
    evenkeel.apply(sdxl.pipe, sdxl.strong)
    sdxl.pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(sdxl.pipe.scheduler.config)
    with pytest.warns(UserWarning, match="replaced after evenkeel.apply"):
        swapped = sdxl.sample()
    assert torch.equal(swapped, plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        sdxl.sample()


@pytest.mark.parametrize("order", ["remove, swap", "denoiser, remove, denoiser, swap"])
def test_removing_first_silences_the_warning(sdxl: Rig, order: str) -> None:
    evenkeel.apply(sdxl.pipe, sdxl.strong)
    sdxl.pipe.unet = {"remove, swap": sdxl.quantized}.get(order, sdxl.reference)
    evenkeel.remove(sdxl.pipe)
    sdxl.pipe.unet = sdxl.quantized
    sdxl.pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(sdxl.pipe.scheduler.config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        sdxl.sample()


def test_removing_through_a_pipeline_that_shares_the_scheduler_is_no_swap(sdxl: Rig) -> None:
    plain = sdxl.sample()
    evenkeel.apply(sdxl.pipe, sdxl.strong)
    evenkeel.remove(diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(sdxl.pipe))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(sdxl.sample(), plain)


def test_applying_again_after_a_swap_corrects_the_new_scheduler(sdxl: Rig) -> None:
    evenkeel.apply(sdxl.pipe, sdxl.strong)
    corrected = sdxl.sample()
    sdxl.pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(sdxl.pipe.scheduler.config)
    evenkeel.apply(sdxl.pipe, sdxl.strong)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(sdxl.sample(), corrected)


def test_a_correction_does_not_keep_the_pipeline_alive_and_no_hook_stays() -> None:
    rig = rigged("dit")
    evenkeel.apply(rig.pipe, rig.strong)
    quantized, tiny = rig.quantized, rig.tiny
    pipe = weakref.ref(rig.pipe)
    assert quantized._forward_pre_hooks
    del rig
    object.__setattr__(tiny, "pipe", None)
    gc.collect()
    assert pipe() is None
    assert not quantized._forward_pre_hooks and not quantized._forward_hooks


# ---- image to image, other step counts, other samplers


def test_image_to_image_starts_in_the_middle_of_the_schedule(sdxl: Rig) -> None:
    image_pipe = diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(sdxl.pipe)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def edited(strength: float) -> Tensor:
        return image_pipe(
            "a cat",
            image=image,
            strength=strength,
            num_inference_steps=4,
            guidance_scale=sdxl.tiny.guidance_scale,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            return_dict=False,
        )[0]

    plain = edited(0.5)
    evenkeel.apply(sdxl.pipe, sdxl.strong)
    full = plan_after(sdxl)
    corrected = edited(0.5)
    assert not torch.equal(corrected, plain)
    half = plan_of(sdxl.pipe)
    assert half.law.timesteps.tolist() == full.law.timesteps[2:].tolist()
    torch.testing.assert_close(half.factor, full.factor[2:], rtol=1e-5, atol=1e-7)
    assert torch.equal(edited(0.5), corrected)
    assert torch.equal(plan_after(sdxl).factor, full.factor)  # and back to a whole run


def test_another_step_count_gives_other_factors_at_calibrated_levels(sd3: Rig) -> None:
    evenkeel.apply(sd3.pipe, sd3.strong)
    four, three = plan_after(sd3), plan_after(sd3, steps=3)
    assert (four.law.steps, three.law.steps) == (4, 3)
    assert three.factor[0].tolist() != four.factor[0].tolist()  # same level, longer step
    assert torch.equal(plan_after(sd3).factor, four.factor)


def test_levels_that_were_not_calibrated_are_refused_or_left_alone_by_name(sdxl: Rig) -> None:
    plain = sdxl.sample(steps=8)
    evenkeel.apply(sdxl.pipe, sdxl.strong)
    with pytest.raises(OutOfRange, match="outside the calibrated noise levels"):
        sdxl.sample(steps=8)
    sdxl.sample()  # the refusal leaves nothing behind
    evenkeel.apply(sdxl.pipe, sdxl.strong, allow=("range",))
    assert not torch.equal(sdxl.sample(steps=8), plain)
    notes = plan_of(sdxl.pipe).explanations
    assert notes[0] == "outside the calibrated noise levels"
    assert plan_of(sdxl.pipe).active.any()


@pytest.mark.parametrize(
    ("name", "leaves_alone"),
    [
        ("HeunDiscreteScheduler", False),
        ("DPMSolverMultistepScheduler", False),
        ("EulerAncestralDiscreteScheduler", False),
        ("PNDMScheduler", False),
        ("UniPCMultistepScheduler", True),
    ],
)
def test_other_samplers_run_with_a_correction_of_their_own(
    sdxl: Rig, name: str, leaves_alone: bool
) -> None:
    config = sdxl.pipe.scheduler.config
    sdxl.pipe.scheduler = getattr(diffusers, name).from_config(config)
    sdxl.pipe.unet = sdxl.reference
    record = measured(sdxl.tiny, sdxl.quantized, steps=6)
    sdxl.pipe.unet = sdxl.quantized
    assert record.provenance.scheduler_class == name
    plain = sdxl.sample(steps=6)
    evenkeel.apply(sdxl.pipe, QDrift(record.evidence, min_explained=0.0))
    corrected = sdxl.sample(steps=6)
    plan = plan_of(sdxl.pipe)
    assert torch.isfinite(corrected).all()
    assert plan.law.steps == len(record.provenance.timesteps)
    assert plan.is_identity == torch.equal(corrected, plain) == leaves_alone
    assert not plan.active[torch.from_numpy(plan.law.intermediate)].any()
    evenkeel.remove(sdxl.pipe)
    assert torch.equal(sdxl.sample(steps=6), plain)


# ---- what is refused


def test_the_full_precision_denoiser_in_place_is_named(sdxl: Rig) -> None:
    sdxl.pipe.unet = sdxl.reference
    with pytest.raises(Incompatible, match=r"is the full-precision one; .*pipe\.unet = quantized"):
        evenkeel.apply(sdxl.pipe, sdxl.strong)
    assert installed(sdxl.pipe.scheduler) == []
    evenkeel.apply(sdxl.pipe, sdxl.strong, allow=("denoiser",))


def test_another_denoiser_is_refused_and_allowed_by_name(sdxl: Rig) -> None:
    sdxl.pipe.unet = quantize_module(sdxl.reference, QuantizerSpec.parse("w4a8-g8"))[0]
    with pytest.raises(Incompatible, match=r"w3a4-g8.*allow=\('denoiser',\)"):
        evenkeel.apply(sdxl.pipe, sdxl.strong)
    with pytest.raises(Incompatible, match="not the one"):
        evenkeel.apply(sdxl.pipe, sdxl.strong, allow=("scheduler", "guidance", "range"))
    evenkeel.apply(sdxl.pipe, sdxl.strong, allow=("denoiser",))
    assert evenkeel.summary(sdxl.pipe).correction == "q-drift"


@pytest.mark.parametrize(
    ("scheduler", "changes", "message"),
    [
        ("DPMSolverMultistepScheduler", {}, "the pipeline has DPMSolverMultistepScheduler"),
        ("EulerDiscreteScheduler", {"beta_end": 0.02}, "beta_end: calibrated 0.012, now 0.02"),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, "timestep_spacing"),
    ],
)
def test_another_scheduler_is_refused_and_allowed_by_name(
    sdxl: Rig, scheduler: str, changes: dict[str, Any], message: str
) -> None:
    config = sdxl.pipe.scheduler.config
    sdxl.pipe.scheduler = getattr(diffusers, scheduler).from_config(config, **changes)
    with pytest.raises(Incompatible, match=message):
        evenkeel.apply(sdxl.pipe, sdxl.strong)
    evenkeel.apply(sdxl.pipe, sdxl.strong, allow=("scheduler", "range"))
    assert torch.isfinite(sdxl.sample()).all()


def test_settings_that_json_cannot_hold_compare_equal_to_themselves() -> None:
    rig = rigged("dit")
    scheduler = diffusers.DDIMScheduler(
        trained_betas=torch.linspace(1e-4, 0.02, 1000).numpy(), clip_sample=False
    )
    rig.pipe.scheduler = scheduler
    rig.pipe.transformer = rig.reference
    record = measured(rig.tiny, rig.quantized)
    rig.pipe.transformer = rig.quantized
    evenkeel.apply(rig.pipe, QDrift(record.evidence))


def test_a_refused_correction_leaves_the_one_before_in_place(sdxl: Rig) -> None:
    evenkeel.apply(sdxl.pipe, sdxl.strong)
    with pytest.raises(Incompatible):
        evenkeel.apply(sdxl.pipe, sdxl.strong, guidance_scale=9.0)
    with pytest.raises(EvenkeelError, match=r"\['everything'\]"):
        evenkeel.apply(sdxl.pipe, sdxl.strong, allow=("everything",))
    assert evenkeel.summary(sdxl.pipe).correction == "q-drift"


def test_another_guidance_scale_is_refused_before_and_while_running(sdxl: Rig) -> None:
    with pytest.raises(Incompatible, match=r"guidance_scale=5\.0, this run uses 7\.5"):
        evenkeel.apply(sdxl.pipe, sdxl.strong, guidance_scale=7.5)
    evenkeel.apply(sdxl.pipe, sdxl.strong, guidance_scale=5)
    with pytest.raises(Incompatible, match=r"this run uses 7\.5"):
        sdxl.sample(guidance_scale=7.5)
    evenkeel.apply(sdxl.pipe, sdxl.strong, allow=("guidance",))
    assert torch.isfinite(sdxl.sample(guidance_scale=7.5)).all()


def test_guidance_is_checked_at_every_run_and_not_only_the_first(sdxl: Rig) -> None:
    evenkeel.apply(sdxl.pipe, sdxl.strong)
    first = sdxl.sample()
    with pytest.raises(Incompatible, match="guidance"):
        sdxl.sample(guidance_scale=6.0)
    assert torch.equal(sdxl.sample(), first)


# ---- context manager and summary


def test_the_context_manager_restores_nothing_or_the_correction_before(sd3: Rig) -> None:
    plain = sd3.sample()
    with evenkeel.applied(sd3.pipe, sd3.strong) as pipe:
        assert pipe is sd3.pipe
        strong = sd3.sample()
    assert torch.equal(sd3.sample(), plain) and not torch.equal(strong, plain)
    exact = ExactDrift(sd3.record.evidence, min_explained=0.0)
    evenkeel.apply(sd3.pipe, exact)
    outer = sd3.sample()
    with pytest.raises(RuntimeError, match="inside"):
        fail_inside(sd3, expected=strong)
    assert evenkeel.summary(sd3.pipe).correction == "exact-drift"
    assert torch.equal(sd3.sample(), outer)
    scheduler = sd3.pipe.scheduler
    sd3.pipe.scheduler = type(scheduler).from_config(scheduler.config)
    with pytest.warns(UserWarning, match="replaced after evenkeel.apply"):
        sd3.sample()  # the restored correction is watched again


def fail_inside(rig: Rig, expected: Tensor) -> None:
    with evenkeel.applied(rig.pipe, rig.strong):
        assert torch.equal(rig.sample(), expected)
        raise RuntimeError("inside")


def test_the_context_manager_passes_options_on(sdxl: Rig) -> None:
    with (
        pytest.raises(Incompatible, match="guidance"),
        evenkeel.applied(sdxl.pipe, sdxl.strong, guidance_scale=1.0),
    ):
        raise AssertionError("not reached")
    assert installed(sdxl.pipe.scheduler) == []


def test_the_summary_tells_what_is_applied_and_with_which_numbers(sd3: Rig) -> None:
    assert str(evenkeel.summary(sd3.pipe)) == (
        "no correction is applied to FlowMatchEulerDiscreteScheduler"
    )
    evenkeel.apply(sd3.pipe, sd3.strong)
    before = str(evenkeel.summary(sd3.pipe)).splitlines()
    assert before[0].startswith("q-drift on FlowMatchEulerDiscreteScheduler (arXiv:2603.18095")
    assert before[1] == "the factors are computed at the first step of the next run"
    sd3.sample()
    found = evenkeel.summary(sd3.pipe)
    assert isinstance(found, Summary) and found.plan is not None
    lines = str(found).splitlines()
    assert len(lines) == 1 + 4
    assert lines[1].startswith("step   0  t= 1000.00  1.")
    assert f"{float(found.plan.factor[1, 2]):.6f}" in lines[2]
    assert lines[4].endswith("final step: there is no noise left to take off")


def test_applying_loads_nothing_of_quantizers_or_fitting() -> None:
    code = """
import sys
from evenkeel.testing.pipeline import tiny_pipeline, sampled
from evenkeel.corrections import EpsilonScaling
import evenkeel
pipe = tiny_pipeline()
evenkeel.apply(pipe, EpsilonScaling(1.5))
sampled(pipe)
print(evenkeel.summary(pipe).correction, {n.split(".")[1] for n in sys.modules if n.startswith("evenkeel.")})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    name, loaded = done.stdout.split(maxsplit=1)
    assert name == "epsilon-scaling"
    unneeded = {"quantizers", "fitting", "comparing", "zoo", "reports", "cli", "metrics"}
    assert ast.literal_eval(loaded) & unneeded == set()
    assert "corrections" in loaded  # the companion: what is loaded is seen
