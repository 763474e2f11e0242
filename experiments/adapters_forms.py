"""What the form of the adapters' metric leaves out, what else their bytes could be, where they help less.

Squared errors of final latents, in dB against the quantized denoiser, over pairs of prompt and seed that no
fit has seen (16 prompts to fit on, seed 0; pairs to measure on, seed 1), and each arm's paired difference to
the first one with its standard error. Nothing is chosen by these pairs.

    forms-*      W4A16, groups of 32, adapters for 11 % more bytes, 4 bits unless an arm says otherwise. All
                 arms from the same rows: 6 tokens of each image, the same at every step, and one probe per
                 image for all steps.
    branches-*   layers with branches of rank 16 and 4-bit inputs: refit_branches (32 prompts) by each layer's
                 own error and in two metrics, with rows of the network with its branches and without them,
                 and the floor that rounding the inputs alone sets (weights of 8 bits).
    after-*      adapters (32 prompts) for 11 % more bytes after other quantizers.

    python experiments/adapters_forms.py [CELL ...]     # default: all; writes ADAPTERS_FORMS.md
"""

from __future__ import annotations

import argparse
import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import evenkeel
from evenkeel import zoo
from evenkeel.errors import EvenkeelError
from evenkeel.fitting.adapters.effective_weight import effective_weight, reference_weight
from evenkeel.fitting.adapters.final_samples import FinalSamples, gain
from evenkeel.fitting.adapters.fit_adapters import stored_size
from evenkeel.fitting.adapters.sites import Place, sites_of
from evenkeel.fitting.adapters.solve import LayerProblem, Solution
from evenkeel.fitting.quantize import quantize
from evenkeel.hosts.actuators.beside import input_of
from evenkeel.hosts.actuators.head_rows import outputs_as_rows, rows_of, sizes
from evenkeel.hosts.pipeline.denoiser_calls import Call, answer_of
from evenkeel.hosts.pipeline.pipelines import denoiser_of
from evenkeel.hosts.run import Run
from evenkeel.low_rank import factors
from evenkeel.low_rank.budget import Option, share_out
from evenkeel.low_rank.factors import LayerAdapter, rounded
from evenkeel.low_rank.metric import OutputMetric
from evenkeel.low_rank.moment import moment_as_it_is, second_moment
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.quantizers.methods.catalogue import method_from
from evenkeel.storage import write_atomically
from evenkeel.zoo.pictures import KINDS

HERE = Path(__file__).parent
RESULTS = HERE / "adapters_forms"
FIT, BUDGET, TOKENS = 16, 0.11, 6
FEW = {"iterations": 300, "rounding_rate": 0.02}  # of 20,000, as in quantizers.py
AFTER: dict[str, dict[str, Any]] = {
    "gptq": {
        "method": "rtn",
        "weight_bits": 4,
        "activation_bits": 16,
        "group": 32,
        "rounding": "gptq",
    },
    "svdquant-gptq": {
        **{"method": "svdquant", "weight_bits": 4, "activation_bits": 16, "group": 32},
        **{"rank": 16, "rounding": "gptq"},
    },
    "ptq4dit": {"method": "ptq4dit", "weight_bits": 4, "activation_bits": 8, **FEW},
    "q-diffusion": {
        **{"method": "q-diffusion", "weight_bits": 4, "activation_bits": 8, **FEW},
        **{"activation_iterations": 200, "activation_rate": 2e-3},
    },
}


class Setting:
    """A twin, its runs to fit and to measure on."""

    def __init__(self, twin: str, pairs: int) -> None:
        self.twin, self.pipe = zoo.twin(twin), zoo.load(twin)
        self.kind, self.pairs = KINDS[self.twin.pictures], pairs
        self.steps = self.twin.num_inference_steps
        self.asked: dict[str, Any] = {"guidance_scale": self.twin.guidance_scale, "batch_size": 16}

    def run(self, quantized: nn.Module, count: int = FIT, seed: int = 0) -> Run:
        """On prompts of this seed."""
        prompts = self.kind.prompts(count, seed)
        return Run(
            self.pipe, prompts, self.steps, quantized=quantized, seed=1000 * seed, **self.asked
        )

    def measured(self, quantized: nn.Module) -> FinalSamples:
        """Of the pairs to measure on."""
        return FinalSamples(self.run(quantized, self.pairs, 1))

    @property
    def over(self) -> range:
        """All of these pairs."""
        return range(self.pairs)

    def fit(self, quantized: nn.Module, **options: Any) -> tuple[Any, Any]:
        """Adapters with every default."""
        return evenkeel.fit_adapters(
            self.pipe,
            quantized=quantized,
            prompts=self.kind.prompts(2 * FIT, 0),
            num_inference_steps=self.steps,
            progress=False,
            **{**self.asked, **options},
        )


