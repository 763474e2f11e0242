"""What every layer got, what was predicted of it, and what held-out pairs say."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from evenkeel.storage import Kind

FILE = "bits.json"
KIND = Kind("bits", 1, "quantize to the budget again", keys=("report",))


@dataclass(frozen=True)
class LayerBits:
    """One layer of the mix.

    Attributes:
        name: of the layer.
        choice: of the mix, in the family's word.
        bytes: of its weight.
        error: predicted, in the unit that all layers share.
        uniform_error: the same with the uniform choice.

    """

    name: str
    choice: str
    bytes: int
    error: float
    uniform_error: float


@dataclass(frozen=True)
class Mix:
    """One way to share out the bytes that was tried.

    Attributes:
        name: ``all choices``, or ``within one bit of the uniform``.
        bytes: of all weights.
        predicted: error of the final sample over that of the uniform quantization.
        gain: dB by which the final samples' squared error falls against it, mean over the choosing pairs;
            None where there was nothing to choose between.

    """

    name: str
    bytes: int
    predicted: float
    gain: float | None = None


@dataclass(frozen=True)
class BitsReport:
    """What was tried, chosen and confirmed.

    Attributes:
        family: whose choices.
        bits: asked for, per weight, scales and branches counted.
        budget: the same in bytes.
        weights: in all layers that get bits.
        uniform, uniform_bytes: the rival of at most as many bytes, of the least predicted error.
        mixes: in the order in which they were tried.
        chosen: index of the one that was compared.
        layers: of that one.
        gain: dB on the confirming pairs, mean, against the uniform one.
        bound: one-sided 95 % lower bound of it.
        confirmed: whether the bound is above zero.
        guarded: whether the uniform one is returned where the mix is not confirmed.

    """

    family: str
    bits: float
    budget: int
    weights: int
    uniform: str
    uniform_bytes: int
    mixes: tuple[Mix, ...]
    chosen: int
    layers: tuple[LayerBits, ...]
    gain: float
    bound: float
    confirmed: bool
    guarded: bool = True

    @property
    def mixed(self) -> bool:
        """Whether the mix was returned, and not the uniform quantization."""
        return self.confirmed or not self.guarded

    @property
    def choices(self) -> dict[str, str]:
        """Layer -> what it has in the denoiser that was returned."""
        return {x.name: x.choice if self.mixed else self.uniform for x in self.layers}

    def as_dict(self) -> dict[str, Any]:
        """All of it in types that JSON knows."""
        return asdict(self)

    def text(self) -> str:
        """One sentence, and a line per mix."""
        mix = self.mixes[self.chosen]
        mean = 8 * mix.bytes / self.weights
        against = f"{self.uniform} everywhere ({8 * self.uniform_bytes / self.weights:.3f} bits)"
        measured = f"{self.gain:+.2f} dB on held-out pairs (95 % bound {self.bound:+.2f})"
        said = f"bits shared out ({mean:.3f} per weight) are worth {measured} against {against}"
        if not self.mixed:
            said = (
                f"{against} is kept: sharing out as many bytes changes the final samples by {measured}, "
                "which is not better beyond chance"
            )
        lines = [
            f"  {m.name:30s} {m.bytes / 1e6:.3f} MB  predicted error x {m.predicted:.3f}"
            f"{'' if m.gain is None else f'  {m.gain:+.2f} dB'}{'  <- chosen' * (i == self.chosen)}"
            for i, m in enumerate(self.mixes)
        ]
        return "\n".join([said, *lines])

    def table(self) -> str:
        """A line per layer: choice, bytes, and predicted error against the uniform choice."""
        width = max(len(x.name) for x in self.layers)
        total = sum(x.uniform_error for x in self.layers) or 1.0
        lines = [f"{'layer':<{width}}  choice        bytes  share of error, uniform -> mix"]
        lines += [
            f"{x.name:<{width}}  {x.choice:<10} {x.bytes:>8}  "
            f"{x.uniform_error / total:7.2%} -> {x.error / total:7.2%}"
            for x in self.layers
        ]
        return "\n".join(lines)
