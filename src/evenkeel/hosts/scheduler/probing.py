"""Ask a diffusers scheduler for its step law: a deep copy is run on impulses, with its noise replaced."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

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
    if "SCMScheduler" in _kinds(scheduler):  # its last timestep is only the end of the last step
        timesteps = timesteps[:-1]
    if "DDPMScheduler" in _kinds(scheduler) and scheduler.config.get("variance_type") == "learned":
        raise UnsupportedSampler(
            f"{name} with variance_type='learned' adds as much noise as the network says, which nobody "
            f"knows before. Use a sampler that takes the prediction alone, such as DDIM."
        )
    _refuse_unshifted_times(scheduler)
    alpha, sigma = level_at(scheduler, begin)
    run = _ProbeRun(scheduler, timesteps, begin, dict(step_kwargs or {}))
    with _NoiseFrom(run.next_noise):
        law = read_step_law(
            run,
            sampler=_known_as(scheduler),
            prediction=prediction_type(scheduler),
            timesteps=torch.as_tensor(timesteps).cpu().tolist(),  # at once
            alpha_start=alpha,
            sigma_start=sigma,
        )
    if "SASolverScheduler" in _kinds(scheduler) and law.is_stochastic:
        # Its corrector adds the previous step's noise again: the law has no single weight per draw.
        raise UnsupportedSampler(
            "SASolverScheduler with tau > 0 remembers earlier noise and has no step law of our form; "
            "build it with tau_func=lambda t: 0."
        )
    return law


def _refuse_unshifted_times(scheduler: Any) -> None:
    """Flow matching shifts the sigmas that it makes of explicit timesteps, but not the timesteps."""
    name, sigmas = type(scheduler).__name__, getattr(scheduler, "sigmas", None)
    if sigmas is None or not any(k.startswith("FlowMatch") for k in _kinds(scheduler)):
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
    if _is_flow(scheduler):
        return "flow_prediction"
    if "IPNDMScheduler" in _kinds(scheduler):
        return "v_prediction"  # fixed in its step: eps = beta x + alpha output
    declared = str(scheduler.config.get("prediction_type", "epsilon"))
    return {"original_sample": "sample"}.get(declared, declared)


def level_at(scheduler: Any, index: int) -> tuple[float, float]:
    """Signal and noise level (alpha, sigma) of the state before step ``index``.

    Three families: tables of sigma with an own conversion (DPM-Solver, UniPC, DEIS, SA), tables of
    sigma that are levels themselves (flow matching: alpha = 1 - sigma; Euler and relatives keep
    x / alpha, so alpha = 1), and cumulative products (DDIM, DDPM, PNDM, LCM, TCD).
    """
    name, kinds = type(scheduler).__name__, _kinds(scheduler)
    if any("EDM" in kind or kind == "CMStochasticIterativeScheduler" for kind in kinds):
        raise UnsupportedSampler(
            f"{name} preconditions the model output with its input (EDM); its output is none of "
            f"epsilon, v_prediction, sample or flow_prediction. Use Euler or DPM-Solver on the same "
            f"model."
        )
    sigmas, ipndm = getattr(scheduler, "sigmas", None), "IPNDMScheduler" in kinds
    if _is_flow(scheduler) and sigmas is not None:
        sigma = float(sigmas[index])
        return 1.0 - sigma, sigma
    if sigmas is not None and hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        alpha, sigma_t = scheduler._sigma_to_alpha_sigma_t(sigmas[index].cpu().double())
        return float(alpha), float(sigma_t)
    if sigmas is not None and hasattr(scheduler, "init_noise_sigma") and not ipndm:
        if kinds & {"TCDScheduler", "LCMScheduler"}:
            return _cumulative(scheduler, index)
        return 1.0, float(sigmas[index])
    if ipndm:
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
        self._learns_variance = (
            "DDPMScheduler" in _kinds(scheduler)
            and scheduler.config.get("variance_type") == "learned_range"
        )

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
        output = column(model_output)
        if self._learns_variance:  # half way between the least and the most that it can be
            output = torch.cat([output, torch.zeros_like(output)], 1)
        try:
            result = self.scheduler.step(
                output, timestep, x, return_dict=False, **self.step_kwargs
            )[0]
        except TypeError as e:
            raise UnsupportedSampler(
                f"{type(self.scheduler).__name__}.step does not take (model_output, timestep, "
                f"sample): {e}. This scheduler cannot be probed."
            ) from e
        self.index += 1
        return np.asarray(result.cpu().double().reshape(-1).numpy())


def fresh_copy(scheduler: Any, begin: int = 0) -> Any:
    """A deep copy as it was right after ``set_timesteps``, about to make step ``begin``."""
    base = getattr(type(scheduler), "_evenkeel_base", type(scheduler))
    twin = object.__new__(base)
    # Methods that were wrapped on the instance are bound to it: calling them would step the original.
    kept = {
        k: v
        for k, v in scheduler.__dict__.items()
        if not k.startswith("_evenkeel") and not (callable(v) and hasattr(base, k))
    }
    twin.__dict__.update(copy.deepcopy(kept))
    for name, value in list(twin.__dict__.items()):  # probing is scalar work: keep it off the GPU
        if isinstance(value, Tensor):
            twin.__dict__[name] = value.cpu()
    if hasattr(twin, "_step_index"):
        twin._step_index = None
        twin._begin_index = begin
    return twin


class _NoiseFrom(TorchFunctionMode):
    """Inside, whatever this thread draws from the normal distribution comes from ``stream``.

    Schedulers draw with ``torch.randn``, ``torch.randn_like``, or ``randn_tensor``, which calls the first. A
    mode is seen by the thread that enters it and by no other, and it ends with its block.
    """

    def __init__(self, stream: Callable[[tuple[int, ...]], Tensor]) -> None:
        super().__init__()
        self._stream = stream

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn_like:
            like = kwargs.get("input", args[0] if args else None)
            return self._stream(tuple(like.shape)).to(kwargs.get("dtype") or like.dtype)
        if func is torch.randn:
            sizes = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
            return self._stream(tuple(sizes)).to(kwargs.get("dtype") or torch.float32)
        return func(*args, **kwargs)


def _classes(scheduler: Any) -> list[type]:
    """Its class and those it derives from; of a proxy, those of the scheduler that it hands on to, too."""
    behind = getattr(getattr(scheduler, "from_config", None), "__self__", None)
    further = behind.__mro__ if isinstance(behind, type) else ()
    return [*dict.fromkeys((*type(scheduler).__mro__, *further))]


def _kinds(scheduler: Any) -> set[str]:
    """Names of all of them: what derives from a scheduler does what its base does."""
    return {kind.__name__ for kind in _classes(scheduler)}


def _known_as(scheduler: Any) -> str:
    """The class of diffusers that it is, or derives from, or hands on to."""
    kinds = _classes(scheduler)
    known = [k.__name__ for k in kinds if k.__module__.startswith("diffusers.schedulers.")]
    return known[0] if known else kinds[0].__name__


def _is_flow(scheduler: Any) -> bool:
    return any(k.startswith(("FlowMatch", "LTXEuler", "FlowMap")) for k in _kinds(scheduler))