# ---- rows of every layer at every step


class Rows:
    """x (T, n, F) and g (T, n, O) of a layer: the same n rows at every step, one probe per image."""

    def __init__(self) -> None:
        self.x: list[Tensor] = []
        self.g: list[Tensor] = []

    def stacked(self, batches: int) -> tuple[Tensor, Tensor] | None:
        """Steps first; None where the output does not depend on the layer."""
        if len(self.g) != len(self.x) or not self.g:
            return None
        x, g = (
            torch.stack(v).unflatten(0, (batches, -1)).transpose(0, 1) for v in (self.x, self.g)
        )
        x, g = x.flatten(1, 2), g.flatten(1, 2)
        return (x, g) if bool(g.any()) else None


def some(rows: Tensor) -> Tensor:
    """(rows, F): some tokens of each image, always the same ones."""
    count = rows.shape[1]
    picked = torch.linspace(0, count - 1, min(TOKENS, count)).long()
    return rows.detach()[:, picked].flatten(0, 1).float()


@contextmanager
def told(run: Run, places: Mapping[str, Place], found: dict[str, Rows]) -> Iterator[list[int]]:
    """Inside, calls of the quantized denoiser tell rows and gradients; the list holds (first seed,)."""
    full, quantized = run.pair
    seed = [0]
    with ExitStack() as stack:
        for name, place in places.items():

            def enters(layer: Any, arguments: Any, named: Any, _: Tensor, name: str = name) -> None:
                x = input_of(arguments, named)
                x = x[None] if x.ndim == 1 else x
                found[name].x.append(some(rows_of(places[name].head, layer, x)))

            hook = place.quantized.register_forward_hook(enters, with_kwargs=True)
            stack.callback(hook.remove)

        def asked(_: nn.Module, arguments: Any, named: dict[str, Any], output: Any) -> None:
            left: dict[str, Tensor] = {}
            call = Call(arguments, named, answer_of(output))
            with torch.enable_grad(), ExitStack() as inner:
                for name, place in places.items():

                    def leaves(_: Any, __: Any, y: Tensor, name: str = name) -> Tensor:
                        left[name] = y if y.requires_grad else y.detach().requires_grad_()
                        return left[name] + 0

                    inner.callback(place.reference.register_forward_hook(leaves).remove)
                answer = call.again(full, call.sample)
                generator = torch.Generator().manual_seed(seed[0])
                signs = torch.randn(answer.shape, generator=generator)
                if answer.ndim > 3 and answer.shape[1] == 2 * call.sample.shape[1]:
                    signs[:, call.sample.shape[1] :] = 0  # of a learned variance
                gradients = torch.autograd.grad(
                    (answer * signs).sum(), list(left.values()), allow_unused=True
                )
            for name, g in zip(left, gradients, strict=True):
                if g is not None:
                    g = g[None] if g.ndim == 1 else g
                    found[name].g.append(some(outputs_as_rows(places[name].head, g)))

        stack.callback(quantized.register_forward_hook(asked, with_kwargs=True).remove)
        yield seed


