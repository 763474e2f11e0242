"""Ask a diffusers scheduler for its step law: a deep copy is run on impulses, with its noise replaced."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evenkeel.errors import UnsupportedSampler
from evenkeel.sampling.step_law import Array, StepLaw, read_step_law


def probe_scheduler(
    scheduler: Any,
    *,
    step_kwargs: Mapping[str, Any] | None = None,
    begin: int = 0,
) -> StepLaw:
    """The step law of a diffusers scheduler as configured and after ``set_timesteps``.

    The scheduler itself is not touched. Deterministic multistep and two-stage solvers are read
    with their whole history; stochastic ones with the weight of their own noise.

    Args:
        scheduler: any scheduler with ``timesteps`` set and a ``step(model_output, timestep,
            sample, ...)`` that is linear.
        step_kwargs: further arguments of ``step`` that change it, such as ``{"eta": 1.0}``.
        begin: index of the first step, as image-to-image pipelines start in the middle.

    Raises:
        UnsupportedSampler: not linear (clipping, thresholding), not finite, an unusual ``step``
            signature, ``set_timesteps`` not called, or flow matching whose timesteps tell the
            denoiser another noise level than the sample has.

    >>> from diffusers import EulerDiscreteScheduler
    >>> scheduler = EulerDiscreteScheduler()
    >>> scheduler.set_timesteps(10)
    >>> law = probe_scheduler(scheduler)
    >>> law.steps, law.has_history
    (10, False)

    """
    name = type(scheduler).__name__
    timesteps = getattr(scheduler, "timesteps", None)
    # Many constructors fill in all training timesteps; the number of steps is what tells.
    steps = getattr(scheduler, "num_inference_steps", None)
    if steps is None or timesteps is None or len(timesteps) == 0:
        raise UnsupportedSampler(f"{name} has no timesteps yet; call set_timesteps first.")
    timesteps = timesteps[begin:]
    if name == "SCMScheduler":  # its last timestep is only the end of the last step
        timesteps = timesteps[:-1]
    _refuse_unshifted_times(scheduler)
    alpha, sigma = level_at(scheduler, begin)
    run = _ProbeRun(scheduler, timesteps, begin, dict(step_kwargs or {}))
    with _noise_replaced(type(scheduler), run.next_noise):
        law = read_step_law(
            run,
            sampler=name,
            prediction=prediction_type(scheduler),
            timesteps=torch.as_tensor(timesteps).cpu().tolist(),  # at once
            alpha_start=alpha,
            sigma_start=sigma,
        )
    if name == "SASolverScheduler" and law.is_stochastic:
        # Its corrector adds the previous step's noise again: the law has no single weight per draw.
        raise UnsupportedSampler(
            "SASolverScheduler with tau > 0 remembers earlier noise and has no step law of our form; "
            "build it with tau_func=lambda t: 0."
        )
    return law


def _refuse_unshifted_times(scheduler: Any) -> None:
    """Flow matching shifts the sigmas that it makes of explicit timesteps, but not the timesteps."""
    name, sigmas = type(scheduler).__name__, getattr(scheduler, "sigmas", None)
    if not name.startswith("FlowMatch") or sigmas is None:
        return
    if scheduler.config.get("time_shift_type") == "linear":
        return  # CogView4 and GLM-Image: their networks are trained on the unshifted times
    times = scheduler.timesteps.cpu().double() / scheduler.config.num_train_timesteps
    gap = (times - sigmas[: len(times)].cpu().double()).abs()
    worst = int(gap.argmax())
    if gap[worst] > 1e-3:
        raise UnsupportedSampler(
            f"{name} tells the denoiser time {times[worst]:.4g} at step {worst}, where the sample has "
            f"noise level sigma = {sigmas[worst]:.4g}. Its sigmas are shifted (by mu or shift), but "
            f"timesteps that are passed explicitly are not. Pass sigmas to set_timesteps or to the "
            f"pipeline instead of timesteps."
        )


def prediction_type(scheduler: Any) -> str:
    """What the scheduler takes its model output for: epsilon, v_prediction, sample, flow_prediction."""
    name = type(scheduler).__name__
    if name.startswith(("FlowMatch", "LTXEuler", "FlowMap")):
        return "flow_prediction"
    if name == "IPNDMScheduler":
        return "v_prediction"  # fixed in its step: eps = beta x + alpha output
    declared = str(scheduler.config.get("prediction_type", "epsilon"))
    return {"original_sample": "sample"}.get(declared, declared)


def level_at(scheduler: Any, index: int) -> tuple[float, float]:
    """Signal and noise level (alpha, sigma) of the state before step ``index``.

    Three families: tables of sigma with an own conversion (DPM-Solver, UniPC, DEIS, SA), tables of
    sigma that are levels themselves (flow matching: alpha = 1 - sigma; Euler and relatives keep
    x / alpha, so alpha = 1), and cumulative products (DDIM, DDPM, PNDM, LCM, TCD).
    """
    name = type(scheduler).__name__
    if "EDM" in name or name == "CMStochasticIterativeScheduler":
        raise UnsupportedSampler(
            f"{name} preconditions the model output with its input (EDM); its output is none of "
            f"epsilon, v_prediction, sample or flow_prediction. Use Euler or DPM-Solver on the same "
            f"model."
        )
    sigmas = getattr(scheduler, "sigmas", None)
    if name.startswith(("FlowMatch", "LTXEuler", "FlowMap")) and sigmas is not None:
        sigma = float(sigmas[index])
        return 1.0 - sigma, sigma
    if sigmas is not None and hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        alpha, sigma_t = scheduler._sigma_to_alpha_sigma_t(sigmas[index].double())
        return float(alpha), float(sigma_t)
    if sigmas is not None and hasattr(scheduler, "init_noise_sigma") and name != "IPNDMScheduler":
        if name in ("TCDScheduler", "LCMScheduler"):
            return _cumulative(scheduler, index)
        return 1.0, float(sigmas[index])
    if name == "IPNDMScheduler":
        return float(scheduler.alphas[index]), float(scheduler.betas[index])
    return _cumulative(scheduler, index)


def _cumulative(scheduler: Any, index: int) -> tuple[float, float]:
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise UnsupportedSampler(
            f"{type(scheduler).__name__} has neither sigmas nor alphas_cumprod: its noise level is "
            f"unknown. Use one of the schedulers in the documentation's table."
        )
    product = float(table[int(scheduler.timesteps[index])])
    return product**0.5, (1 - product) ** 0.5


class _ProbeRun:
    """A fresh copy of the scheduler stepping rows of scalars (rows, 1, 1, 1) in float64."""

    def __init__(
        self, scheduler: Any, timesteps: Tensor, begin: int, step_kwargs: dict[str, Any]
    ) -> None:
        self.scheduler = fresh_copy(scheduler, begin)
        self.timesteps = timesteps
        self.step_kwargs = step_kwargs
        self.index = 0
        self.noise = torch.zeros(0)

    def next_noise(self, shape: tuple[int, ...]) -> Tensor:
        return self.noise.reshape(shape)

    def step(self, model_output: Array, sample: Array, noise: Array) -> Array:
        def column(values: Array) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).reshape(-1, 1, 1, 1)

        self.noise = column(noise)
        timestep = self.timesteps[self.index]
        x = column(sample)
        if hasattr(self.scheduler, "scale_model_input"):
            self.scheduler.scale_model_input(x, timestep)
        try:
            result = self.scheduler.step(
                column(model_output), timestep, x, return_dict=False, **self.step_kwargs
            )[0]
        except TypeError as e:
            raise UnsupportedSampler(
                f"{type(self.scheduler).__name__}.step does not take (model_output, timestep, "
                f"sample): {e}. This scheduler cannot be probed."
            ) from e
        self.index += 1
        return np.asarray(result.double().reshape(-1).numpy())


def fresh_copy(scheduler: Any, begin: int = 0) -> Any:
    """A deep copy as it was right after ``set_timesteps``, about to make step ``begin``."""
    base = getattr(type(scheduler), "_evenkeel_base", type(scheduler))
    twin = object.__new__(base)
    kept = {k: v for k, v in scheduler.__dict__.items() if not k.startswith("_evenkeel")}
    twin.__dict__.update(copy.deepcopy(kept))
    for name, value in list(twin.__dict__.items()):  # probing is scalar work: keep it off the GPU
        if isinstance(value, Tensor):
            twin.__dict__[name] = value.cpu()
    if hasattr(twin, "_step_index"):
        twin._step_index = None
        twin._begin_index = begin
    return twin


@contextmanager
def _noise_replaced(
    scheduler_class: type, stream: Callable[[tuple[int, ...]], Tensor]
) -> Iterator[None]:
    """Inside, whatever the scheduler's modules draw comes from ``stream``.

    The scheduler modules import ``randn_tensor`` by name, so it is replaced there; some call
    ``torch.randn`` and ``torch.randn_like`` directly.
    """
    modules = {
        sys.modules[c.__module__]
        for c in scheduler_class.__mro__
        if c.__module__.startswith("diffusers.schedulers")
    }
    saved: list[tuple[Any, str, Any]] = [
        (m, "randn_tensor", m.randn_tensor) for m in modules if hasattr(m, "randn_tensor")
    ]
    saved += [(torch, n, getattr(torch, n)) for n in ("randn", "randn_like")]

    def fake_tensor(shape: Any, *_: Any, **kwargs: Any) -> Tensor:
        return stream(tuple(shape)).to(kwargs.get("dtype") or torch.float32)

    def fake_randn(*shape: Any, **kwargs: Any) -> Tensor:
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return fake_tensor(sizes, **kwargs)

    def fake_like(x: Tensor, **_: Any) -> Tensor:
        return stream(tuple(x.shape)).to(x.dtype)

    fakes = {"randn_tensor": fake_tensor, "randn": fake_randn, "randn_like": fake_like}
    try:
        for owner, name, _ in saved:
            setattr(owner, name, fakes[name])
        yield
    finally:
        for owner, name, original in saved:
            setattr(owner, name, original)
