"""What the layers of a denoiser do to its answer when they are quantized, one or many at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.layers.blocks import Unit
from evenkeel.quantizers.layers.patterns import first_match
from evenkeel.quantizers.layers.quantized_layers import QuantizedLayer
from evenkeel.quantizers.rounding.bit_allocation import (
    Damage,
    allocate_decoupled,
    noise_share,
    structural_loss,
)
from evenkeel.quantizers.workspace.workspace import Workspace

#: Makes a layer again with so many bits per weight; with None of them, only its input is rounded.
Maker = Callable[[str, int | None], QuantizedLayer]
Metric = Callable[[Tensor, Tensor], float]

#: Layers that decide what is in a picture, not how well it is drawn: cross-attention and
#: feed-forward ("attn2" and "ff" in MixDQ's released code), under the names of all families.
CONTENT: tuple[str, ...] = (
    "*attn2",
    "*cross_attn",
    "*add_[qkv]_proj",
    "*to_add_out",
    "*.ff",
    "*.ff_context",
    "*.ffn",
    "*proj_mlp",
)
#: Mean bits of content layers over those of the others that MixDQ tries.
RATIOS: tuple[float, ...] = (0.46, 0.56, 0.66, 0.76, 0.86, 0.96, 1.06, 1.16, 1.26, 1.36)


class Trial:
    """The denoiser's answers to some calibration calls, and how far other layers move them.

    Layers stand in for the original's while a call is made; the original is not changed.

    Args:
        workspace: whose original, on whose calls.
        count: calibration calls to use, evenly spaced over all of them (which is over steps and
            prompts); the cost of everything here is proportional to it.

    """

    def __init__(self, workspace: Workspace, count: int) -> None:
        everything = workspace.calls.calls
        places = torch.linspace(0, len(everything) - 1, min(count, len(everything))).round().long()
        self._net = workspace.original
        self._calls = [everything[place] for place in places.tolist()]
        self._references = [prediction(call.make(self._net), self._net) for call in self._calls]

    def damage(
        self, names: Collection[str], make: Callable[[str], QuantizedLayer], metric: Metric
    ) -> float:
        """The metric between answers with these layers replaced and without, mean over the calls.

        ``make`` is asked anew at every call, so that one stand-in at a time takes memory.
        """

        def stand_in(name: str) -> Callable[..., Any]:
            return lambda _, given, named, __: make(name)(*given, **named)

        layers = {name: self._net.get_submodule(name) for name in names}
        hooks = [
            layer.register_forward_hook(stand_in(name), with_kwargs=True)
            for name, layer in layers.items()
        ]
        try:
            found = [
                metric(prediction(call.make(self._net), self._net), reference)
                for call, reference in zip(self._calls, self._references, strict=True)
            ]
        finally:
            for hook in hooks:
                hook.remove()
        return sum(found) / len(found)


def prediction(answer: Any, net: nn.Module) -> Tensor:
    """What a denoiser predicts, without the learned variance that some give as further channels.

    >>> prediction((torch.zeros(1, 4, 2, 2),), nn.Identity()).shape
    torch.Size([1, 4, 2, 2])
    """
    found = answer[0] if isinstance(answer, tuple | list) else getattr(answer, "sample", answer)
    if not isinstance(found, Tensor):
        raise QuantizationError(
            f"{type(net).__name__} answers with {type(found).__name__}; expected a tensor, a tuple "
            "that begins with one, or an object with one as its 'sample'."
        )
    channels = getattr(getattr(net, "config", None), "in_channels", None)
    twice = found.ndim > 3 and channels is not None and found.shape[1] == 2 * channels
    return found[:, :channels] if twice else found


def layer_damage(
    workspace: Workspace,
    units: Sequence[Unit],
    trial: Trial,
    make: Maker,
    choices: Callable[[str], Sequence[int | None]],
    content: tuple[str, ...] = CONTENT,
) -> dict[str, dict[int | None, float]]:
    """How much each layer alone damages the denoiser's answer, for each choice of its bits.

    Metric-decoupled (MixDQ, arXiv:2405.17873): layers that decide about content are measured by
    :func:`structural_loss`, all others by :func:`noise_share`. MixDQ measures content on images;
    this works on what the denoiser predicts, so no image has to be decoded and every step of the
    calibration calls counts. Blocks that are done are kept in the workspace's folder.

    Args:
        workspace: its original is measured.
        units: whose layers.
        trial: on which calls.
        make: the layer with so many bits.
        choices: bits to try, by layer.
        content: patterns of layers that decide about content.

    Returns:
        By layer and choice.

    """

    def measured(unit: Unit) -> list[list[float]]:
        rows = []
        for name in unit.layers:
            metric = structural_loss if first_match(name, content) else noise_share
            row = []
            for bits in choices(name):
                layer = make(name, bits)
                row.append(trial.damage([name], lambda _, layer=layer: layer, metric))  # type: ignore[misc]
            rows.append(row)
        return rows

    found: dict[str, dict[int | None, float]] = {}
    for done, unit in enumerate(units, start=1):
        rows = workspace.stage(f"sensitivity-{unit.name}", lambda unit=unit: measured(unit))  # type: ignore[misc]
        for name, row in zip(unit.layers, rows, strict=True):
            found[name] = dict(zip(choices(name), row, strict=True))
        workspace.progress(done, len(units), f"sensitivity of {unit.name}")
    return found


def searched_bits(
    workspace: Workspace,
    damage: Damage,
    mean_bits: float,
    trial: Trial,
    make: Maker,
    ratios: Sequence[float] = RATIOS,
    content: tuple[str, ...] = CONTENT,
) -> dict[str, int]:
    """Bits of every layer: the best of the optimal allocations for several splits of the budget.

    How many bits content is worth, in terms of quality, no sensitivity tells. MixDQ makes images
    with each split and picks one; here it is the split whose denoiser, all layers quantized, has
    the least :func:`noise_share`. The same bits for all layers is tried too, where it can be.

    Args:
        workspace: whose layers.
        damage: by layer and bits.
        mean_bits: per weight.
        trial: on which calls.
        make: the layer with so many bits.
        ratios: mean bits of content layers over those of the others, to try.
        content: patterns of layers that decide about content.

    Raises:
        QuantizationError: nothing fits the budget.

    """
    sizes = {name: workspace.layers[name].get_parameter("weight").numel() for name in damage}
    first = {name: row for name, row in damage.items() if first_match(name, content)}
    second = {name: row for name, row in damage.items() if name not in first}

    plain = all(mean_bits in row for row in damage.values())

    def searched() -> dict[str, int]:
        found = [dict.fromkeys(damage, int(mean_bits))] if plain else []
        for ratio in ratios:
            bits = allocate_decoupled(first, second, sizes, mean_bits, ratio)
            if bits not in found:
                found.append(bits)
        if len(found) == 1:
            return found[0]

        def whole(bits: dict[str, int]) -> float:
            return trial.damage(list(bits), lambda name: make(name, bits[name]), noise_share)

        return min(found, key=whole)

    stored: dict[str, int] = workspace.stage("allocation", searched)
    return stored
