"""A denoiser while it is being quantized: the original, the copy, and what passes through them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.layers.blocks import Unit, in_call_order, never_called, units_of
from evenkeel.quantizers.layers.patterns import first_match
from evenkeel.quantizers.layers.quantized_layers import QuantizedLayer
from evenkeel.quantizers.layers.replacing import refuse_irreplaceable, refuse_quantized, swap
from evenkeel.quantizers.saved.progress_files import Partial
from evenkeel.quantizers.saved.report import (
    LayerReport,
    QuantizationReport,
    attach,
    kept_layer,
    report_of,
)
from evenkeel.quantizers.workspace.calibration_set import CalibrationSet, DenoiserCall, mapped

Side = Literal["original", "quantized"]
Progress = Callable[[int, int, str], None]
ROWS = 4096


@dataclass(frozen=True)
class BlockCall:
    """One call of a block, and what came out (a tensor, or a tuple of them)."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Any


class Workspace:
    """What a method works on. It decides about every layer with :meth:`keep` or :meth:`replace`.

    Args:
        module: the full-precision denoiser; it is not changed.
        calls: what to calibrate on; None for methods that need nothing.
        progress: called with (units done, units in all, name of the last).
        folder: where finished units are kept and looked for; None keeps nothing.
        identity: what tells this run from another, for ``folder``.

    Attributes:
        original: the full-precision denoiser.
        quantized: its copy, in which finished layers are replaced.
        layers: every linear and convolution layer of the original, by (first) name.

    Raises:
        QuantizationError: a layer is quantized already.

    """

    def __init__(
        self,
        module: nn.Module,
        calls: CalibrationSet | None = None,
        *,
        progress: Progress | None = None,
        folder: Path | None = None,
        identity: str = "",
    ) -> None:
        self.original = module
        found = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear | _ConvNd)]
        refuse_quantized(module)
        self.layers: dict[str, nn.Module] = dict(found)
        self.quantized = copy.deepcopy(module).eval().requires_grad_(False)
        self.reports: dict[str, LayerReport] = {}
        self._calls, self._progress = calls, progress
        self._partial = Partial(folder, identity)
        self._order: Counter[str] | None = None
        for name, layer in found:
            # LoRA and others have a forward of their own: not ours to replace.
            if type(layer) not in (nn.Linear, nn.Conv2d):
                self.keep(name, f"type {type(layer).__name__} is not quantized")

    @property
    def calls(self) -> CalibrationSet:
        """What to calibrate on.

        Raises:
            QuantizationError: there is nothing.

        """
        if self._calls is None:
            raise QuantizationError(
                "this method needs denoiser calls to calibrate on; give prompts to quantize."
            )
        return self._calls

    @property
    def open(self) -> list[str]:
        """Layers that nothing has been decided about, in module order."""
        return [name for name in self.layers if name not in self.reports]

    def keep(self, name: str, reason: str) -> None:
        """Leave a layer in full precision."""
        self.reports[name] = kept_layer(name, self.layers[name], reason)

    def keep_matching(self, patterns: tuple[str, ...], only: tuple[str, ...] = ()) -> None:
        """Leave open layers in full precision whose names match, or match none of ``only``."""
        for name in self.open:
            pattern = first_match(name, patterns)
            if only and first_match(name, only) is None:
                self.keep(name, "matched by no `only` pattern")
            elif pattern is not None:
                self.keep(name, f"skip pattern {pattern!r}")

    def replace(
        self,
        unit: Unit,
        made: Mapping[str, QuantizedLayer],
        *,
        notes: Mapping[str, str] | None = None,
        output_errors: Mapping[str, float] | None = None,
    ) -> None:
        """Put new layers into the copy, wherever it refers to the old ones, and report on them."""
        for name, layer in made.items():
            swap(self.quantized, self.quantized.get_submodule(name), layer)
            self.reports[name] = report_of(
                name,
                self.layers[name],
                layer,
                note=(notes or {}).get(name, ""),
                output_error=(output_errors or {}).get(name),
            )
        self._partial.write(unit.name, made, [self.reports[name] for name in made])

    def units(self, names: Sequence[str]) -> list[Unit]:
        """Blocks and single layers that hold these layers, in the order they are called in.

        Raises:
            QuantizationError: one of them has hooks, holds NaN or infinity, or has its weights
                elsewhere; no calibration call reaches one of them.

        """
        for name in names:
            _check(name, self.layers[name])
        units = units_of(self.original, names)
        if self._calls is None:
            return units
        unreached = never_called(names, self.order)
        if unreached:
            raise QuantizationError(
                f"no calibration call reaches {unreached[:5]}"
                f"{f' and {len(unreached) - 5} more' if len(unreached) > 5 else ''}. Skip these "
                "layers, or calibrate with calls that use them."
            )
        return in_call_order(units, list(self.order))

    def work(self, units: Sequence[Unit]) -> Iterator[Unit]:
        """Units still to be done; finished ones are taken from the folder. Reports progress."""
        for done, unit in enumerate(units, start=1):
            stored = self._partial.read(unit.name, self.quantized)
            if stored is None:
                yield unit
                missing = [name for name in unit.layers if name not in self.reports]
                assert not missing, f"{unit.name}: nothing was decided about {missing}"
            else:
                made, reports = stored
                for name, layer in made.items():
                    swap(self.quantized, self.quantized.get_submodule(name), layer)
                self.reports.update({r.name: r for r in reports})
            self.progress(done, len(units), unit.name)

    def progress(self, done: int, total: int, name: str) -> None:
        """Tell whoever watches how far a stage has come; :meth:`work` does so by itself."""
        if self._progress is not None:
            self._progress(done, total, name)

    def stage(self, name: str, compute: Callable[[], Any]) -> Any:
        """A result in JSON types that concerns all layers: computed once, then found in the folder."""
        return self._partial.stage(name, compute)

    @property
    def order(self) -> Counter[str]:
        """How often one call of the denoiser calls each layer, in the order of the first call."""
        if self._order is None:
            self._order = Counter()
            order = self._order
            names = {id(m): n for n, m in self.layers.items()}

            def note(layer: nn.Module, *_: Any) -> None:
                order[names[id(layer)]] += 1

            hooks = [m.register_forward_pre_hook(note) for m in self.layers.values()]
            try:
                self.calls.calls[0].make(self.original)
            finally:
                for hook in hooks:
                    hook.remove()
        return self._order

    def visit(
        self, names: Collection[str], see: Callable[[str, Tensor], None], side: Side = "original"
    ) -> None:
        """Make every calibration call and hand over what enters these layers, one call at a time.

        Args:
            names: of layers.
            see: called with a layer's name and its input, (..., in) or (N, in, height, width).
            side: in which denoiser; the copy's layers so far replaced are quantized.

        """
        net = self.original if side == "original" else self.quantized
        last = max(names, key=list(self.order).index)  # may make a call: before there are hooks

        def hook_of(name: str) -> Callable[..., None]:
            return lambda _, given, named: see(name, (given[0] if given else named["x"]).detach())

        hooks = [
            net.get_submodule(name).register_forward_pre_hook(hook_of(name), with_kwargs=True)
            for name in names
        ]
        hooks.append(net.get_submodule(last).register_forward_hook(_stop_after(self.order[last])))
        try:
            for call in self.calls.calls:
                self._make(call, net)
        finally:
            for hook in hooks:
                hook.remove()

    def layer_inputs(
        self, names: Collection[str], rows: int = ROWS, side: Side = "original"
    ) -> dict[str, Tensor]:
        """What enters these layers, thinned out evenly over calls and tokens.

        Args:
            names: of layers.
            rows: about so many rows are kept of each layer (images for convolutions: as many whole
                images as have so many pixels, at least one a call).
            side: see :meth:`visit`.

        Returns:
            By name, (rows, in) or (images, in, height, width).

        """
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        share = -(-rows // len(self.calls))

        def see(name: str, x: Tensor) -> None:
            if isinstance(self.layers[name], nn.Conv2d):
                x = x.reshape(-1, *x.shape[-3:])
                count = max(1, share // x[0, 0].numel())
            else:
                x, count = x.reshape(-1, x.shape[-1]), share
            # Evenly, and never the same tokens only: the stride is not a multiple of a sequence.
            index = torch.linspace(0, len(x) - 1, min(count, len(x)), device=x.device).long()
            found[name].append(x[index].clone())

        self.visit(names, see, side)
        return {name: torch.cat(parts) for name, parts in found.items()}

    def block_targets(self, name: str) -> list[Any]:
        """What the block should put out at each of its calls: the original's, on the teachers' calls."""
        calls = self.calls.teachers or self.calls.calls
        return [call.output for call in self._block_calls(name, "original", calls)]

    def block_calls(self, name: str, side: Side = "original") -> list[BlockCall]:
        """Every call of a block (or layer) over the calibration set, with what came out.

        The tensors are all kept: this is the largest part of a method's memory.
        """
        return self._block_calls(name, side, self.calls.calls)

    def _block_calls(self, name: str, side: Side, calls: Sequence[DenoiserCall]) -> list[BlockCall]:
        net = self.original if side == "original" else self.quantized
        found: list[BlockCall] = []

        def keep(_: nn.Module, given: Any, named: Any, out: Any) -> None:
            copied = mapped((given, dict(named), out), lambda x: x.detach().clone())
            found.append(BlockCall(*copied))

        layers = [n for n in self.order if n == name or n.startswith(f"{name}.")]
        part = net.get_submodule(name)
        times = self.order[layers[0]] if layers else 1
        hooks = [
            part.register_forward_hook(keep, with_kwargs=True),
            part.register_forward_hook(_stop_after(times)),
        ]
        try:
            for call in calls:
                self._make(call, net)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def result(
        self, quantizer: str, spec: Mapping[str, Any]
    ) -> tuple[nn.Module, QuantizationReport]:
        """The quantized denoiser, which carries the report, and the report itself.

        Args:
            quantizer: what was asked for, in short.
            spec: all of it, in types that JSON knows.

        Raises:
            QuantizationError: no layer was quantized.

        """
        assert not self.open, f"{quantizer} decided nothing about {self.open[:5]}"
        layers = tuple(self.reports[name] for name in self.layers)
        if all(layer.kept for layer in layers):
            raise _nothing_left(layers)
        report = QuantizationReport.measured(quantizer, spec, layers, self.original, self.quantized)
        attach(report, self.quantized)
        return self.quantized.eval().requires_grad_(False), report

    def _make(self, call: Any, net: nn.Module) -> None:
        with suppress(_Enough):
            call.make(net)


class _Enough(Exception):
    """Raised inside a forward pass when what was asked for has been seen."""


def _stop_after(times: int) -> Callable[..., None]:
    left = [times]

    def hook(*_: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            left[0] = times
            raise _Enough

    return hook


def _check(name: str, layer: nn.Module) -> None:
    refuse_irreplaceable(name, layer)
    weight = layer.get_parameter("weight")
    if not bool(torch.isfinite(weight).all()):
        count = int((~torch.isfinite(weight)).sum())
        raise QuantizationError(
            f"The weight of {name!r} holds {count} of {weight.numel()} values that are NaN or "
            "infinite. Load the checkpoint again, or convert it in a wider dtype."
        )


def _nothing_left(layers: Sequence[LayerReport]) -> QuantizationError:
    names = ", ".join(repr(layer.name) for layer in layers[:5]) or "none at all"
    reasons = "; ".join(sorted({layer.reason for layer in layers}))
    return QuantizationError(
        f"No layer is left to quantize: {len(layers)} linear and convolution layers ({names}"
        f"{', ...' if len(layers) > 5 else ''}){f', kept for: {reasons}' if reasons else ''}. A "
        "pattern is for the whole dotted name, and '*' also matches dots: '*.attn1' is every "
        "block's attn1."
    )
