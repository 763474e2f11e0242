"""Where a UNet joins a skip connection to its hidden state, and two scales for such a layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from evenkeel.quantizers.numbers.grids import Grid
from evenkeel.quantizers.numbers.scales import Scales, fit, last


def skip_concatenations(net: nn.Module) -> dict[str, int]:
    """Convolutions that read a hidden state and a skip connection side by side, and where they meet.

    In a diffusers UNet every residual block on the way up reads torch.cat([hidden, skip], dim=1). The
    hidden state has the channels that the residual block called before it puts out; what its first
    convolution reads beyond that is the skip.

    Args:
        net: a denoiser; without ``up_blocks`` of ``resnets`` there is nothing to find.

    Returns:
        By layer name, the number of channels of the hidden state, which come first.

    """
    channels, found = 0, dict[str, int]()
    for name, first, second in _resnets(net):
        if name.startswith("up_blocks.") and 0 < channels < first.in_channels:
            layers = (f"{name}.conv1", f"{name}.conv_shortcut")
            found |= {n: channels for n, _ in net.named_modules() if n in layers}
        channels = second.out_channels
    return found


def split_scales(weight: Tensor, grid: Grid, split: int) -> tuple[Grid, Scales]:
    """Two scales per output channel, for input channels before and from ``split`` on.

    Files know grids of equal groups only: this is the grid whose group divides both ranges, with equal
    scales in all groups of a range.

    Args:
        weight: (out, in, height, width) or (out, in).
        grid: how the scales of either range are found; one group.
        split: first input channel of the second range.

    Returns:
        A grid by groups, and scales of ``last(weight, grid)``.

    >>> from evenkeel.quantizers.numbers.formats import Integer
    >>> grid, scales = split_scales(torch.tensor([[3.0, -3, 9, 9, 9, 9]]), Grid(Integer(3)), 2)
    >>> grid.group, scales.scale
    (2, tensor([[1., 3., 3.]]))

    """
    width = weight.shape[1]
    grouped = Grid(grid.format, math.gcd(split, width - split), zero_point=grid.zero_point)
    *rows, _ = last(weight, grouped).shape
    parts = [fit(last(part, grid), grid) for part in (weight[:, :split], weight[:, split:])]
    counts = torch.tensor([split, width - split], device=weight.device) // cast(int, grouped.group)

    def spread(found: list[Tensor]) -> Tensor:
        """(out, 1) twice, to (out, ..., groups)."""
        own = torch.cat(found, -1).repeat_interleave(counts, -1)
        return own.reshape(len(own), *[1] * (len(rows) - 1), -1).expand(*rows, -1).contiguous()

    zeros = [p.zero for p in parts if p.zero is not None]
    return grouped, Scales(spread([p.scale for p in parts]), spread(zeros) if zeros else None)


def _resnets(net: nn.Module) -> Iterator[tuple[str, nn.Conv2d, nn.Conv2d]]:
    """Both convolutions of the residual blocks of a UNet, in the order they are called in."""
    stages = [f"down_blocks.{i}" for i in range(len(getattr(net, "down_blocks", ())))]
    stages += ["mid_block"] if isinstance(getattr(net, "mid_block", None), nn.Module) else []
    stages += [f"up_blocks.{i}" for i in range(len(getattr(net, "up_blocks", ())))]
    for stage in stages:
        for index, resnet in enumerate(getattr(net.get_submodule(stage), "resnets", ())):
            first, second = (getattr(resnet, n, None) for n in ("conv1", "conv2"))
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d):
                yield f"{stage}.resnets.{index}", first, second
