"""Evidence as a calibration would measure it, drawn instead of measured."""

from __future__ import annotations

import functools

import torch

from evenkeel.hosts.scheduler.probing import probe_scheduler
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.error_structure import step_gram
from evenkeel.statistics.evidence import Evidence
from evenkeel.statistics.moments import PairedMoments
from evenkeel.statistics.provenance import Provenance
from evenkeel.testing.scheduler_cases import Case

PROMPTS, ELEMENTS = 6, 64


def drawn_evidence(law: StepLaw, error: float, *, channels: int = 4, seed: int = 0) -> Evidence:
    """Of outputs whose error has a gain, a bias, heavy tails and memory from step to step.

    Args:
        law: of the calibrated run.
        error: its size; 0 for two equal denoisers.
        channels: of the latents.
        seed: of what is drawn.

    """
    generator = torch.Generator().manual_seed(seed)
    shape = (PROMPTS, law.steps, channels, ELEMENTS)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    alpha, sigma = (torch.tensor(v[:-1]).reshape(1, -1, 1, 1) for v in (law.alpha, law.sigma))
    x = normal(*shape) * (alpha**2 + sigma**2).sqrt()
    e = 0.8 * x / (1 + x.std()) + 0.6 * normal(*shape)
    held = normal(PROMPTS, 1, channels, ELEMENTS)
    fresh = normal(*shape)
    r = fresh * (1 + 0.5 * fresh**2) + held
    d = error * (0.3 * r + 0.05 * e + 0.02)
    return Evidence(
        law.prediction,
        law.alpha[:-1],
        law.sigma[:-1],
        PairedMoments.of(e, d, x),
        source=_provenance(law, channels),
        gram=step_gram(d),
    )


@functools.cache
def law_of(case: Case) -> StepLaw:
    """Of a scheduler of the catalogue; whoever asks twice gets the same.

    Raises:
        UnsupportedSampler: it has no step law of our form.

    """
    return probe_scheduler(case.ready(), step_kwargs=case.step)


@functools.cache
def evidence_of(case: Case, error: float) -> Evidence:
    """Drawn for a scheduler of the catalogue."""
    return drawn_evidence(law_of(case), error)


def _provenance(law: StepLaw, channels: int) -> Provenance:
    return Provenance(
        pipeline_class="DiTPipeline",
        denoiser="transformer",
        reference="drawn",
        quantized="drawn with an error",
        quantizer="none",
        scheduler_class=law.sampler,
        scheduler_config={},
        prediction=law.prediction,
        num_inference_steps=law.steps,
        guidance_scale=None,
        timesteps=law.timesteps.tolist(),
        alpha=law.alpha[:-1].tolist(),
        sigma=law.sigma[:-1].tolist(),
        call={},
        trajectory="full-precision",
        layout={"ndim": 4, "axis": 1, "channels": channels, "patch": 1},
        latent_shape=[channels, 8, 8],
        dtype="float32",
        elements=ELEMENTS,
        versions={},
    )
