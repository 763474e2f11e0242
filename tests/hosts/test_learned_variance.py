"""Networks that give a learned variance beside the noise: the noise is corrected, the variance is left."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

import evenkeel
from evenkeel.corrections import CNC, ExactDrift
from evenkeel.corrections.epsilon_scaling import EpsilonScaling
from evenkeel.errors import UnsupportedSampler
from evenkeel.fitting import fit_tac
from evenkeel.hosts.scheduler.probing import probe_scheduler
from evenkeel.quantizers import QuantizerSpec, quantize_module

STEPS = 5
ASKED = {"prompts": [0, 1, 2, 3], "num_inference_steps": STEPS, "progress": False}


@pytest.fixture(scope="module")
def pair() -> tuple[DDPMPipeline, UNet2DModel]:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=6,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
    )
    pipe = DDPMPipeline(unet, DDPMScheduler(variance_type="learned_range", clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe, quantize_module(unet, QuantizerSpec.parse("w4a8-g8"))[0]


def sampled(pipe: DDPMPipeline) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    made = pipe(batch_size=2, num_inference_steps=STEPS, generator=generator, output_type="np")
    return torch.from_numpy(made.images)


def test_the_law_is_that_of_the_plain_steps(pair: tuple[DDPMPipeline, UNet2DModel]) -> None:
    laws = []
    for kind in ("learned_range", "fixed_small", "fixed_large"):
        scheduler = DDPMScheduler(variance_type=kind, clip_sample=False)
        scheduler.set_timesteps(STEPS)
        laws.append(probe_scheduler(scheduler))
    learned, small = laws[:2]
    assert torch.allclose(*(torch.as_tensor(law.output_weights) for law in (learned, small)))
    middle, low, high = (torch.as_tensor(law.noise_weights)[:-1] for law in laws)
    assert torch.allclose(middle, (low * high).sqrt(), rtol=1e-4)


def test_a_variance_without_limits_is_refused() -> None:
    scheduler = DDPMScheduler(variance_type="learned", clip_sample=False)
    scheduler.set_timesteps(STEPS)
    with pytest.raises(UnsupportedSampler, match="as much noise as the network says"):
        probe_scheduler(scheduler)


def test_what_is_edited_is_the_noise_alone(pair: tuple[DDPMPipeline, UNet2DModel]) -> None:
    pipe, _ = pair
    plain = sampled(pipe)
    evenkeel.apply(pipe, EpsilonScaling(1.1))
    scaled = sampled(pipe)
    evenkeel.remove(pipe)
    inner = pipe.unet.forward

    def by_hand(*args: object, **kwargs: object) -> object:
        out = inner(*args, **kwargs)
        out.sample = torch.cat([out.sample[:, :3] / 1.1, out.sample[:, 3:]], 1)
        return out

    pipe.unet.forward = by_hand
    try:
        expected = sampled(pipe)
    finally:
        del pipe.unet.forward
    torch.testing.assert_close(scaled, expected)
    assert not torch.allclose(scaled, plain, atol=1e-3) and torch.equal(sampled(pipe), plain)


def test_a_record_is_of_the_noise_and_its_corrections_act(
    pair: tuple[DDPMPipeline, UNet2DModel],
) -> None:
    pipe, quantized = pair
    record = evenkeel.calibrate(pipe, quantized=quantized, **ASKED)
    assert record.moments.mean_e.shape == (4, STEPS, 3)
    tac = fit_tac(pipe, quantized=quantized, **ASKED)
    full, pipe.unet = pipe.unet, quantized
    try:
        plain = sampled(pipe)
        for correction in (CNC(record.evidence), ExactDrift(record.evidence), tac):
            evenkeel.apply(pipe, correction)
            found = sampled(pipe)
            evenkeel.remove(pipe)
            assert bool(found.isfinite().all()) and not torch.equal(found, plain)
    finally:
        pipe.unet = full
