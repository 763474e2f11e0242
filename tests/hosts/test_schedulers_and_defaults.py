"""Other schedulers for a pipeline, arguments that pipelines guess wrongly, and noise that they forget."""

import diffusers
import numpy as np
import pytest
import tiny_pipelines
import torch

from evenkeel.comparing.generation import Arm, generate
from evenkeel.errors import UnsupportedSampler
from evenkeel.hosts.pipeline.pipelines import call_defaults, denoiser_of, run_pipeline
from evenkeel.hosts.run import Run
from evenkeel.hosts.scheduler.schedulers import change_scheduler, scheduler_names


def test_a_scheduler_keeps_what_the_present_one_was_configured_with():
    pipe = tiny_pipelines.sdxl().pipe
    change_scheduler(pipe, "DDIMScheduler", clip_sample=False)
    assert type(pipe.scheduler) is diffusers.DDIMScheduler
    found = pipe.scheduler.config
    assert (found.beta_start, found.beta_schedule, found.steps_offset) == (
        0.00085,
        "scaled_linear",
        1,
    )
    assert found.clip_sample is False


@pytest.mark.parametrize("name", ["Nonsense", "UNet2DModel", "ddim"])
def test_what_is_no_scheduler_is_refused_with_the_list(name):
    pipe = tiny_pipelines.sdxl().pipe
    before = pipe.scheduler
    with pytest.raises(UnsupportedSampler, match="EulerDiscreteScheduler"):
        change_scheduler(pipe, name)
    assert pipe.scheduler is before


@pytest.mark.parametrize(
    ("build", "name", "changes"),
    [
        (tiny_pipelines.sdxl, "FlowMatchEulerDiscreteScheduler", {}),
        (tiny_pipelines.flux, "EulerDiscreteScheduler", {}),
        (tiny_pipelines.sana, "DDIMScheduler", {}),
        (tiny_pipelines.sdxl, "DPMSolverMultistepScheduler", {"use_flow_sigmas": True}),
    ],
)
def test_flow_matching_and_noise_schedules_are_not_mixed(build, name, changes):
    with pytest.raises(UnsupportedSampler, match="flow matching"):
        change_scheduler(build().pipe, name, **changes)


def test_every_listed_name_is_a_class():
    names = scheduler_names()
    assert {"DDIMScheduler", "FlowMatchEulerDiscreteScheduler"} <= set(names)
    assert all(isinstance(getattr(diffusers, name), type) for name in names)


@pytest.mark.parametrize(
    ("build", "side"),
    [(tiny_pipelines.flux, 32), (tiny_pipelines.sana, 32), (tiny_pipelines.sdxl, None)],
)
def test_pictures_are_not_larger_than_the_networks_know(build, side):
    found = call_defaults(build().pipe)
    assert (found.get("height"), found.get("width")) == (side, side)


def test_a_size_that_was_trained_for_is_left_alone():
    pipe = tiny_pipelines.flux().pipe
    pipe.vae.register_to_config(sample_size=1024)  # more than the 128 x 2 that the pipeline assumes
    assert "height" not in call_defaults(pipe)


def test_the_longest_tokenizer_decides_how_long_a_prompt_may_be():
    pipe = tiny_pipelines.flux().pipe
    assert (pipe.tokenizer.model_max_length, pipe.tokenizer_2.model_max_length) == (77, 512)
    assert "max_sequence_length" not in call_defaults(pipe)
    pipe.tokenizer_2.model_max_length = 20
    assert call_defaults(pipe)["max_sequence_length"] == 77


def unconditional():
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    pipe = diffusers.DDPMPipeline(unet=unet.eval(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_pixel_space_pipelines_run_in_bfloat16():
    pipe = unconditional()
    asked = {"num_inference_steps": 3, "guidance_scale": None, "output_type": "np", "call": {}}
    full = run_pipeline(pipe, [0, 1], [5, 6], **asked)
    half = run_pipeline(pipe.to(torch.bfloat16), [0, 1], [5, 6], **asked)
    assert half.dtype == np.float32 and half.shape == full.shape == (2, 8, 8, 3)
    # Seven bits of mantissa: single pixels move by per cents, the picture stays.
    assert 0 < np.sqrt(np.mean((half - full) ** 2)) < 0.2 * full.std()
    with pytest.raises(TypeError, match="BFloat16"):
        torch.zeros(1, dtype=torch.bfloat16).numpy()  # nothing is left behind


def test_noise_from_the_global_generator_is_seeded_and_the_generator_left_alone():
    tiny = tiny_pipelines.dit()
    change_scheduler(tiny.pipe, "DDPMScheduler")  # DiTPipeline gives it no generator

    def images(seed):
        run = Run(tiny.pipe, [3, 7], 3, guidance_scale=1.5, seed=seed)
        arm = Arm("arm", denoiser_of(tiny.pipe))
        return generate(run, arm)[0]

    state = torch.get_rng_state()
    first = images(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(images(1), first)
    assert not torch.equal(images(2), first)
