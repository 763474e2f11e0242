"""A model of ComfyUI as the nodes see one, and a run of it: contract, not code, of ComfyUI.

``tests/integrations/real_comfyui.py`` asks the same of the real one.
"""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class FlowSampling:
    """Straight paths: x = (1 - sigma) x0 + sigma eps, the network gives eps - x0."""

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return sigma * noise + (1 - sigma) * latent_image

    def calculate_input(self, sigma, noise):
        return noise

    def calculate_denoised(self, sigma, model_output, model_input):
        return model_input - model_output * sigma.reshape(-1, *[1] * (model_output.dim() - 1))

    def timestep(self, sigma):
        return sigma * 1000


class NoiseSampling(FlowSampling):
    """x = x0 + sigma eps, the network gives eps."""

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return sigma * noise + latent_image

    def calculate_input(self, sigma, noise):
        return noise / (1 + sigma.reshape(-1, *[1] * (noise.dim() - 1)) ** 2) ** 0.5


class _Executor:
    def __init__(self, original: Any, class_obj: Any, wrappers: list[Any]) -> None:
        self._original, self.class_obj, self._wrappers = original, class_obj, wrappers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._wrappers:
            return self._original(*args, **kwargs)
        rest = _Executor(self._original, self.class_obj, self._wrappers[1:])
        return self._wrappers[0](rest, *args, **kwargs)


class BaseModel:
    def __init__(self, diffusion_model: nn.Module, sampling: Any, channels: int) -> None:
        self.diffusion_model, self.model_sampling = diffusion_model, sampling
        self.latent_format = SimpleNamespace(latent_channels=channels)

    def apply_model(
        self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None
    ):
        kept = (transformer_options or {}).get("wrappers", {}).get("apply_model", {})
        run = _Executor(self._apply_model, self, [w for ws in kept.values() for w in ws])
        return run(x, t, c_concat, c_crossattn, control, transformer_options)

    def _apply_model(self, x, t, c_concat, c_crossattn, control, transformer_options):
        s = self.model_sampling
        out = self.diffusion_model(s.calculate_input(t, x), s.timestep(t))
        return s.calculate_denoised(t, out, x)


class ModelPatcher:
    def __init__(self, model: BaseModel) -> None:
        self.model = model
        self.patches: dict[str, Any] = {}
        self.backup: dict[str, Any] = {}
        self.wrappers: dict[str, dict[str, list[Any]]] = {}
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def clone(self):
        other = copy.copy(self)
        other.wrappers = {k: {n: [*w] for n, w in v.items()} for k, v in self.wrappers.items()}
        other.model_options = {**self.model_options}
        return other

    def add_wrapper_with_key(self, wrapper_type, key, wrapper):
        self.wrappers.setdefault(wrapper_type, {}).setdefault(key, []).append(wrapper)

    def set_model_sampler_post_cfg_function(
        self, post_cfg_function, disable_cfg1_optimization=False
    ):
        found = self.model_options.get("sampler_post_cfg_function", [])
        self.model_options["sampler_post_cfg_function"] = [*found, post_cfg_function]

    def get_model_object(self, name):
        return getattr(self.model, name)


class Guider:
    """Calls the model for both branches at once, in the order that it is told to."""

    def __init__(
        self, patcher: ModelPatcher, cfg: float = 1.0, order: tuple[int, ...] = (1, 0)
    ) -> None:
        self.patcher, self.inner_model, self.cfg, self.order = patcher, patcher.model, cfg, order

    def __call__(self, x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        order = self.order if self.cfg != 1 else (0,)
        options = {"wrappers": self.patcher.wrappers, "cond_or_uncond": [*order]}
        rows = self.inner_model.apply_model(
            torch.cat([x] * len(order)),
            torch.cat([sigma] * len(order)),
            transformer_options=options,
        )
        parts = dict(zip(order, rows.chunk(len(order)), strict=True))
        denoised = parts[0] if len(order) == 1 else parts[1] + self.cfg * (parts[0] - parts[1])
        for function in self.patcher.model_options.get("sampler_post_cfg_function", []):
            denoised = function({"denoised": denoised, "input": x, "sigma": sigma})
        return denoised

    def sample(self, sampler: Any, sigmas: Tensor, noise: Tensor) -> Tensor:
        kept = self.patcher.wrappers.get("sampler_sample", {})
        run = _Executor(_sample, sampler, [w for ws in kept.values() for w in ws])
        with torch.no_grad():
            return run(self, sigmas, sampler, noise)


def _sample(guider: Guider, sigmas: Tensor, sampler: Any, noise: Tensor) -> Tensor:
    scaled = guider.inner_model.model_sampling.noise_scaling(
        sigmas[0], noise, torch.zeros_like(noise)
    )
    return sampler.sampler_function(
        guider, scaled, sigmas, extra_args={}, callback=None, disable=True
    )


def sample_euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
    for here, there in itertools.pairwise(sigmas):
        denoised = model(x, here * x.new_ones(len(x)))
        x = x + (x - denoised) / here * (there - here)
    return x


def sample_dpmpp_2m(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Second order in log sigma, with the answer before (Lu et al. 2022)."""
    before = None
    logs = -sigmas.log()
    for k in range(len(sigmas) - 1):
        denoised = model(x, sigmas[k] * x.new_ones(len(x)))
        h = logs[k + 1] - logs[k]
        used = denoised
        if before is not None and sigmas[k + 1] > 0:
            r = (logs[k] - logs[k - 1]) / h
            used = (1 + 1 / (2 * r)) * denoised - before / (2 * r)
        x = sigmas[k + 1] / sigmas[k] * x - (-h).expm1() * used
        before = denoised
    return x


def sample_default_dtype(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Two-step Adams-Bashforth whose coefficients are of the default dtype; writes into its sigmas."""
    slopes: list[Tensor] = []
    for here, there in itertools.pairwise(sigmas):
        slopes.append((x - model(x, here * x.new_ones(len(x)))) / here)
        weights = torch.tensor([-0.5, 1.5] if len(slopes) > 1 else [1.0])
        x = x + (there - here) * torch.tensordot(weights, torch.stack(slopes[-2:]), dims=1)
    sigmas[-1] = 0.001
    return x


def sample_heun(model, x, sigmas, extra_args=None, callback=None, disable=None):
    for here, there in itertools.pairwise(sigmas):
        slope = (x - model(x, here * x.new_ones(len(x)))) / here
        ahead = x + slope * (there - here)
        if there > 0:
            slope = (slope + (ahead - model(ahead, there * x.new_ones(len(x)))) / there) / 2
        x = x + slope * (there - here)
    return x


def sample_euler_ancestral(model, x, sigmas, extra_args=None, callback=None, disable=None):
    for here, there in itertools.pairwise(sigmas):
        denoised = model(x, here * x.new_ones(len(x)))
        x = denoised + (x - denoised) / here * there * 0.8 + torch.randn_like(x) * there * 0.6
    return x


def sampler(function: Any) -> Any:
    return SimpleNamespace(sampler_function=function, extra_options={})
