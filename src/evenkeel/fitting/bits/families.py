"""What can be chosen for a layer: by this library's own quantizer, and what every backend's file does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from evenkeel.errors import QuantizationError
from evenkeel.fitting.adapters import effective_weight as asked
from evenkeel.quantizers.layers.patterns import first_match
from evenkeel.quantizers.methods.per_layer import PerLayer
from evenkeel.quantizers.methods.round_to_nearest import RoundToNearest
from evenkeel.quantizers.saved.report import effective_weight, stored_bytes

BITS = (2, 3, 4, 5, 6, 7, 8)
GROUPS = (16, 32, 64, 128)


class Family(ABC):
    """The choices that one quantizer or backend has for a layer, each said in one word.

    Attributes:
        name: as ``--layout`` takes it.
        file: of the configuration that says what every layer gets; empty where none is written.
        base: which layers stay in full precision, and for our own layers all that is not chosen.

    """

    name: ClassVar[str]
    file: ClassVar[str] = ""

    def __init__(self, base: RoundToNearest) -> None:
        self.base = base

    def layers(self, denoiser: nn.Module) -> dict[str, nn.Module]:
        """Those that get bits, by name.

        Raises:
            QuantizationError: there is none.

        """
        found = {
            name: layer
            for name, layer in denoiser.named_modules()
            if self.choices(layer)
            and first_match(name, self.base.skip) is None
            and (not self.base.only or first_match(name, self.base.only))
        }
        if not found:
            raise QuantizationError(
                f"no layer of {type(denoiser).__name__} can be quantized for {self.name}: expected linear "
                "layers (or convolutions) that match `only` and no `skip` pattern."
            )
        return found

    @abstractmethod
    def choices(self, layer: nn.Module) -> list[str]:
        """What this layer may get; empty where it cannot be quantized."""

    @abstractmethod
    def build(self, name: str, layer: nn.Module, choice: str) -> Any:
        """The quantized layer; the other is not changed."""

    def weight(self, built: Any, dtype: torch.dtype) -> Tensor:
        """(O, F) what a built layer computes with."""
        return asked.effective_weight(built, dtype)

    @abstractmethod
    def bytes_of(self, built: Any, choice: str) -> int:
        """Of the layer's weight as it is stored, without the bias."""

    def bits_of(self, choice: str) -> int:
        """Of a weight's code: the first number in the word."""
        return int("".join(c for c in choice.split("-")[0].split("_")[0] if c.isdigit()))

    def written(self, denoiser: nn.Module, choices: Mapping[str, str]) -> str:
        """Content of ``file``."""
        raise NotImplementedError


class Own(Family):
    """``w3-g32``, ``w4-g64-r8``: integers in groups, with a 16-bit branch where ``base`` has a rank.

    Ranks up to that of ``base`` are tried, in powers of two from 4. Where inputs are rounded in groups,
    weights keep their size.

    Attributes:
        hessians: second moments of inputs for GPTQ; before they are known, weights go to the nearest.

    """

    name = "evenkeel"

    def __init__(self, base: RoundToNearest) -> None:
        super().__init__(base)
        self.hessians: dict[str, Tensor] = {}
        PerLayer(base, {})  # refuses what it refuses

    def choices(self, layer: nn.Module) -> list[str]:
        if type(layer) not in (nn.Linear, nn.Conv2d):
            return []
        base = self.base
        tied = base.activation_bits != 16 and base.activation == "group"
        groups = (base.group,) if tied else GROUPS
        return [
            f"w{bits}-g{group or 'none'}{f'-r{rank}' if rank else ''}"
            for bits in BITS
            for group in groups
            for rank in self._ranks(layer)
        ]

    def _ranks(self, layer: nn.Module) -> list[int]:
        limit = self.base.rank
        if isinstance(layer, nn.Linear):
            limit = min(limit, min(layer.weight.shape) - 1)
        powers = [2**k for k in range(2, 10) if 2**k <= limit]
        return [0, *sorted({*powers, *([self.base.rank] if limit == self.base.rank > 0 else [])})]

    def build(self, name: str, layer: nn.Module, choice: str) -> Any:
        return PerLayer(self.base, {name: choice}, self.hessians).layer(name, layer)

    def weight(self, built: Any, dtype: torch.dtype) -> Tensor:
        return effective_weight(built).flatten(1)

    def bytes_of(self, built: Any, choice: str) -> int:
        return stored_bytes(built) - (0 if built.bias is None else 2 * built.bias.numel())
