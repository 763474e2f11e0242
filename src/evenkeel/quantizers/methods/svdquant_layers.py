"""Which layers SVDQuant leaves out, which belong together, and what is known of their inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.quantizers.layers.input_quantizers import DynamicInput
from evenkeel.quantizers.layers.patterns import DEFAULT_SKIP, first_match
from evenkeel.quantizers.layers.quantized_layers import (
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
    copied,
)
from evenkeel.quantizers.numbers.formats import wide
from evenkeel.quantizers.numbers.grids import Grid
from evenkeel.quantizers.numbers.scales import Scales, snap_weight
from evenkeel.quantizers.rounding.low_rank_refinement import Branch
from evenkeel.quantizers.workspace.workspace import Workspace

Patterns = tuple[str, ...]

# What the released configurations do not round. Their name for a group of layers is on the right.
_PROJECTIONS = ("*.attentions.*.proj_in", "*.attentions.*.proj_out")  # transformer_proj_in, _out
_TEXT = ("*.attn2.to_k", "*.attn2.to_v")  # attn_add
SKIP: dict[str, Patterns] = {
    "UNet2DConditionModel": (*DEFAULT_SKIP, *_PROJECTIONS),
    "PixArtTransformer2DModel": (*DEFAULT_SKIP, *_TEXT),
    # Its depthwise filters are few weights, with no channels to group.
    "SanaTransformer2DModel": (*DEFAULT_SKIP, *_TEXT, "*.conv_depth"),
    # A quarter of FLUX is in its adaptive norms: their weights are rounded, their inputs are not.
    "FluxTransformer2DModel": tuple(p for p in DEFAULT_SKIP if p != "*.norm*"),
}
# The released code splits these in two at a concatenation, and this does not.
_WHOLE = {"FluxTransformer2DModel": ("single_transformer_blocks.*.proj_out",)}
NORMS = ("*.norm*", "*modulation*")  # transformer_norm, transformer_add_norm
NO_BRANCH = ("*.resnets", *NORMS)  # resblock; the other groups of that list are not rounded at all

# At least the magnitude of each minimum: -0.1700 (GELU; its sigmoid approximation -0.1636), -0.2785
# (SiLU), -0.3088 (Mish). Released: 0.2734375 for SiLU, which clips a sliver.
_LOWEST = {"GELU": 0.171875, "ApproximateGELU": 0.171875, "SiLU": 0.279296875, "Mish": 0.31640625}


def shifts_of(denoiser: nn.Module) -> dict[str, float]:
    """How far below zero the inputs of some layers can reach, by name of the layer.

    Those behind an activation function with a minimum: the second layer of a diffusers
    ``FeedForward`` without a gate, and both convolutions of a ``ResnetBlock2D``. A gate multiplies
    by something that knows no bound. Classes are told by their names, for want of an import.

    >>> class FeedForward(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.net = nn.ModuleList([nn.GELU(), nn.Dropout(0.0), nn.Linear(2, 2)])
    >>> shifts_of(nn.ModuleDict({"ff": FeedForward()}))
    {'ff.net.2': 0.171875}

    """
    found: dict[str, float] = {}
    for path, part in denoiser.named_modules():
        kind = type(part).__name__
        function: nn.Module | None = None
        behind: tuple[str, ...] = ()
        if kind == "FeedForward":
            first = part.get_submodule("net.0")
            gated = "glu" in type(first).__name__.lower()
            # diffusers' GELU holds its projection, its LinearActivation holds a function as well.
            function = None if gated else getattr(first, "activation", first)
            behind = ("net.2",)
        elif kind == "ResnetBlock2D":
            function, behind = part.get_submodule("nonlinearity"), ("conv1", "conv2")
        lowest = _LOWEST.get(type(function).__name__)
        if lowest is not None:
            found |= {f"{path}.{name}".removeprefix("."): lowest for name in behind}
    return found


@dataclass
class Part:
    """One layer on its way: what it is, what enters it, and what was found for it so far.

    ``shift``: how far below zero its inputs reach at most. ``helped``: gets smoothing and a branch.
    """

    name: str
    layer: nn.Module
    grid: Grid
    shift: float = 0.0
    rounds_input: bool = True
    helped: bool = False
    x: Tensor | None = None
    factors: Tensor | None = None
    branch: Branch | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        """Of the model."""
        return self.layer.get_parameter("weight").dtype

    @property
    def spatial(self) -> bool:
        """A convolution that is more than the same matrix at every pixel."""
        layer = self.layer
        return isinstance(layer, nn.Conv2d) and (layer.groups > 1 or layer.kernel_size != (1, 1))

    @property
    def inputs(self) -> Tensor:
        """(tokens, in), float32 or wider."""
        assert self.x is not None
        return self.x

    @property
    def weight(self) -> Tensor:
        """(out, in), float32 or wider."""
        return wide(self.layer.get_parameter("weight").detach().flatten(1))

    @property
    def smoothed(self) -> Tensor:
        """(out, in), the weight times the factors."""
        return self.weight if self.factors is None else self.weight * self.factors

    @property
    def seen(self) -> bool:
        """True where its inputs are known."""
        return self.x is not None


class Joined:
    """Layers that read one input and share a branch: one matrix, one below the other.

    ``rank`` is 0 where a branch would carry all of it, or the layer is a convolution, which has
    none.
    """

    def __init__(self, parts: Sequence[Part], rank: int) -> None:
        self.parts = tuple(parts)
        self.weight = torch.cat([part.weight for part in parts])
        linear = all(isinstance(part.layer, nn.Linear) for part in parts)
        self.rank = rank if linear and rank < min(self.weight.shape) else 0
        if rank and not self.rank:
            why = f"rank {rank} would carry all of it" if linear else "convolution"
            for part in parts:
                part.notes.append(f"no branch: {why}")

    @property
    def smoothed(self) -> Tensor:
        """The weight times the factors that all of them share."""
        factors = self.parts[0].factors
        return self.weight if factors is None else self.weight * factors

    def split(self, tall: Tensor) -> tuple[Tensor, ...]:
        """The rows of every layer."""
        return torch.split(tall, [len(part.weight) for part in self.parts])

    def rounded(self, residual: Tensor) -> Tensor:
        """(out, in), every layer on its own grid."""
        pieces = zip(self.parts, self.split(residual), strict=True)
        return torch.cat([snap_weight(piece, p.grid, f"{p.name}.weight")[0] for p, piece in pieces])


def joined_by_module(readers: Sequence[Part], rank: int, shared: bool) -> list[Joined]:
    """Layers with one input, those of one module together (query, key and value)."""
    homes: dict[str, list[Part]] = {}
    for part in readers:
        home = part.name.rpartition(".")[0] if shared else part.name
        homes.setdefault(home, []).append(part)
    return [Joined(parts, rank) for parts in homes.values()]


def assembled(
    part: Part, values: Tensor, scales: Scales, activation: DynamicInput | None
) -> QuantizedLayer:
    """The layer of a finished part, given its rounded residual."""
    dtype, bias = part.dtype, copied(part.layer._parameters["bias"])
    rest: dict[str, Any] = {
        "activation": activation,
        "smoothing": None if part.factors is None else part.factors.to(dtype),
        "stored": (part.grid, scales),
    }
    values = values.to(dtype, copy=True)
    if isinstance(part.layer, nn.Conv2d):
        return QuantizedConv2d(part.layer, values, bias, **rest)
    down, up = (None, None) if part.branch is None else (part.branch.down, part.branch.up)
    return QuantizedLinear(values, bias, down, up, **rest)


def note_whole(parts: Sequence[Part], kind: str) -> None:
    """Say of layers that the released code splits in two that they are not."""
    for part in parts:
        if first_match(part.name, _WHOLE.get(kind, ())) is not None:
            part.notes.append("released code splits it in two and shifts the second half")


def with_inputs(parts: Sequence[Part], workspace: Workspace, rows: int) -> list[Part]:
    """Those that are helped, now with at most ``rows`` tokens of what enters them."""
    helped = [part for part in parts if part.helped]
    found = workspace.layer_inputs([part.name for part in helped], rows) if helped else {}
    for part in helped:
        part.x = tokens(found[part.name], rows)
    return helped


def by_input(parts: Sequence[Part]) -> list[list[Part]]:
    """Layers that read the same numbers, together; their copies of them become one."""
    found: list[list[Part]] = []
    for part in parts:
        for others in found:
            same = others[0].shift == part.shift and others[0].rounds_input == part.rounds_input
            if same and torch.equal(others[0].inputs, part.inputs):
                part.x = others[0].x
                others.append(part)
                break
        else:
            found.append([part])
    return found


def tokens(x: Tensor, rows: int) -> Tensor:
    """At most ``rows`` of (rows, in), or of the pixels of (images, in, height, width), evenly.

    >>> tokens(torch.arange(8.0).reshape(1, 2, 2, 2), 2)
    tensor([[0., 4.],
            [3., 7.]])
    """
    x = x.movedim(1, -1).flatten(0, -2) if x.ndim == 4 else x
    return wide(x[torch.linspace(0, len(x) - 1, min(rows, len(x)), device=x.device).long()])


def remainder(weight: Tensor, branch: Branch | None) -> Tensor:
    """(out, in), what the branch does not carry."""
    return weight if branch is None else weight - branch.product(weight.dtype)
