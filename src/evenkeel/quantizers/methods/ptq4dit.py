"""PTQ4DiT: spread large channels evenly over inputs and weights, then learn the rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.layers.patterns import first_match
from evenkeel.quantizers.layers.static_ranges import searched
from evenkeel.quantizers.methods.aligned import Aligned
from evenkeel.quantizers.methods.base import check_bits
from evenkeel.quantizers.methods.block_reconstruction import (
    BlockTrial,
    Learning,
    WeightPlan,
    planned,
)
from evenkeel.quantizers.numbers.formats import Integer
from evenkeel.quantizers.numbers.grids import Grid
from evenkeel.quantizers.numbers.scales import fit, last
from evenkeel.quantizers.workspace.workspace import Workspace

# What diffusers calls the projections to q, k and v, out of attention, and into the feed-forward.
BALANCED: tuple[str, ...] = (
    "*.to_q",
    "*.to_k",
    "*.to_v",
    "*.to_out.0",
    "*.add_q_proj",
    "*.add_k_proj",
    "*.add_v_proj",
    "*.to_add_out",
    "*.net.0.proj",
    "*.proj_mlp",
    "*.conv_inverted",
)
EPSILON = 1e-8


@dataclass(frozen=True)
class PTQ4DiT(Aligned):
    """Post-training quantization of Wu et al., NeurIPS 2024 (arXiv:2405.16005), for transformers.

    Channels that are large in the input are shrunk and the weight's columns grow by as much, so that
    both are equally hard to round: x / s and W diag(s), see :func:`salience_balance`. Then every
    block learns the rounding of its weights and the scales of its inputs together. Weights: integers
    with zero point, one scale per output channel. Inputs: one static range per layer. Both ranges
    are the best of three percentiles. All linear and convolution layers are quantized, embedders,
    modulation and the final layer too.

    Differences from the paper or its code. The operands of the attention products and the softmax
    stay as they are: only layers are quantized. The factors s stay at run time, as a division of the
    layer's input (the paper folds them in the modulation and the layer before), and are stored with
    the layer (its code derives them anew from the calibration file whenever it loads). Layers that
    read one input share s, as the paper's single qkv projection does. Its code does not pass the
    rate for input scales on to the optimizer; ``activation_rate`` is the one it then runs with.

    Attributes:
        weight_bits: 2 to 8; the paper has 8 and 4.
        activation_bits: 3 to 8, or 16.
        balance: name patterns of layers that are balanced, where they exist: projections to q, k, v
            and out of attention, and the first of the feed-forward; not its second. Empty balances
            none.
        iterations: minibatches per block; 0 rounds to the nearest.
        rounding_rate: of Adam on the rounding. With few iterations raise it, for example 300 and
            0.02.
        activation_rate: of Adam on the logarithms of input scales; 0 leaves them.
        batch_size: rows per minibatch.
        regularization: weight of the AdaRound regularizer.
        skip: name patterns of layers that stay in full precision.
        seed: of the minibatches.
        alignment, teacher, pair_at, counted: see :class:`evenkeel.quantizers.methods.aligned.Aligned`.

    Raises:
        QuantizationError: a field out of range.

    >>> str(PTQ4DiT.of_bits("w8a8", iterations=500))
    'ptq4dit-w8a8-iterations=500'

    """

    name: ClassVar[str] = "ptq4dit"

    weight_bits: int = 4
    activation_bits: int = 8
    balance: tuple[str, ...] = BALANCED
    iterations: int = 20_000
    rounding_rate: float = 1e-3
    activation_rate: float = 4e-5
    batch_size: int = 32
    regularization: float = 0.01
    skip: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits("weight_bits", self.weight_bits)
        check_bits("activation_bits", self.activation_bits, 3)
        if self.weight_bits == 16:
            raise QuantizationError("PTQ4DiT rounds weights: weight_bits is 2 to 8, got 16.")
        _ = self._learning

    @property
    def grid(self) -> Grid:
        """Of every weight."""
        return Grid(Integer(self.weight_bits, signed=False), zero_point=True, range="percentile")

    def quantize(self, workspace: Workspace) -> None:
        """Block by block in the order of the calls.

        Raises:
            QuantizationError: no layer matches ``balance``.

        """
        workspace.keep_matching(self.skip)
        names = workspace.open
        if self.balance and not any(first_match(name, self.balance) for name in names):
            raise QuantizationError(
                f"none of {len(names)} layers (such as {names[:3]}) matches the patterns in "
                "`balance`. Give those of this denoiser, or none to balance nothing."
            )
        for unit in workspace.work(workspace.units(names)):
            chosen = [name for name in unit.layers if first_match(name, self.balance)]
            smoothing = balancing(workspace, chosen)
            plans = {n: self._plan(workspace, n, smoothing.get(n)) for n in unit.layers}
            trial = BlockTrial(workspace, unit, plans, self.seed)
            if self.activation_bits != 16:
                bits = self.activation_bits
                found = {n: searched(x, bits, "percentile") for n, x in trial.inputs().items()}
                trial.round_inputs(found)
            learned = trial.learn_rounding(self._learning)
            nearest = learned is not None and learned.kept == "nearest"
            note = "nearest: learning did not lower the error of the block's output"
            notes = dict.fromkeys(unit.layers, note if nearest else "")
            errors = trial.output_errors()
            workspace.replace(unit, trial.finished(), notes=notes, output_errors=errors)

    @property
    def _learning(self) -> Learning:
        return Learning(
            self.iterations,
            rounding_rate=self.rounding_rate,
            input_rate=self.activation_rate if self.activation_bits != 16 else 0.0,
            batch_size=self.batch_size,
            regularization=self.regularization,
        )

    def _plan(self, workspace: Workspace, name: str, smoothing: Tensor | None) -> WeightPlan:
        layer, grid = workspace.layers[name], self.grid
        weight = planned(layer, smoothing)
        return WeightPlan(grid, fit(last(weight, grid), grid, f"the weight of {name!r}"), smoothing)


def salience_balance(activation: Tensor, weight: Tensor) -> Tensor:
    """What to divide the input by, channel by channel, so that input and weight are equally salient.

    s_c = sqrt(xbar_c / (w_c + 1e-8)),  xbar_c = sum_i softmax_i(-rho_i) x_ic,  rho_i the Spearman
    correlation over channels of x_i with w (arXiv:2405.16005, channel-wise salience balancing and
    Spearman's rho-guided salience calibration). Samples whose large channels meet small weights
    count more: there is most to balance. Then x / s and W s have the salience sqrt(xbar w), both.
    A channel that is zero in all samples has s = 1.

    Args:
        activation: (samples, channels), max over tokens of |x|.
        weight: (channels,), max over outputs of |W|.

    Returns:
        (channels,) s, positive, float32.

    Raises:
        QuantizationError: shapes that do not fit, negative values, NaN or infinity.

    >>> salience_balance(torch.tensor([[4.0, 1.0]]), torch.tensor([1.0, 4.0]))
    tensor([2.0000, 0.5000])

    """
    if activation.ndim != 2 or weight.shape != activation.shape[1:] or not activation.numel():
        raise QuantizationError(
            "expected saliences of shape (samples, channels) and (channels,), got "
            f"{tuple(activation.shape)} and {tuple(weight.shape)}."
        )
    x, w = activation.cpu().double(), weight.cpu().double()
    if not bool((torch.isfinite(x) & (x >= 0)).all() & (torch.isfinite(w) & (w >= 0)).all()):
        raise QuantizationError(
            "saliences are largest magnitudes; found negative values, NaN or infinity. Calibrate in "
            "float32 or bfloat16."
        )
    share = torch.softmax(-_spearman(x, w), 0)
    mean = share @ x
    scale = (mean / (w + EPSILON)).sqrt().float()
    return torch.where(scale < torch.finfo(scale.dtype).tiny, 1.0, scale).to(activation.device)


def balancing(workspace: Workspace, names: Sequence[str]) -> dict[str, Tensor]:
    """:func:`salience_balance` of these layers on the full-precision denoiser, in its dtype.

    Every row of every calibration call is one sample. Layers that are called one after the other with
    the same tensor share s, and their weights count as one.
    """
    if not names:
        return {}
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    leader: dict[str, str] = {}
    before: list[tuple[str, Tensor]] = []  # holds on to the tensor: its memory is not used again

    def see(name: str, x: Tensor) -> None:
        same = bool(before) and before[0][1].data_ptr() == x.data_ptr()
        leader.setdefault(name, leader[before[0][0]] if same else name)
        before[:] = [(name, x)]
        channels_last = x.movedim(1, -1) if x.ndim == 4 else x
        found[name].append(channels_last.abs().flatten(1, -2).amax(1) if x.ndim > 2 else x.abs())

    workspace.visit(names, see)
    weights = {n: planned(workspace.layers[n]).abs().transpose(0, 1).flatten(1) for n in names}
    scales: dict[str, Tensor] = {}
    for name in dict.fromkeys(leader.values()):
        group = [n for n in names if leader[n] == name]
        salience = torch.stack([weights[n].amax(1) for n in group]).amax(0)
        scale = salience_balance(torch.cat(found[name]).float(), salience)
        for member in group:
            like = workspace.layers[member].get_parameter("weight")
            scales[member] = scale.to(like.dtype, copy=True)
    return scales


def _spearman(x: Tensor, w: Tensor) -> Tensor:
    """Rank correlation of every row of x (samples, channels) with w; 0 where one is constant."""
    ranks, own = rankdata(x.numpy(), axis=1), rankdata(w.numpy())
    ranks, own = ranks - ranks.mean(1, keepdims=True), own - own.mean()
    size = np.linalg.norm(ranks, axis=1) * np.linalg.norm(own)
    rho = np.divide(ranks @ own, size, out=np.zeros(len(ranks)), where=size > 0)
    return torch.from_numpy(rho)
