"""One run of the quantized pipeline: what enters its layers, and how the output feels what leaves them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from evenkeel.errors import CalibrationError
from evenkeel.fitting.adapters.kept import NOTHING, Kept
from evenkeel.fitting.adapters.row_sample import row_keys
from evenkeel.fitting.adapters.sites import Site
from evenkeel.hosts.actuators.beside import input_of
from evenkeel.hosts.actuators.head_rows import outputs_as_rows, rows_of
from evenkeel.hosts.pipeline.denoiser_calls import Call, answer_of
from evenkeel.hosts.pipeline.pipelines import eager, uncompiled
from evenkeel.hosts.processes import Processes, processes
from evenkeel.hosts.run import Batch, Run
from evenkeel.hosts.scheduler.interception import Interceptor
from evenkeel.sampling.step_law import StepLaw


@dataclass
class Collected:
    """What a run told.

    Attributes:
        law: of the run.
        first: the state that entered the first step, of the first batch.

    """

    law: StepLaw
    first: Tensor


@dataclass
class _Watch(Interceptor):
    """Counts steps, and keeps the state that enters the first one."""

    step: int = 0
    first: Tensor | None = None
    calls: int = 0  # of the denoiser, in this step

    def before(
        self, scheduler: Any, timestep: Any, output: Tensor, sample: Tensor, kwargs: dict[str, Any]
    ) -> None:
        if self.first is None:
            self.first = sample.detach()

    def after(self, scheduler: Any, output: Tensor, sample: Tensor, result: Tensor) -> Tensor:
        self.step, self.calls = self.step + 1, 0
        return result


def collect(
    run: Run, sites: Mapping[str, Site], *, probed: int, progress: bool, kept: Kept = NOTHING
) -> Collected:
    """Sample with the quantized denoiser and keep rows of what enters every layer, and of gradients.

    Gradients are those of the full-precision denoiser at the same inputs. The weight of a step's probe is
    how much that step's output moves the final sample: the last row of the step law's whole-trajectory
    weights, scaled to a mean square of 1.

    Args:
        run: with a quantized twin.
        sites: to be filled.
        probed: prompts of which gradients are taken; 0 takes none.
        progress: show a bar.
        kept: where rows of finished batches are, and are looked for.

    Raises:
        CalibrationError: values that are not finite.

    """
    full, quantized = map(uncompiled, run.pair)  # a graph would not call the hooks
    law = run.law(quantized)
    weights = np.abs(law.trajectory[1][-1])
    weights = weights / np.sqrt((weights**2).mean())
    us, watch = processes(), _Watch()
    probe = _Probe(full, sites, weights, run.seed)
    bar = tqdm(run.share(), desc="adapters", unit="batch", disable=not (progress and us.main))
    with bar, eager(full, quantized), run.undisturbed(quantized, watch), ExitStack() as stack:
        rows = _Rows(watch)
        for site in sites.values():
            hook = site.quantized.register_forward_hook(rows.look(site), with_kwargs=True)
            stack.callback(hook.remove)

        def ask(_: nn.Module, arguments: Any, named: dict[str, Any], output: Any) -> None:
            if rows.batch.first < probed:
                probe.ask(rows, Call(arguments, named, answer_of(output)))
            watch.calls += 1

        stack.callback(quantized.register_forward_hook(ask, with_kwargs=True).remove)

        def sampled(batch: Batch) -> Tensor | None:
            watch.step, watch.calls, watch.first, rows.batch = 0, 0, None, batch
            run.sample(batch)
            return watch.first

        first = None
        for batch in bar:
            us.check()
            made_by = {
                **kept.made_by(run, batch, full, quantized),
                "first seed": run.seed,
                "probed": batch.first < probed,
                "rows": {name: site.inputs.size for name, site in sites.items()},
            }
            entered = kept.rows(made_by, sites, partial(sampled, batch))
            first = entered if first is None else first
    first = _exchanged(us, sites, first)
    if first is None:
        raise CalibrationError(
            f"{type(run.pipeline).__name__} never called its scheduler's step; there is nothing to fit."
        )
    return Collected(law, first)


def _exchanged(us: Processes, sites: Mapping[str, Site], first: Tensor | None) -> Tensor | None:
    """All processes' rows in every process, site by site; the first state, of whichever had one."""
    if us.count == 1:
        return first
    for site in sites.values():
        samples, own = site.samples, {}
        for side, sample in samples.items():
            own[f"{side}.keys"], own[f"{side}.rows"] = sample.sorted()
        for rank, (dtype, theirs) in enumerate(us.gathered(str(site.dtype), own)):
            if rank == us.rank:
                continue
            for side, sample in samples.items():
                if len(theirs[f"{side}.keys"]):
                    sample.offer(theirs[f"{side}.keys"], theirs[f"{side}.rows"])
                    site.dtype = getattr(torch, dtype.removeprefix("torch."))
    found = us.gathered(None, {} if first is None else {"first": first})
    return next((tensors["first"] for _, tensors in found if tensors), None)


