"""One quantized layer under refit: what passed through it, and which branch, scales and bias suit it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from evenkeel.errors import CalibrationError
from evenkeel.fitting.lockstep.joined import equations_of_all
from evenkeel.hosts.processes import Processes
from evenkeel.quantizers.layers.quantized_layers import Quantized, QuantizedLinear
from evenkeel.statistics.exact import Pending, add_pairs, settled, sum_pair
from evenkeel.statistics.group_scales import Scales, every_group_scales
from evenkeel.statistics.normal_equations import NormalEquations, Solution
from evenkeel.statistics.reduced_rank import (
    HeldOut,
    LowRank,
    cross_validated,
    held_out,
    reduced_rank,
)

TOKENS = 256  # of an image and call that a linear layer is fitted on
BIAS_ALONE = float("inf")  # scales stay what they are, bit for bit


@dataclass(frozen=True, slots=True)
class LayerRefit:
    """One quantized layer: refitted, or kept for a ``reason``.

    ``before`` and ``after`` are the energy of the layer's error, of the present and of the refitted
    layer, on prompts the fit has not seen, relative to the energy of the layer's output; None when
    nothing was measured. ``penalty`` is None where a bias alone was fitted. ``what`` names what was
    fitted beside the bias: ``branch``, ``scales``, or "".
    """

    name: str
    rank: int
    before: float | None = None
    after: float | None = None
    penalty: float | None = None
    reason: str = ""
    what: str = ""

    @property
    def changed(self) -> bool:
        """False when the layer keeps what it has."""
        return not self.reason


@dataclass
class Site:
    """A quantized layer, its full-precision original, and the sums of what passed through it.

    ``group`` is how many inputs share a weight scale, where the scales may change: layers without a
    branch whose quantizer is known.
    """

    name: str
    layer: Quantized
    reference: nn.Module
    folds: list[NormalEquations] = field(default_factory=list)
    energy: float = 0.0  # of the layer's output, once settled
    squares: Tensor | None = None  # its sum so far, where the output is
    calls: int = 0
    prompts: tuple[int, int] = field(default=(0, 1))  # the batch: index of its first, how many
    group: int | None = None
    in_turn: bool = False  # whether calls, not prompts, decided about folds

    @property
    def branch(self) -> tuple[Tensor, Tensor] | None:
        """Down and up, if there are any."""
        down, up = getattr(self.layer, "down", None), getattr(self.layer, "up", None)
        return None if down is None or up is None or not len(down) else (down, up)

    @property
    def what(self) -> str:
        """What is refitted beside the bias."""
        if self.branch is not None:
            return "branch"
        return "" if self.group is None else "scales"

    @property
    def _shape(self) -> tuple[int, int]:
        """Features and targets; for a bias alone one feature that never varies."""
        weight = self.layer.weight
        return (weight.shape[1] if self.what else 1), len(weight)

    @property
    def bytes_per_fold(self) -> int:
        """What the sums of one fold take, nearly."""
        features, targets = self._shape
        return 8 * (features * (features + 1) // 2 + features * targets)

    def open(self, folds: int) -> None:
        """Start the sums."""
        intercept = self.layer.bias is not None
        self.folds = [NormalEquations(*self._shape, intercept) for _ in range(folds)]

    def look(
        self,
        _: nn.Module,
        arguments: tuple[Tensor, ...],
        named: dict[str, Tensor],
        output: Tensor,
    ) -> None:
        """Forward hook: take in what entered the layer, and its error without the branch."""
        x = (arguments[0] if arguments else named["x"]).detach()
        if isinstance(self.layer, QuantizedLinear):
            x, output = (spread(t, self.calls) for t in (x, output))
        if not isinstance(self.layer, QuantizedLinear):
            h, r = None, _convolution_error(self.reference, x, output).movedim(-3, -1)
            r = r.reshape(-1, *r.shape[-3:])
        else:
            h, r = self.layer.smoothed(x), _linear_error(self.layer, self.reference, x)
        r = r.reshape(r.shape[0] if r.ndim > 1 else 1, -1, r.shape[-1])
        h = r.new_zeros(*r.shape[:2], 1) if not self.what or h is None else h
        h = h.reshape(*r.shape[:2], -1)
        self.in_turn |= not _per_prompt(len(r), self.prompts[1])
        index = fold_index(r.shape[0], r.shape[1], *self.prompts, len(self.folds), self.calls)
        try:
            for k, fold in enumerate(self.folds):
                mine = (index == k).flatten().nonzero()[:, 0]
                if len(mine):
                    mine = mine.to(r.device)
                    fold.add(h.flatten(0, 1)[mine], r.flatten(0, 1)[mine])
        except CalibrationError as error:
            raise CalibrationError(f"the layer {self.name!r}: {error}") from error
        squares = sum_pair(output.detach().to(_wide(output)).square().flatten())
        self.squares = squares if self.squares is None else add_pairs(self.squares, squares)
        self.calls += 1

    def join(self, us: Processes) -> None:
        """Take in what passed through the layer in the other processes.

        Raises:
            CalibrationError: values that are not finite; names the layer.

        """
        if us.count == 1:
            return
        self._settle_named()
        if self.in_turn:  # calls are counted through all processes
            before = sum(int(n) for n, _ in us.gathered(self.calls)[: us.rank]) % len(self.folds)
            self.folds = (
                self.folds[len(self.folds) - before :] + self.folds[: len(self.folds) - before]
            )
        self.folds = equations_of_all(us, self.folds)
        self.energy = float(us.summed(torch.tensor(self.energy, dtype=torch.float64)))

    def _settle_named(self) -> None:
        try:
            self.settle()
        except CalibrationError as error:
            raise CalibrationError(f"the layer {self.name!r}: {error}") from error

    def settle(self) -> None:
        """Bring the sums here, in one transfer."""
        waiting = [p for fold in self.folds for p in fold.pending]
        squares = () if self.squares is None else (self.squares,)
        settled([*waiting, Pending(squares, self._has_energy)])
        self.squares = None

    def _has_energy(self, *pairs: Tensor) -> None:
        self.energy += sum(float(pair.sum()) for pair in pairs)

    def decide(self, penalties: Sequence[float]) -> tuple[LayerRefit, LowRank | Scales | None]:
        """What to put in: None keeps the layer as it is."""
        rank = 0 if self.branch is None else len(self.branch[0])
        base = LayerRefit(self.name, rank, what=self.what)
        self._settle_named()
        folds = [fold for fold in self.folds if fold.count]
        if not self.what and self.layer.bias is None:
            return _kept(base, "neither branch nor scales nor bias"), None
        if len(folds) < 2:
            why = "rows of one fold only: use a smaller batch_size" if folds else "was not called"
            return _kept(base, why), None
        prior = self._prior()
        if not self.what:
            penalties = penalties[:1]  # a bias alone is not penalized
        elif self.what == "scales":
            penalties = [*penalties, BIAS_ALONE]
        present = self._present(folds[0])
        try:
            if self.what == "scales":
                errors = cross_validated(folds, penalties, present, self._solutions)
            else:
                errors = held_out(folds, penalties, rank, present, prior, self._stored)
        except CalibrationError as error:  # a float16 factor may overflow
            raise CalibrationError(f"the refit of layer {self.name!r}: {error}") from error
        if self.what == "scales" and not errors.improves:
            bias = HeldOut(errors.before, errors.after[-1:])
            errors, penalties = (bias, [BIAS_ALONE]) if bias.improves else (errors, penalties)
        before, after = float(errors.before.sum()), float(errors.after[errors.best].sum())
        chosen = penalties[errors.best]
        alone = not self.what or chosen == BIAS_ALONE
        found = LayerRefit(
            self.name,
            rank,
            before / self.energy if self.energy else None,
            after / self.energy if self.energy else None,
            None if alone else chosen,
            what="" if alone else self.what,
        )
        if before <= torch.finfo(self.layer.weight.dtype).eps ** 2 * self.energy:
            return _kept(found, "no error beyond rounding"), None
        if not errors.improves:
            return _kept(found, "no gain on held-out prompts"), None
        everything = NormalEquations.merged(folds)
        if self.what == "scales":
            scales = next(self._scaled(everything, [chosen]))
            if not scales.change.any():  # the stored weight is the one there was
                found = replace(found, what="", penalty=None)
            return found, scales
        return found, reduced_rank(everything, chosen, rank, prior)

    def _solutions(
        self, equations: NormalEquations, penalties: Sequence[float]
    ) -> Iterator[Solution]:
        return (s.solution for s in self._scaled(equations, penalties))

    def _scaled(self, equations: NormalEquations, penalties: Sequence[float]) -> Iterator[Scales]:
        """Scales as the layer's dtype holds the scaled weight; ``BIAS_ALONE`` comes last, if at all."""
        old = self.layer.weight.cpu().double()
        finite = [p for p in penalties if p != BIAS_ALONE]
        if finite:
            for found in every_group_scales(equations, old, self.group, finite):
                yield self._held(found, old)
        if len(finite) < len(penalties):
            mean = torch.from_numpy(equations.mean_t.copy())  # zero without an intercept
            alone = Scales(torch.ones(len(old), 1).double(), torch.zeros_like(old), mean)
            yield self._held(alone, old)

    def _held(self, found: Scales, old: Tensor) -> Scales:
        """As the layer's dtype holds the scaled weight."""
        change = (old + found.change).to(self.layer.weight.dtype).double() - old
        constant = found.constant
        if self.layer.bias is not None:
            bias = self.layer.bias.cpu().double()
            constant = (bias + constant).to(self.layer.bias.dtype).double() - bias
        return Scales(found.factors, change, constant)

    def put(self, branch: LowRank | Scales | None) -> None:
        """Replace buffers by values of the same shape, dtype and device."""
        if branch is None:
            return
        if isinstance(branch, Scales):
            weight = self.layer.weight
            self.layer.weight = (weight.cpu().double() + branch.change).to(weight)
        elif self.branch is not None and isinstance(self.layer, QuantizedLinear):
            down, up = self.branch
            self.layer.down, self.layer.up = branch.down.to(down), branch.up.to(up)
        if self.layer.bias is not None:
            old = self.layer.bias
            self.layer.bias = (old.cpu().double() + branch.constant).to(old)

    def _present(self, like: NormalEquations) -> Solution:
        """The branch there is, as a map from x to r; its constant is zero by definition of r."""
        if self.branch is None:
            weight = torch.zeros(like.features, like.targets, dtype=torch.float64)
        else:
            down, up = (x.cpu().double() for x in self.branch)
            weight = (up @ down).T
        return weight, torch.zeros(like.targets, dtype=torch.float64)

    def _prior(self) -> Tensor | None:
        """What rounding the weight left: the map from x to r when rounding x is mere noise."""
        if self.branch is None:
            return None
        original = self.reference.get_parameter("weight").detach().cpu().double()
        if self.layer.smoothing is not None:
            original = original * self.layer.smoothing.cpu().double()
        return (original - self.layer.weight.cpu().double()).T

    def _stored(self, branch: LowRank) -> LowRank:
        """A solution as the layer's dtype holds it."""
        down, up, constant = branch.down, branch.up, branch.constant
        if self.branch is not None:
            down, up = down.to(self.branch[0].dtype), up.to(self.branch[1].dtype)
        if self.layer.bias is not None:
            old = self.layer.bias.cpu().double()
            constant = (old + constant).to(self.layer.bias.dtype).double() - old
        return LowRank(down, up, constant)


