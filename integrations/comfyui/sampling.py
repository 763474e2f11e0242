"""What a sampler of ComfyUI does in a step, read off the sampler itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evenkeel.errors import Incompatible, UnsupportedSampler
from evenkeel.sampling.prediction import clean_output
from evenkeel.sampling.step_law import Array, StepLaw

_SMALL = 1e-9


@dataclass(frozen=True)
class Recipe:
    """``x_{k+1} = ratio[k] x_k + sum_j weights[k, j] denoised_j`` of K steps.

    Attributes:
        name: of the sampler.
        ratio: (K,).
        weights: (K, K), lower triangular, its diagonal not zero.

    """

    name: str
    ratio: Array
    weights: Array

    def denoised_for(self, k: int, target: Tensor, x: Tensor, given: Sequence[Tensor]) -> Tensor:
        """What the sampler has to be handed at step k so that it steps from ``x`` to ``target``.

        Args:
            k: the step.
            target: the state after it.
            x: the state before it.
            given: what it was handed at steps 0 to k - 1.

        """
        rest = target - float(self.ratio[k]) * x
        for j, earlier in enumerate(given[:k]):
            weight = float(self.weights[k, j])
            if weight:
                rest = rest - weight * earlier
        return rest / float(self.weights[k, k])


class _Listener:
    """A model of scalars: what it is asked at is kept, what it answers was decided before."""

    def __init__(self, guider: Any, answers: Tensor) -> None:
        self.inner_model = guider  # samplers look up what the model's noise levels mean
        self.answers = answers
        self.states: list[Tensor] = []
        self.sigmas: list[float] = []

    def __call__(self, x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        if len(self.states) >= len(self.answers):
            raise UnsupportedSampler("more calls than steps")
        self.states.append(x.reshape(-1).double().clone())
        self.sigmas.append(float(sigma.flatten()[0]))
        return self.answers[len(self.states) - 1].to(x.dtype).reshape(x.shape)


def read_recipe(sampler: Any, guider: Any, sigmas: Tensor) -> Recipe:
    """Run the sampler once on scalars: an impulse for the start and for every answer of the model.

    Raises:
        UnsupportedSampler: it draws noise, asks the model more or less than once a step, or is not linear.

    """
    function = getattr(sampler, "sampler_function", None)
    name = getattr(function, "__name__", type(sampler).__name__).removeprefix("sample_")
    steps = len(sigmas) - 1
    generator = torch.Generator().manual_seed(0)
    start = torch.zeros(steps + 4, dtype=torch.float64)
    answers = torch.zeros(steps, steps + 4, dtype=torch.float64)
    start[0], answers[:, 1 : steps + 1] = 1.0, torch.eye(steps, dtype=torch.float64)
    start[-2:] = torch.randn(2, generator=generator, dtype=torch.float64)
    answers[:, -2:] = torch.randn(steps, 2, generator=generator, dtype=torch.float64)
    # Some (uni_pc) make tensors of torch's default type on the way, and fail with any other.
    for dtype in (torch.float64, torch.float32):
        listener = _Listener(guider, answers)
        try:
            if function is None:
                raise UnsupportedSampler("it is no function")
            # What draws noise must not move the run's own, and some write into their sigmas.
            with torch.random.fork_rng(devices=[]):
                last = function(
                    listener,
                    start.to(dtype, copy=True).reshape(-1, 1, 1, 1),
                    sigmas.to("cpu", dtype, copy=True),
                    extra_args={"seed": 0},
                    callback=None,
                    disable=True,
                    **getattr(sampler, "extra_options", {}),
                )
            break
        except Exception as e:  # whatever a sampler makes of a model that is none
            if dtype == torch.float32 or isinstance(e, UnsupportedSampler):
                raise _unknown(name, f"it cannot be read ({e})") from e
    if len(listener.states) != steps:
        raise _unknown(name, f"it asks the model {len(listener.states)} times in {steps} steps")
    if not np.allclose(listener.sigmas, sigmas[:-1].double().cpu(), rtol=1e-4):
        raise _unknown(name, "it asks the model at other noise levels than its own")
    states = torch.stack([*listener.states, last.reshape(-1).double()])
    return _recipe(name, states, start, answers)


def _recipe(name: str, states: Tensor, start: Tensor, answers: Tensor) -> Recipe:
    steps = len(answers)
    if not bool(states.isfinite().all()):
        raise _unknown(name, "it gives values that are not finite")
    silent = steps + 1  # the row in which everything is zero
    if float(states[:, silent].abs().max()) > _SMALL:
        raise _unknown(name, "it draws noise")
    phi, whole = states[:, 0].numpy(), states[:, 1 : steps + 1].numpy()
    expected = states[:, :1] * start[-2:] + states[:, 1 : steps + 1] @ answers[:, -2:]
    if float((expected - states[:, -2:]).abs().max()) > 1e-5 * float(1 + expected.abs().max()):
        raise _unknown(name, "a step is not linear in the model's answers")
    if bool((np.abs(phi[:-1]) < 1e-7).any()):
        raise _unknown(name, "it forgets where it started")
    ratio = phi[1:] / phi[:-1]
    weights = whole[1:] - ratio[:, None] * whole[:-1]
    weights[np.abs(weights) < _SMALL] = 0.0
    if bool((np.abs(np.diagonal(weights)) < 1e-7).any()):
        raise _unknown(name, "a step does not depend on the model's latest answer")
    return Recipe(name, ratio, weights)


def _unknown(name: str, why: str) -> UnsupportedSampler:
    return UnsupportedSampler(
        f"Evenkeel Correct cannot correct the sampler {name!r}: {why}. Use one that is deterministic and "
        f"asks the model once a step, such as euler, ddim or dpmpp_2m."
    )


def levels_at(model_sampling: Any, sigmas: Sequence[float]) -> tuple[Array, Array]:
    """Signal and noise level at which the model is asked for these sigmas, asked of the model itself."""
    alpha, level = [], []
    for sigma in sigmas:
        s, zero, one = torch.tensor([float(sigma)]), torch.zeros(1, 1), torch.ones(1, 1)
        alpha.append(float(model_sampling.noise_scaling(s, zero.clone(), one.clone())))
        level.append(float(model_sampling.noise_scaling(s, one.clone(), zero.clone())))
    return np.array(alpha), np.array(level)


@dataclass(frozen=True)
class Outputs:
    """``denoised = a m + b x`` per step, m what the network itself gives; (K,) each."""

    a: Array
    b: Array


def law_of(
    recipe: Recipe, model_sampling: Any, sigmas: Tensor, prediction: str
) -> tuple[StepLaw, Outputs]:
    """The run in the terms of a record: samples and raw outputs of the network.

    Args:
        recipe: of the sampler.
        model_sampling: of the model.
        sigmas: (K + 1,).
        prediction: what the record's raw outputs are.

    Raises:
        Incompatible: this model's outputs are something else.

    """
    alpha, sigma = levels_at(model_sampling, sigmas.tolist())
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    a, b = [], []
    for k, s in enumerate(sigmas[:-1].float().cpu()):
        given = s.reshape(1)
        a.append(float(model_sampling.calculate_denoised(given, one, zero)))
        b.append(float(model_sampling.calculate_denoised(given, zero, one)))
        for x0, eps in ((1.0, 0.0), (0.0, 1.0)):
            output = clean_output(prediction, alpha[k], sigma[k], x0, eps)
            found = a[-1] * output + b[-1] * (alpha[k] * x0 + sigma[k] * eps)
            if abs(found - x0) > 1e-3 * max(1.0, sigma[k]):
                raise Incompatible(
                    f"the record is of a model whose outputs are {prediction!r}; those of this "
                    f"{type(model_sampling).__name__} are not. It was made for another model."
                )
    outputs = Outputs(np.array(a), np.array(b))
    samples = recipe.weights * outputs.b + np.diag(recipe.ratio)
    times = [float(model_sampling.timestep(s)) for s in sigmas[:-1].float().cpu()]
    law = StepLaw(
        sampler=recipe.name,
        prediction=prediction,
        timesteps=np.array(times),
        sample_weights=samples,
        output_weights=recipe.weights * outputs.a,
        noise_weights=np.zeros(len(times)),
        alpha=alpha,
        sigma=sigma,
        sigma_down=sigma[1:].copy(),
    )
    return law, outputs
