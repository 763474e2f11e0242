"""Tell a denoiser another noise level than its pipeline does: exchange its time, scale its latents."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.corrections.plan import SamplerPlan
from evenkeel.errors import UnsupportedPipeline, UnsupportedSampler

SAMPLE_NAMES, TIME_NAMES = ("hidden_states", "sample"), ("timestep",)
_SAME_UNIT = 0.02  # bfloat16 rounds a time by up to 0.4 %


class LevelTeller:
    """A forward pre-hook that exchanges the time, and scales the latents, of the denoiser's calls.

    Pipelines pass the scheduler's timestep in a unit of their own (FLUX: a thousandth). The unit is
    read off the first call of a run, and later ones must keep to it.

    Attributes:
        own, told, scale: timestep of the coming step (None: not known yet), what the denoiser is told
            instead, and the factor on its latents; no change where told is own and scale is 1.
        shape: of one image's latents as the scheduler has them, or None while that is unknown.

    """

    def __init__(self) -> None:
        self.shape: tuple[int, ...] | None = None
        self.own: float | None = None
        self.told, self.scale = 0.0, 1.0
        self._first: float | None = None
        self._unit: float | None = None

    def put(self, own: float, told: float, scale: float) -> None:
        """What the coming step is called with."""
        self.own, self.told, self.scale = own, told, scale

    def started_at(self, own: float) -> None:
        """The timestep that the first call was made at, if it was not known then."""
        if self._unit is None and self._first is not None and own:
            self._unit = self._first / own

    def put_step(self, plan: SamplerPlan, k: int) -> None:
        """Step k as ``plan`` has it."""
        own, relabel = float(plan.law.timesteps[k]), plan.relabel
        if relabel is None or not bool(relabel.active[k]):
            self.put(own, own, 1.0)
        else:
            self.put(own, float(relabel.timestep[k]), float(relabel.scale[k]))

    def __call__(
        self, denoiser: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The changed arguments, or None where nothing changes."""
        changes = self.own is not None and (self.told != self.own or self.scale != 1)
        if not changes and self._first is not None:
            return None
        time = argument_of(denoiser, arguments, keywords, TIME_NAMES)
        largest = float(time.max() if isinstance(time, Tensor) else time)
        if self._first is None:
            self._first = largest
        if self.own is not None:
            self._check_unit(denoiser, largest, self.own)
        if not changes:
            return None
        sample = argument_of(denoiser, arguments, keywords, SAMPLE_NAMES)
        self._check_shape(denoiser, sample)
        new: dict[tuple[str, ...], Any] = {SAMPLE_NAMES: sample * self.scale}
        if self.told != self.own:
            new[TIME_NAMES] = self._retold(time)
        for names, value in new.items():
            arguments, keywords = _replaced(denoiser, arguments, keywords, names, value)
        return arguments, keywords

    def _check_unit(self, denoiser: nn.Module, largest: float, own: float) -> None:
        unit = largest / own if own else 1.0
        if self._unit is None:
            self._unit = unit
        if abs(unit - self._unit) > _SAME_UNIT * abs(self._unit) or (not own and largest):
            raise UnsupportedPipeline(
                f"{type(denoiser).__name__} is called with time {largest:.6g} at the scheduler's timestep "
                f"{own:.6g}, which is not {self._unit:.6g} times it as in the first call of this "
                f"run: another noise level cannot be told in a unit that is not known."
            )

    def _check_shape(self, denoiser: nn.Module, sample: Any) -> None:
        if isinstance(sample, Tensor) and self.shape in (None, tuple(sample.shape[1:])):
            return
        found = tuple(sample.shape) if isinstance(sample, Tensor) else type(sample).__name__
        raise UnsupportedPipeline(
            f"{type(denoiser).__name__} is called with {found} where the scheduler steps from latents of "
            f"shape {self.shape} per image: something is joined to them (inpainting, a reference "
            f"image), or they are packed anew. Another noise level cannot be told here."
        )

    def _retold(self, time: Any) -> Any:
        """In the unit, type, shape and on the device of ``time``."""
        if not isinstance(time, Tensor):
            return type(time)(self._whole(time, self.told * (self._unit or 1.0)))
        told = self.told * (self._unit or 1.0)
        if not time.is_floating_point():
            return torch.full_like(time, int(self._whole(time, told)))
        # A ratio, so that tokens whose time is 0 (a given first frame) keep it.
        wide = time if time.element_size() >= 4 else time.float()
        new = wide * (self.told / self.own) if self.own else torch.full_like(wide, told)
        return new.to(time.dtype)

    def _whole(self, time: Any, told: float) -> float:
        """``told``, refused where ``time`` holds whole numbers and it is none."""
        fractional = time.is_floating_point() if isinstance(time, Tensor) else type(time) is float
        if fractional:
            return told
        if abs(told - round(told)) > 1e-3:
            raise UnsupportedSampler(
                f"this pipeline passes whole timesteps to its denoiser, which cannot be told {told:.6g}; "
                f"round the noise level to the training timesteps (round_to_training='nearest')."
            )
        return round(told)


def argument_of(
    denoiser: nn.Module, arguments: Any, keywords: dict[str, Any], names: tuple[str, ...]
) -> Any:
    """The argument of a denoiser call that has one of ``names``, however it was passed.

    Raises:
        UnsupportedPipeline: the denoiser takes none of them, or was called without.

    """
    name, place = _parameter(denoiser, names)
    if name in keywords:
        return keywords[name]
    if place < len(arguments):
        return arguments[place]
    raise UnsupportedPipeline(
        f"{type(denoiser).__name__} was called without {name}; what it is told cannot be changed."
    )


def _replaced(
    denoiser: nn.Module, arguments: Any, keywords: dict[str, Any], names: tuple[str, ...], new: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    name, place = _parameter(denoiser, names)
    if name in keywords:
        return tuple(arguments), {**keywords, name: new}
    return (*arguments[:place], new, *arguments[place + 1 :]), keywords


def _parameter(denoiser: nn.Module, names: tuple[str, ...]) -> tuple[str, int]:
    """Name and position; of the class, because offloading replaces the instance's own ``forward``."""
    plain = getattr(denoiser, "_orig_mod", denoiser)
    taken: list[str] = []
    for kind in type(plain).__mro__:  # a subclass that passes on whatever it gets says nothing
        if "forward" in vars(kind):
            found = list(inspect.signature(vars(kind)["forward"]).parameters)[1:]
            taken = taken or found
            name = next((n for n in found if n in names), None)
            if name is not None:
                return name, found.index(name)
    raise UnsupportedPipeline(
        f"expected a denoiser whose forward takes one of {names}; {type(plain).__name__} takes "
        f"{taken}. What it is told cannot be changed."
    )