def spread(x: Tensor, calls: int) -> Tensor:
    """At most TOKENS tokens of every row of (rows, ..., features), evenly spaced, others in each call.

    A layer is fitted on the inputs of many prompts and steps; neighbouring tokens of one image add
    little to them, and would take several times as long as the layer itself.
    """
    tokens = x[0, ..., 0].numel() if x.ndim > 2 else 1
    if tokens <= TOKENS:
        return x
    stride = tokens // TOKENS
    index = (torch.arange(TOKENS) * tokens // TOKENS + calls % stride).to(x.device)
    return x.flatten(1, -2)[:, index]


def fold_index(rows: int, tokens: int, first: int, batch: int, folds: int, calls: int) -> Tensor:
    """Which fold every (row, token) of a layer's input belongs to: (rows, tokens).

    Guidance stacks whole batches, [unconditional; conditional], so row r belongs to prompt
    r mod batch. Rows that are not one per prompt (embeddings of the noise level, frames) go to the
    folds in turn, call by call.

    >>> fold_index(4, 1, 2, 2, 4, 0).flatten()  # prompts 2 and 3, twice
    tensor([2, 3, 2, 3])

    """
    if _per_prompt(rows, batch):
        return ((first + torch.arange(rows) % batch) % folds)[:, None].expand(rows, tokens)
    return torch.full((rows, tokens), calls % folds)


def _per_prompt(rows: int, batch: int) -> bool:
    """Whether every row belongs to a prompt of the batch."""
    return batch == 1 or rows in (batch, 2 * batch, 3 * batch)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _linear_error(layer: QuantizedLinear, reference: nn.Module, x: Tensor) -> Tensor:
    """The full-precision output minus the quantized one without its branch, (..., out).

    x (W - W_q)^T + (x - Q_a(x)) W_q^T + b - b_q: two small terms, not the difference of two large.
    With smoothing s, x / s and W diag(s) stand for x and W.
    """
    wide = _wide(x)
    rounded, own = layer.weight.to(wide), layer.smoothed(x).to(wide)
    exact = reference.get_parameter("weight").to(rounded)
    if layer.smoothing is not None:
        exact = exact * layer.smoothing.to(wide)
    error = F.linear(own, exact - rounded)
    if layer.activation is not None:
        error = error + F.linear(own - layer.rounded(x).to(wide), rounded)
    for bias, sign in ((reference.bias, 1), (layer.bias, -1)):
        if isinstance(bias, Tensor):
            error = error + sign * bias.to(rounded)
    return error


def _convolution_error(reference: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    wide = _wide(x)
    parameters = {name: p.to(x.device, wide) for name, p in reference.named_parameters()}
    exact: Tensor = functional_call(reference, parameters, (x.to(wide),))
    return exact - output.to(wide)


def _kept(layer: LayerRefit, reason: str) -> LayerRefit:
    return LayerRefit(**{**asdict(layer), "reason": reason})
