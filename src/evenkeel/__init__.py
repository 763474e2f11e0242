"""Quantized diffusion models that sample as if they had never been quantized.

``calibrate`` compares the two denoisers, a ``Record`` keeps the statistics, ``apply`` changes how the
quantized one is sampled, ``compare`` measures whether that helped. Names are imported on first use:
``import evenkeel`` alone loads neither torch nor diffusers.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evenkeel.applying import applied as applied
    from evenkeel.applying import apply as apply
    from evenkeel.applying import remove as remove
    from evenkeel.applying import summary as summary
    from evenkeel.comparing.comparison import compare as compare
    from evenkeel.comparing.generation import Arm as Arm
    from evenkeel.comparing.marginal_check import marginal_check as marginal_check
    from evenkeel.corrections import ExactDrift as ExactDrift
    from evenkeel.corrections import Identity as Identity
    from evenkeel.corrections import QDrift as QDrift
    from evenkeel.corrections import Readout as Readout
    from evenkeel.corrections import RecoveryAdapters as RecoveryAdapters
    from evenkeel.estimate import Estimate as Estimate
    from evenkeel.fitting import calibrate as calibrate
    from evenkeel.fitting import fit_adapters as fit_adapters
    from evenkeel.fitting import fit_readout as fit_readout
    from evenkeel.fitting import fit_stepbaq as fit_stepbaq
    from evenkeel.fitting import fit_tac as fit_tac
    from evenkeel.fitting import refit_branches as refit_branches
    from evenkeel.fitting.bits.quantize_to_budget import quantize_to_budget as quantize_to_budget
    from evenkeel.fitting.quantize import quantize as quantize
    from evenkeel.fitting.training.train_adapters import train_adapters as train_adapters
    from evenkeel.hosts.pipeline.prompts import Prompts as Prompts
    from evenkeel.hosts.scheduler.probing import probe_scheduler as probe_scheduler
    from evenkeel.planning.plan import plan as plan
    from evenkeel.quantizers import QuantizerSpec as QuantizerSpec
    from evenkeel.quantizers import quantize_module as quantize_module
    from evenkeel.record import Record as Record
    from evenkeel.record import load as load
    from evenkeel.record import save as save

__version__ = "0.2.0"

_HOME = {
    "Arm": "comparing.generation",
    "Estimate": "estimate",
    "ExactDrift": "corrections",
    "Identity": "corrections",
    "Prompts": "hosts.pipeline.prompts",
    "QDrift": "corrections",
    "QuantizerSpec": "quantizers",
    "Readout": "corrections",
    "Record": "record",
    "RecoveryAdapters": "corrections",
    "applied": "applying",
    "apply": "applying",
    "calibrate": "fitting",
    "compare": "comparing.comparison",
    "fit_adapters": "fitting",
    "fit_readout": "fitting",
    "fit_stepbaq": "fitting",
    "fit_tac": "fitting",
    "load": "record",
    "marginal_check": "comparing.marginal_check",
    "plan": "planning.plan",
    "probe_scheduler": "hosts.scheduler.probing",
    "quantize": "fitting.quantize",
    "quantize_module": "quantizers",
    "quantize_to_budget": "fitting.bits.quantize_to_budget",
    "refit_branches": "fitting",
    "remove": "applying",
    "save": "record",
    "summary": "applying",
    "train_adapters": "fitting.training.train_adapters",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'evenkeel' has no attribute {name!r}")
    return getattr(importlib.import_module(f"evenkeel.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


# ---- what diffusers finds of this library

_AUTO = "diffusers.quantizers.auto"  # where diffusers keeps its quantization methods


class _OnFirstUse:
    """A class of ``quantizers.saved.diffusers_format``, imported when diffusers needs it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._found(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._found, name)

    @property
    def _found(self) -> Any:
        home = importlib.import_module("evenkeel.quantizers.saved.diffusers_format")
        return getattr(home, self._name)


def _announce(auto: Any) -> None:
    """Let diffusers load what it saved of a network that this library quantized."""
    auto.AUTO_QUANTIZER_MAPPING.setdefault("evenkeel", _OnFirstUse("EvenkeelQuantizer"))
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault("evenkeel", _OnFirstUse("EvenkeelConfig"))


class _WhenDiffusersComes(MetaPathFinder):
    """Waits for the import of diffusers' list, once, and finds nothing itself."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            run = loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                _announce(module)

            loader.exec_module = exec_module
        return spec


if _AUTO in sys.modules:
    _announce(sys.modules[_AUTO])
else:
    sys.meta_path.insert(0, _WhenDiffusersComes())