class _Rows:
    """Keys of rows, and the hooks that offer rows with them."""

    batch: Batch

    def __init__(self, watch: _Watch) -> None:
        self.watch = watch
        self._known: dict[tuple[int, ...], Tensor] = {}

    def keys(self, rows: Tensor) -> Tensor:
        """(n,) of rows (batch, tokens, F): guidance stacks whole batches, so row r is prompt r mod batch."""
        n, size = len(rows), len(self.batch)
        key = (self.batch.seed, self.watch.step, self.watch.calls, n, rows.shape[1])
        if key not in self._known:
            if len(self._known) > 16:
                self._known.clear()
            index = torch.arange(n, device=rows.device)
            branch = index // size + 64 * self.watch.calls
            pairs = self.batch.seed + index % size
            self._known[key] = row_keys(pairs, self.watch.step, branch, rows.shape[1]).flatten()
        return self._known[key]

    def look(self, site: Site) -> Any:
        """A forward hook that offers what enters the layer."""

        def hook(layer: nn.Module, arguments: Any, named: dict[str, Any], output: Tensor) -> None:
            x = input_of(arguments, named)
            site.dtype = x.dtype
            x = x[None] if x.ndim == 1 else x
            rows = rows_of(site.head, layer, x.detach())
            keys = self.keys(rows)
            site.inputs.offer(keys, rows.flatten(0, 1))
            if site.outputs is not None:
                output = output[None] if output.ndim == 1 else output
                site.outputs.offer(keys, outputs_as_rows(site.head, output).flatten(0, 1))

        return hook


class _Probe:
    """Backward passes of random probes of the full-precision denoiser's output."""

    def __init__(self, full: nn.Module, sites: Mapping[str, Site], weights: Any, seed: int) -> None:
        self.full, self.sites, self.weights, self.seed = full, sites, weights, seed

    def ask(self, rows: _Rows, call: Call) -> None:
        """One probe of one call, its gradients offered with the keys of the call's rows."""
        left: dict[str, Tensor] = {}
        with torch.enable_grad(), _frozen(self.full), ExitStack() as stack:
            for name, site in self.sites.items():
                stack.callback(site.reference.register_forward_hook(_leaving(left, name)).remove)
            output = call.again(self.full, call.sample)
            # Of this call alone: whichever process makes it.
            one = torch.tensor([rows.batch.seed])
            key = int(row_keys(one, rows.watch.step, torch.zeros_like(one), 1))
            generator = torch.Generator().manual_seed(key + self.seed + rows.watch.calls)
            signs = torch.randn(output.shape, generator=generator).to(output)
            if output.ndim > 3 and output.shape[1] == 2 * call.sample.shape[1]:
                signs[:, call.sample.shape[1] :] = 0  # of a learned variance
            names = list(left)
            weight = float(self.weights[min(rows.watch.step, len(self.weights) - 1)])
            found = torch.autograd.grad(
                (output * signs).sum(), [left[n] for n in names], allow_unused=True
            )
        for name, gradient in zip(names, found, strict=True):
            if gradient is None:
                continue
            site = self.sites[name]
            gradient = gradient[None] if gradient.ndim == 1 else gradient
            out = outputs_as_rows(site.head, gradient)
            weighted = torch.nn.functional.pad(out, (0, 1), value=weight)
            site.gradients.offer(rows.keys(out), weighted.flatten(0, 1))


def _leaving(left: dict[str, Tensor], name: str) -> Any:
    """A hook that keeps what leaves a layer, with a gradient even where nothing before has one."""

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        left[name] = output
        return output + 0  # what comes next may change its input in place

    return hook


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Inside, no parameter wants a gradient."""
    wanted = [p for p in module.parameters() if p.requires_grad]
    for p in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)
