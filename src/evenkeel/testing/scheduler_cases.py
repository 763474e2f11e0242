"""The schedulers of diffusers in the configurations that sampling theory has to cope with.

``LINEAR`` lists those whose step is affine in the model outputs and the samples (plus noise where
``stochastic``); ``NONLINEAR`` lists those that clip. Every case is built without any download and
takes ten steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers as d
import numpy as np

STEPS = 10
SD_BETAS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@dataclass(frozen=True, eq=False)
class Case:
    """A scheduler and how to drive it.

    ``stochastic``: fresh noise reaches the sample. ``order_stages``: calls of ``step`` per noise
    level, which is ``scheduler.order`` (2 for Heun and KDPM2).
    """

    name: str
    make: Callable[[], Any]
    set_timesteps: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)
    prediction_type: str = "epsilon"
    stochastic: bool = False
    order_stages: int = 1

    def ready(self) -> Any:
        """A fresh scheduler with its timesteps set."""
        scheduler = self.make()
        scheduler.set_timesteps(**self.set_timesteps)
        return scheduler

    def __str__(self) -> str:
        return self.name


def _case(
    name: str,
    scheduler: Callable[..., Any],
    *,
    set_timesteps: dict[str, Any] | None = None,
    step: dict[str, Any] | None = None,
    predicts: str | None = None,
    stochastic: bool = False,
    order_stages: int = 1,
    **config: Any,
) -> Case:
    """``predicts`` names the prediction type of a class that has no such setting."""
    return Case(
        name=name,
        make=lambda: scheduler(**config),
        set_timesteps={"num_inference_steps": STEPS} if set_timesteps is None else set_timesteps,
        step=step or {},
        prediction_type=predicts or config.get("prediction_type", "epsilon"),
        stochastic=stochastic,
        order_stages=order_stages,
    )


def _sd(name: str, scheduler: Callable[..., Any], **options: Any) -> Case:
    return _case(name, scheduler, **SD_BETAS, **options)


def _predicting(
    name: str, scheduler: Callable[..., Any], *types: str, **options: Any
) -> list[Case]:
    return [_sd(f"{name}-{t}", scheduler, prediction_type=t, **options) for t in types]


def _tau_zero(timestep: Any) -> float:
    return 0.0


def _tau_one(timestep: Any) -> float:
    return 1.0


def _karras_style() -> list[Case]:
    eps, v, sample = "epsilon", "v_prediction", "sample"
    euler = d.EulerDiscreteScheduler
    return [
        *_predicting("euler", euler, eps, v, sample),
        _sd("euler-karras", euler, use_karras_sigmas=True),
        *_predicting("heun", d.HeunDiscreteScheduler, eps, v, order_stages=2),
        *_predicting("kdpm2", d.KDPM2DiscreteScheduler, eps, v, order_stages=2),
        *_predicting("lms", d.LMSDiscreteScheduler, eps, v),
        _sd("euler-ancestral", d.EulerAncestralDiscreteScheduler, stochastic=True),
        _sd("kdpm2-ancestral", d.KDPM2AncestralDiscreteScheduler, stochastic=True, order_stages=2),
    ]


def _markov_style() -> list[Case]:
    eps, v, sample = "epsilon", "v_prediction", "sample"
    ddim = {"scheduler": d.DDIMScheduler, "clip_sample": False}
    cog = {"prediction_type": v, "timestep_spacing": "trailing", "clip_sample": False}
    zero_snr = {"rescale_betas_zero_snr": True, "snr_shift_scale": 3.0}
    return [
        *(_sd(f"ddim-{t}", set_alpha_to_one=False, prediction_type=t, **ddim) for t in (eps, v)),
        _sd(f"ddim-{sample}", prediction_type=sample, **ddim),
        _sd("ddim-eta1", step={"eta": 1.0}, stochastic=True, **ddim),
        _sd("ddpm", d.DDPMScheduler, clip_sample=False, stochastic=True),
        _sd("cogvideox-ddim", d.CogVideoXDDIMScheduler, **cog),
        _sd("cogvideox-ddim-zero-snr", d.CogVideoXDDIMScheduler, **cog, **zero_snr),
        _sd("lcm", d.LCMScheduler, stochastic=True),
        _sd("tcd", d.TCDScheduler, step={"eta": 0.3}, stochastic=True),
        *_predicting("pndm-plms", d.PNDMScheduler, eps, v, skip_prk_steps=True),
        _sd("pndm-prk", d.PNDMScheduler),
        _case("ipndm", d.IPNDMScheduler, predicts=v),
    ]


def _dpm_multistep() -> list[Case]:
    multistep = d.DPMSolverMultistepScheduler
    cases = _predicting("dpmpp-2", multistep, "v_prediction", "sample")
    for algorithm in ("dpmsolver++", "dpmsolver", "sde-dpmsolver++"):
        for order in (1, 2, 3):
            # the first order has no second stage, so nothing to choose
            for solver in ("midpoint",) if order == 1 else ("midpoint", "heun"):
                options = {"solver_order": order, "solver_type": solver}
                if algorithm == "dpmsolver":  # divides by the noise level: it must not end at zero
                    options["final_sigmas_type"] = "sigma_min"
                options |= {"algorithm_type": algorithm, "stochastic": algorithm.startswith("sde")}
                cases.append(_sd(f"{algorithm}-{order}-{solver}", multistep, **options))
    sde = {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min", "stochastic": True}
    return [
        *cases,
        *(_sd(f"sde-dpmsolver-{o}", multistep, solver_order=o, **sde) for o in (1, 2)),
        _sd("dpmpp-2-lu-lambdas", multistep, use_lu_lambdas=True),
        _sd("dpmpp-2-karras", multistep, use_karras_sigmas=True),
        _case("dpmpp-2-flow", multistep, flow_shift=3.0, **FLOW),
        _case("dpmpp-3-flow", multistep, flow_shift=3.0, solver_order=3, **FLOW),
    ]


def _dpm_singlestep() -> list[Case]:
    singlestep = d.DPMSolverSinglestepScheduler
    final = {"dpmsolver++": "zero", "dpmsolver": "sigma_min"}
    return [
        *(
            _sd(
                f"single-{algorithm}-{order}",
                singlestep,
                algorithm_type=algorithm,
                solver_order=order,
                lower_order_final=True,
                final_sigmas_type=final[algorithm],
            )
            for algorithm in final
            for order in (1, 2, 3)
        ),
        _sd("single-dpmsolver++-2-heun", singlestep, solver_type="heun", lower_order_final=True),
        _case("single-flow", singlestep, lower_order_final=True, **FLOW),
    ]


def _predictor_corrector() -> list[Case]:
    unipc, sa = d.UniPCMultistepScheduler, d.SASolverScheduler
    above_zero = {"final_sigmas_type": "sigma_min"}
    noise = {"algorithm_type": "noise_prediction"}
    return [
        *(
            _sd(
                f"unipc-{order}-{solver}-{'x0' if x0 else 'noise'}",
                unipc,
                solver_order=order,
                solver_type=solver,
                predict_x0=x0,
                **above_zero,
            )
            for order in (1, 2, 3)
            for solver in ("bh1", "bh2")
            for x0 in (True, False)
        ),
        # the only solver that stays finite when the last noise level is zero
        *(_sd(f"unipc-{order}-bh2-zero", unipc, solver_order=order) for order in (1, 2, 3)),
        _sd("unipc-v_prediction", unipc, prediction_type="v_prediction"),
        _case("unipc-flow", unipc, flow_shift=5.0, **FLOW),
        *(_sd(f"deis-{o}", d.DEISMultistepScheduler, solver_order=o) for o in (1, 2, 3)),
        _case("deis-flow", d.DEISMultistepScheduler, **FLOW),
        _sd("sa-tau0", sa, tau_func=_tau_zero),
        _sd("sa-tau0-noise", sa, tau_func=_tau_zero, **noise),
        _sd("sa-tau0-p3c4", sa, tau_func=_tau_zero, predictor_order=3, corrector_order=4),
        _sd("sa-tau1", sa, tau_func=_tau_one, stochastic=True),
    ]


def _flow_matching_and_edm() -> list[Case]:
    euler = d.FlowMatchEulerDiscreteScheduler
    flow: dict[str, Any] = {"predicts": "flow_prediction"}
    dynamic: dict[str, Any] = {"use_dynamic_shifting": True, **flow}
    shifted: dict[str, Any] = {"sigmas": np.linspace(1.0, 1.0 / STEPS, STEPS), "mu": 1.15}
    dpm = d.EDMDPMSolverMultistepScheduler
    return [
        _case("flow-euler-shift1", euler, **flow),
        _case("flow-euler-shift3", euler, shift=3.0, **flow),
        _case("flow-euler-dynamic", euler, set_timesteps=shifted, **dynamic),
        _case("flow-euler-stochastic", euler, stochastic_sampling=True, stochastic=True, **flow),
        _case("flow-heun", d.FlowMatchHeunDiscreteScheduler, order_stages=2, **flow),
        *(
            _case(f"edm-euler-{t}", d.EDMEulerScheduler, prediction_type=t)
            for t in ("epsilon", "v_prediction")
        ),
        *(_case(f"edm-dpmpp-{o}", dpm, solver_order=o) for o in (1, 2, 3)),
        _case("edm-dpmpp-2-heun", dpm, solver_type="heun"),
        _case("edm-sde-dpmpp-2", dpm, algorithm_type="sde-dpmsolver++", stochastic=True),
    ]


LINEAR: list[Case] = [
    *_karras_style(),
    *_markov_style(),
    *_dpm_multistep(),
    *_dpm_singlestep(),
    *_predictor_corrector(),
    *_flow_matching_and_edm(),
]

_QUANTILE = {"thresholding": True, "sample_max_value": 100.0}
NONLINEAR: list[Case] = [
    _sd("ddim-default-clip", d.DDIMScheduler),
    # up to the largest value allowed, thresholding scales by a quantile of the sample itself
    _sd("ddim-thresholding", d.DDIMScheduler, clip_sample=False, **_QUANTILE),
    _sd("ddpm-default-clip", d.DDPMScheduler, stochastic=True),
    _sd("dpmpp-2-thresholding", d.DPMSolverMultistepScheduler, thresholding=True),
    _case("unclip", d.UnCLIPScheduler, stochastic=True),
]

BY_NAME: dict[str, Case] = {case.name: case for case in [*LINEAR, *NONLINEAR]}
# One of each kind: deterministic, stochastic, with memory, with stages, flow matching.
SOME: list[Case] = [
    BY_NAME[name]
    for name in (
        "euler-epsilon",
        "ddim-v_prediction",
        "ddim-eta1",
        "heun-epsilon",
        "dpmpp-2-karras",
        "sde-dpmsolver++-2-midpoint",
        "flow-euler-shift3",
    )
]