def rows_of_all(run: Run) -> tuple[dict[str, Place], dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Layers, their rows, and the weight of every step's probe."""
    places = sites_of(run)
    found = {name: Rows() for name in places}
    law = run.law(run.pair[1])
    weights = torch.as_tensor(abs(law.trajectory[1][-1])).float()
    weights = weights / weights.square().mean().sqrt()
    for p in run.pair[0].parameters():
        p.requires_grad_(False)
    batches = run.batches()
    with run.undisturbed(run.pair[1]), told(run, places, found) as seed:
        for batch in batches:
            seed[0] = batch.seed
            run.sample(batch)
    kept = {n: s for n, r in found.items() if (s := r.stacked(len(batches))) is not None}
    # A solver of higher order may call once more or less often than the law has steps.
    return places, kept, weights[: len(next(iter(kept.values()))[0])]


# ---- the forms


def problem(
    name: str, place: Place, x: Tensor, g: Tensor, weights: Tensor, form: str = ""
) -> LayerProblem:
    """A layer's problem in one form of the metric."""
    w = weights[:, None, None]
    xs, gs = x.flatten(0, 1), (g * w).flatten(0, 1)
    if form == "S weighted like G":
        xs = (x * w).flatten(0, 1)
    elif form == "gradients summed over steps":
        gs = (g * w).sum(0) / len(w) ** 0.5
    elif form == "gradients of 8 prompts":
        half = g.shape[1] // 2
        gs = (g[:, :half] * w).flatten(0, 1)
    elif form == "local":
        gs = None
    metric = OutputMetric(second_moment(xs), None if gs is None else second_moment(gs))
    held_out = OutputMetric(
        moment_as_it_is(xs[::2]), None if gs is None else moment_as_it_is(gs[::2])
    )
    change = metric.working(reference_weight(place.reference) - effective_weight(place.quantized))
    kernel = sizes(place.reference.kernel_size) if place.head.kind == "convolution" else ()
    return LayerProblem(name, kernel, change, metric, held_out)


def shared_out(
    problems: list[LayerProblem],
    bits: int,
    budget: int,
    factor: Callable[[str], float] = lambda _: 1.0,
    scale_bytes: int = 2,
) -> tuple[dict[str, int], Solution]:
    """Ranks within the budget, and factors of them."""

    def options(p: LayerProblem) -> list[Option]:
        outputs, features = p.change.shape
        saved = (2 - scale_bytes) * sum(-(-n // factors.GROUP) for n in (outputs, features))
        return [
            Option(o.bytes - int(str(o.choice)) * saved, factor(p.name) * o.error, o.choice)
            for o in p.options(p.components().left(), bits)
        ]

    chosen = share_out({p.name: options(p) for p in problems}, budget)
    ranks, solution = {n: int(str(o.choice)) for n, o in chosen.items()}, Solution(bits)
    for p in problems:
        solution.add(p, p.components(), ranks[p.name])
    return ranks, solution


def alternating(
    p: LayerProblem, x: Tensor, g: Tensor, weights: Tensor, rank: int, bits: int, rounds: int = 1
) -> LayerAdapter:
    """Least squares on ``sum_t tr(G_t E S_t E^T)``, one factor at a time, each rounded in turn."""
    start = factors.fit_factors(p.name, p.metric, p.change, p.components(), rank, bits)
    n = x.shape[1]
    ridge = 1e-2  # single steps have a twentieth of the rows
    s = torch.einsum("tnf,tng->tfg", x, x).double() / n
    gs = torch.einsum("tno,tnp->top", g * weights[:, None, None], g * weights[:, None, None])
    gs = gs.double() / n
    for m in (s, gs):
        mean = m.mean(0)
        m += ridge * mean + 1e-3 * mean.diagonal().mean() * torch.eye(m.shape[1])

    def value(e: Tensor) -> float:
        return float(((gs @ e) * (e @ s)).sum())

    def solved(apply: Callable[[Tensor], Tensor], right: Tensor, first: Tensor) -> Tensor:
        found, left = first, right - apply(first)
        way, size = left, left.square().sum()
        for _ in range(12):
            along = apply(way)
            step = size / (way * along).sum().clamp_min(1e-300)
            found, left = found + step * way, left - step * along
            new = left.square().sum()
            way, size = left + new / size.clamp_min(1e-300) * way, new
        return found

    def grid(v: Tensor) -> Tensor:
        return rounded(v, bits).dense().double()

    down, up = start.down.dense().double(), start.up.dense().double()  # (r, F), (r, O)
    best, least = (down, up), value(p.change - up.T @ down)
    weighted = gs @ p.change @ s
    for _ in range(rounds):
        a = down @ s @ down.T
        up = grid(solved(lambda b, a=a: (gs @ b.T @ a).sum(0).T, (weighted @ down.T).sum(0).T, up))
        c = up @ gs @ up.T
        down = solved(lambda d, c=c: (c @ d @ s).sum(0), (up @ weighted).sum(0), down)
        balance = (up.norm(dim=1) / down.norm(dim=1).clamp_min(1e-30)).clamp_min(1e-30).sqrt()
        down = grid(down * balance[:, None])
        a = down @ s @ down.T
        up = grid(solved(lambda b, a=a: (gs @ b.T @ a).sum(0).T, (weighted @ down.T).sum(0).T, up))
        if (now := value(p.change - up.T @ down)) < least:
            best, least = (down, up), now
    return LayerAdapter(p.name, *(rounded(v, bits) for v in best), p.kernel)  # type: ignore[misc]


def factors_of_kinds(
    setting: Setting, quantized: nn.Module, base: list[LayerProblem]
) -> dict[str, float]:
    """Measured over predicted error with one kind of layer quantized, as fitting/bits has it."""
    kinds: dict[str, list[LayerProblem]] = {}
    for p in base:
        kinds.setdefault(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", p.name), []).append(p)
    run = setting.run(quantized, 4, 2)
    held_out, full = FinalSamples(run), denoiser_of(setting.pipe)
    found = {}
    for some_problems in kinds.values():
        module = copy.deepcopy(full)
        for p in some_problems:
            module.set_submodule(p.name, quantized.get_submodule(p.name))
        measured = float(held_out.errors_of(module, range(4)).mean())
        predicted = sum(p.metric.error(p.change) for p in some_problems)
        found |= {p.name: measured / predicted for p in some_problems}
    return found


def forms(twin: str, pairs: int) -> list[dict[str, Any]]:
    """Every form of the metric, and other factors."""
    setting = Setting(twin, pairs)
    quantized, _ = quantize_module(denoiser_of(setting.pipe), QuantizerSpec.parse("w4a16-g32"))
    places, rows, weights = rows_of_all(setting.run(quantized))
    budget = int(BUDGET * stored_size(quantized))

    def problems(form: str = "") -> list[LayerProblem]:
        return [problem(n, places[n], *xg, weights, form) for n, xg in rows.items()]

    base = problems()
    ranks, kfac = shared_out(base, 4, budget)
    arms: dict[str, tuple[list[LayerAdapter], float | None]] = {}
    arms["K-FAC (as fitted)"] = (kfac.layers, kfac.predicted)
    for form in (
        *("S weighted like G", "gradients summed over steps"),
        *("gradients of 8 prompts", "local"),
    ):
        _, found = shared_out(problems(form), 4, budget)
        arms[form] = (found.layers, found.predicted)
    arms["ALS on the sum over steps"] = (
        [alternating(p, *rows[p.name], weights, r, 4) for p in base if (r := ranks[p.name])],
        None,
    )
    measured = factors_of_kinds(setting, quantized, base)
    _, found = shared_out(base, 4, budget, lambda n: measured[n])
    arms["a factor per kind of layer"] = (found.layers, found.predicted)
    _, found = shared_out(base, 3, budget)
    arms["3 bits"] = (found.layers, found.predicted)
    for bits in (3, 4):
        with coarse_scales():
            _, found = shared_out(base, bits, budget, scale_bytes=1)
        arms[f"{bits} bits, scales of 8 bits"] = (found.layers, found.predicted)
    known, factors.BITS = factors.BITS, (2, *factors.BITS)
    _, found = shared_out(base, 2, budget)
    factors.BITS = known
    arms["2 bits"] = (found.layers, found.predicted)
    held_out = setting.measured(quantized)
    gains = {name: held_out.gains(setting.over, layers) for name, (layers, _) in arms.items()}
    return rows_from(gains, {name: predicted for name, (_, predicted) in arms.items()})


@contextmanager
def coarse_scales() -> Iterator[None]:
    """Scales with 3 bits of mantissa: 5 bits of exponent beside them, no sign."""
    before = factors._scale

    def short(values: Tensor, bits: int) -> Tensor:
        del bits
        mantissa, exponent = torch.frexp(values)
        return torch.ldexp((mantissa * 16).round() / 16, exponent).half()

    factors._scale = short
    try:
        yield
    finally:
        factors._scale = before


# ---- branches, and other quantizers


def branches(spec: str, pairs: int) -> list[dict[str, Any]]:
    """The refit of branches, the adapters' engine in their place, and the floor."""
    setting = Setting("pixart-sigma", pairs)
    full = denoiser_of(setting.pipe)
    quantized, _ = quantize_module(full, QuantizerSpec.parse(spec))
    held_out = setting.measured(quantized)
    gains = {}
    for metric in (None, "output", "local"):
        label = f"refit_branches{f', metric {metric}' if metric else ''}"
        refitted, _ = evenkeel.refit_branches(
            setting.pipe,
            quantized=quantized,
            prompts=setting.kind.prompts(2 * FIT, 0),
            num_inference_steps=setting.steps,
            metric=metric,
            progress=False,
            **setting.asked,
        )
        gains[label] = held_out.gains_of(refitted, setting.over)
        if metric != "local":
            adapters, _ = setting.fit(refitted, budget=BUDGET)
            beside = FinalSamples(setting.run(refitted, pairs, 1))
            after = beside.gains(setting.over, adapters.layers)
            gains[f"{label}, adapters beside it, +11 %"] = gains[label] + after
    stripped = copy.deepcopy(quantized)
    for layer in stripped.modules():
        if isinstance(down := getattr(layer, "down", None), Tensor) and len(down):
            layer.down = torch.zeros_like(down)
    beside = FinalSamples(setting.run(stripped, pairs, 1))
    for metric in ("output", "local"):
        adapters, _ = setting.fit(stripped, rank=16, bits=16, metric=metric)
        before = gain(held_out.before(setting.over), beside.before(setting.over))
        found = before + beside.gains(setting.over, adapters.layers)
        gains[f"rows of the network without its branches, metric {metric}"] = found
    bits = re.sub(r"^w\d", "w8", spec)
    floor, _ = quantize_module(full, QuantizerSpec.parse(bits))
    gains[f"weights of 8 bits ({bits})"] = held_out.gains_of(floor, setting.over)
    return rows_from(gains, {})


def after(name: str, pairs: int) -> list[dict[str, Any]]:
    """What adapters add to another quantizer."""
    setting = Setting("pixart-sigma", pairs)
    quantized, _ = quantize(
        setting.pipe,
        method_from(AFTER[name]),
        prompts=setting.kind.prompts(2 * FIT, 0),
        num_inference_steps=setting.steps,
        guidance_scale=setting.twin.guidance_scale,
        progress=False,
    )
    adapters, report = setting.fit(quantized, budget=BUDGET)
    held_out = setting.measured(quantized)
    kept = report.candidates[report.chosen]
    label = f"{kept.metric}, {kept.bits} bits" if adapters.layers else "nothing confirmed"
    error = 10 * float(held_out.before(setting.over).log10().mean())
    found = rows_from(
        {label: held_out.gains(setting.over, adapters.layers)}, {label: kept.predicted}
    )
    return [{**row, "error_db": error} for row in found]


def rows_from(
    gains: Mapping[str, Tensor], predicted: Mapping[str, float | None]
) -> list[dict[str, Any]]:
    """Numbers of every arm."""
    first = next(iter(gains.values()))

    def said(values: Tensor) -> list[float]:
        error = values.std() / len(values) ** 0.5
        return [round(float(v), 3) for v in (values.mean(), error)]

    return [
        {"arm": n, "gain": said(g), "to_first": said(g - first), "predicted": predicted.get(n)}
        for n, g in gains.items()
    ]


CELLS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "forms-pixart-sigma": lambda: forms("pixart-sigma", 32),
    "forms-sd-v2.1": lambda: forms("sd-v2.1", 32),
    **{f"branches-{s}": lambda s=s: branches(f"{s}-g32-r16", 32) for s in ("w3a4", "w4a4")},
    **{f"after-{n}": lambda n=n: after(n, 32) for n in AFTER},
}


def table() -> str:
    """ADAPTERS_FORMS.md."""
    lines = ["# Forms of recovery adapters", "", *(__doc__ or "").splitlines()[2:], ""]
    missing = [c for c in CELLS if not (RESULTS / f"{c}.json").exists()]
    if missing:
        lines += [f"Not run yet: {', '.join(missing)}.", ""]
    lines.append(
        "| cell | arm | predicted, dB | measured, dB (standard error) | against the first arm |"
    )
    lines.append("|---|---|---|---|---|")
    for cell in CELLS:
        place = RESULTS / f"{cell}.json"
        for row in json.loads(place.read_text()) if place.exists() else ():
            p = row["predicted"]
            promised = "" if p is None else f"{-10 * torch.tensor(p).log10():+.2f}"
            gain, against = (f"{m:+.2f} ({s:.2f})" for m, s in (row["gain"], row["to_first"]))
            lines.append(f"| {cell} | {row['arm']} | {promised} | {gain} | {against} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cells", nargs="*", default=list(CELLS), metavar="CELL")
    options = parser.parse_args()
    for cell in options.cells:
        place = RESULTS / f"{cell}.json"
        if not place.exists():
            try:
                found = CELLS[cell]()
            except EvenkeelError as e:
                print(f"{cell}: {e}", flush=True)
                continue
            write_atomically(place, json.dumps(found) + "\n")
        write_atomically(HERE / "ADAPTERS_FORMS.md", table())


if __name__ == "__main__":
    main()
