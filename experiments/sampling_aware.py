"""Sampling-aware quantization, reconstructed, against the control that its paper lacks.

Frozen: each twin with its original's steps and guidance; 32 prompts (seed 0) to train and calibrate on,
images of others (seed 1), the same noise in every arm. "20 steps" are 20 intervals: 20 evaluations of
DPM-Solver-1 and 40 of DPM-Solver-2; the other reading has a cell of its own. In a cell all trained arms make
as many optimizer steps; their start is `quantized`, the same layers before training. `same-state` is
ordinary distillation on calls of both solvers, as many of them. Every arm is kept by held-out final samples
of the solver that it is for, never by its loss. Intervals are paired, of 95 %; distances are to the
full-precision images of the same solver.

Every cell is a file in experiments/sampling_aware/, every trained denoiser a folder in --work; the command
resumes, and measures again what is trained already.

    python experiments/sampling_aware.py [CELL ...] [--steps N] [--iterations N] [--images N] [--made]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sampling_aware_table import table
from torch import nn

import evenkeel
from evenkeel import zoo
from evenkeel.comparing.comparison import Arm, Comparison, compare, standard_arms
from evenkeel.corrections.base import Correction
from evenkeel.corrections.catalogue import applicable, available
from evenkeel.fitting.mixed_order.evaluations import mixed_order_runs
from evenkeel.fitting.quantize import quantize
from evenkeel.hosts.run import Run
from evenkeel.metrics import frechet_difference, mean_difference, per_image_psnr
from evenkeel.quantizers import METHODS, load_quantized
from evenkeel.storage import write_atomically
from evenkeel.zoo.pictures import KINDS

HERE = Path(__file__).parent
RESULTS = HERE / "sampling_aware"
PROMPTS = 32
DEPLOYED = 0  # stands for the cell's own number of steps
# Of all trained arms. EfficientDM's own are for 16,000 steps; in a tenth of them they move nothing but ranges
# of inputs. Found with EfficientDM on ldm-4 W4A4, DDIM and 400 steps, among 1 / 2500, 1 / 250, 1 / 80, 1 / 25
# and 0, 5e-5, 1e-4, 5e-4.
RATES = {"adapter_rate": 1 / 80, "activation_rate": 1e-4}
PUBLISHED = {"adapter_rate": 1 / 2500, "activation_rate": 5e-4}
START = "quantized"
# On top of a denoiser ("same-state + adapters"), made for one solver each. Of corrections the authors' forms.
FITTED: dict[str, Callable[..., Any]] = {
    "adapters": lambda pipe, **asked: evenkeel.fit_adapters(pipe, **asked)[0],
    "trained adapters": lambda pipe, **asked: evenkeel.train_adapters(pipe, **asked)[0],
    "readout": lambda pipe, **asked: evenkeel.fit_readout(pipe, **asked),
}
CORRECTIONS = (
    *(f"{name}:published" for name in ("q-drift", "ptqd", "d2-dpm", "dcnc")),
    "exact-drift", "tac", "stepbaq",
)  # fmt: skip


@dataclass(frozen=True)
class Way:
    """How one arm is made: a method of the catalogue, its options, and the solver that it is for."""

    method: str
    options: Mapping[str, Any]
    order: int = 2


@dataclass(frozen=True)
class Cell:
    """A twin, bits, and arms; ``share`` is this cell's part of the optimizer steps.

    ``steps``: of the original; ``counted``: what they count. ``rivals``: to whom the other arms' paired
    differences are taken, besides those to the start.
    """

    twin: str
    bits: str
    ways: tuple[str, ...]
    steps: int = 20
    counted: str = "intervals"
    share: float = 1.0
    seed: int = 0
    solvers: tuple[str, ...] = ("dpm-solver-2", "dpm-solver-1")
    rivals: tuple[str, ...] = ("efficientdm", "same-state")


def trained(method: str, order: int = 2, **options: Any) -> Way:
    return Way(method, options, order)


HERE_STEPS: dict[str, Any] = {"steps": (DEPLOYED,)}
TEACHER = {
    "sa-qlora": trained("sa-qlora", **HERE_STEPS),
    "same-state": trained("sa-qlora", teacher="same-state", **HERE_STEPS),
    "midpoint": trained("sa-qlora", 1, teacher="midpoint", **HERE_STEPS),
}
WAYS = {
    START: trained("efficientdm", optimizer_steps=0, **HERE_STEPS),
    "efficientdm": trained("efficientdm", **HERE_STEPS),
    **TEACHER,
    "sa-qlora, no cosine": trained("sa-qlora", cosine=0.0, **HERE_STEPS),
    "same-state, no cosine": trained("sa-qlora", teacher="same-state", cosine=0.0, **HERE_STEPS),
    "sa-qlora, at the end": trained("sa-qlora", pair_at="end", **HERE_STEPS),
    "sa-qlora, own list": trained("sa-qlora"),
    "sa-qlora, 100 50 20": trained("sa-qlora", steps=(100, 50, 20)),
    "efficientdm, 100 steps": trained("efficientdm"),
    "efficientdm, original weight": trained("efficientdm", base="original", **HERE_STEPS),
    "ours, merged": trained("efficientdm", advance="student", weighting="step-law", **HERE_STEPS),
    "q-diffusion": Way("q-diffusion", {}),
    "brecq": Way("sa-ptq", {"alignment": "none"}),
    "sa-ptq": Way("sa-ptq", {}),
    "sa-ptq, same-state": Way("sa-ptq", {"teacher": "same-state"}),
    "sa-ptq, midpoint": Way("sa-ptq", {"teacher": "midpoint"}, 1),
}
ON_TOP = tuple(
    f"same-state + {what}" for what in (*FITTED, *CORRECTIONS) if what != "trained adapters"
)
MAIN = (START, "efficientdm", *TEACHER)
PTQ = (
    START,
    "q-diffusion",
    "brecq",
    "brecq + ptqd:published",
    "sa-ptq",
    "sa-ptq, same-state",
    "sa-ptq, midpoint",
)
PARTS = ("no cosine", "at the end", "own list", "100 50 20")
CELLS = {
    "ldm-4-w4a4": Cell(
        "ldm-4", "w4a4",
        (*MAIN, "ours, merged", "quantized + adapters", "quantized + trained adapters",
         "sa-qlora + adapters", *ON_TOP),
    ),
    "ldm-4-w4a8": Cell("ldm-4", "w4a8", MAIN, share=0.5),
    "ldm-4-w8a8": Cell("ldm-4", "w8a8", PTQ, rivals=("brecq + ptqd:published", "sa-ptq, same-state")),
    "ldm-4-w4a4-parts": Cell(
        "ldm-4", "w4a4",
        (*MAIN, *(f"sa-qlora, {p}" for p in PARTS), "same-state, no cosine", "efficientdm, original weight",
         "efficientdm, 100 steps"),
        share=0.5, rivals=("sa-qlora", "same-state"),
    ),
    "sd-v1.4-w4a4": Cell("sd-v1.4", "w4a4", MAIN[:-1], 50, share=0.5, solvers=("plms",)),
    "ldm-8-w4a4": Cell("ldm-8", "w4a4", MAIN, 50, share=0.5),
    "ldm-4-w4a4-evaluations": Cell("ldm-4", "w4a4", MAIN, counted="evaluations", share=0.5),
    "ldm-8-w8a8": Cell("ldm-8", "w8a8", PTQ, 50, rivals=("brecq + ptqd:published", "sa-ptq, same-state")),
    "ldm-4-w4a4-published": Cell(
        "ldm-4", "w4a4", (START, "sa-qlora", "same-state", "efficientdm"), share=10.0
    ),
    **{f"ldm-4-w4a4-seed-{s}": Cell("ldm-4", "w4a4", MAIN[:-1], seed=s) for s in (1, 2)},
}  # fmt: skip


@dataclass
class Job:
    """One cell while it is measured."""

    name: str
    cell: Cell
    options: argparse.Namespace

    @property
    def twin(self) -> Any:
        """Of the zoo."""
        return zoo.twin(self.cell.twin)

    @property
    def optimizer_steps(self) -> int:
        """Of every trained arm."""
        return max(1, round(self.options.steps * self.cell.share))

    @property
    def folder(self) -> Path:
        """Of models and images."""
        work: Path = self.options.work
        return work / f"{self.name}-{self.optimizer_steps}-{self.options.iterations}"

    def solver(self, order: int) -> str:
        """The cell's sampler of that order, or its only one."""
        return self.cell.solvers[min(2 - order, len(self.cell.solvers) - 1)]

    def steps(self, solver: str) -> int:
        """As the pipeline counts them: a second-order step has two evaluations."""
        intervals = self.cell.steps // (2 if self.cell.counted == "evaluations" else 1)
        return 2 * intervals if solver == "dpm-solver-2" else intervals

    def run(self, solver: str, quantized: nn.Module | None = None) -> Run:
        """The prompts of training, with this solver as deployed."""
        prompts = KINDS[self.twin.pictures].prompts(PROMPTS, 0)
        return Run(
            zoo.load(self.cell.twin, solver), prompts, self.steps(solver),
            guidance_scale=self.twin.guidance_scale, batch_size=8, quantized=quantized,
        )  # fmt: skip

    @property
    def ways(self) -> list[str]:
        """The arms; with --made those whose denoisers are there."""
        if not self.options.made:
            return list(self.cell.ways)
        made = {n for n in self.cell.ways if (self.place(n) / "quantized.json").is_file()}
        return [n for n in self.cell.ways if n in made]

    def place(self, name: str) -> Path:
        """The folder of an arm's denoiser."""
        return self.folder / _slug(name.split(" + ")[0]) / "model"

    def made(self, name: str) -> nn.Module:
        """The denoiser of an arm: trained, or found in its folder."""
        way, place = WAYS[name], self.place(name)
        solver = self.solver(way.order)
        if not (place / "quantized.json").is_file():
            run = self.run(solver)
            quantize(
                run.pipeline,
                self.method(way, solver),
                prompts=run.prompts.values,
                num_inference_steps=run.num_inference_steps,
                guidance_scale=run.guidance_scale,
                batch_size=run.batch_size,
                out=place,
            )
        quantized, report = load_quantized(place)
        print(name, report, flush=True)
        return quantized

    def method(self, way: Way, solver: str) -> Any:
        """With this cell's bits, seed and length of training."""
        given = {"seed": self.cell.seed, **way.options}
        if way.method in ("sa-ptq", "q-diffusion"):
            given |= {"iterations": self.options.iterations, "rounding_rate": self.rounding_rate}
            if way.method == "q-diffusion":
                given["activation_iterations"] = self.options.iterations // 4
        else:
            rates = PUBLISHED if self.optimizer_steps >= 16_000 else RATES
            given = {"optimizer_steps": self.optimizer_steps, **rates, **given}
            if "steps" in given:
                given["steps"] = tuple(
                    self.cell.steps if n == DEPLOYED else n for n in given["steps"]
                )
        aligned = way.method == "sa-qlora" or (
            way.method == "sa-ptq" and given.get("alignment") != "none"
        )
        if solver == "dpm-solver-2":  # whose number of steps counts evaluations, two in an interval
            if aligned:
                given["counted"] = "evaluations"
            if "steps" in given:
                given["steps"] = tuple(
                    self.steps(solver) * n // self.cell.steps for n in given["steps"]
                )
        return METHODS[way.method].of_bits(self.cell.bits, **given)

    @property
    def rounding_rate(self) -> float:
        """What a rounding can reach is rate times iterations: that of 10,000 at 1e-3."""
        return max(1e-3, 10.0 / max(self.options.iterations, 1))

    def on_top(self, name: str, quantized: nn.Module, solver: str) -> Correction | None:
        """Fitted with the prompts of training; None where it does not apply or nothing was confirmed."""
        base, what = name.split(" + ")
        run = self.run(solver)
        asked: dict[str, Any] = {
            "quantized": quantized,
            "prompts": run.prompts.values,
            "num_inference_steps": run.num_inference_steps,
            "guidance_scale": run.guidance_scale,
        }
        if what not in FITTED:
            place = self.folder / _slug(base) / f"record-{solver}.safetensors"
            if not place.is_file():
                evenkeel.calibrate(run.pipeline, closed_loop=True, **asked).save(place)
            record = evenkeel.Record.load(place)
            assert record.law is not None
            made = available(record.evidence, record.closed_loop.corrections, forms=True)[0]
            found, reasons = applicable(made, record.law)
            if what not in found:
                print(name, solver, reasons.get(what), flush=True)
            return found.get(what)
        place = self.folder / _slug(name) / f"{solver}.safetensors"
        if not place.is_file():
            if what.endswith("adapters"):
                asked["budget"] = self.options.budget
            if what == "trained adapters":
                asked |= {"optimizer_steps": self.optimizer_steps, "seed": 1000 + self.cell.seed}
            place.parent.mkdir(parents=True, exist_ok=True)
            evenkeel.save(FITTED[what](run.pipeline, **asked), place)
        correction: Any = evenkeel.load(place)
        nothing = what.endswith("adapters") and not correction.layers
        return None if nothing else correction

    def arms(self, solver: str, denoisers: Mapping[str, nn.Module]) -> list[Arm]:
        """Full precision, the start, and the others in the cell's order."""
        arms = standard_arms(self.run(solver).pipeline, denoisers[START], {})
        for name in self.ways[1:]:
            base = name.split(" + ")[0]
            correction = None if name == base else self.on_top(name, denoisers[base], solver)
            if name == base or correction is not None:
                arms.append(Arm(name, denoisers[base], correction))
        return arms

    def measured(self) -> Iterator[dict[str, Any]]:
        """Every arm with every solver of the cell; what there is after each solver."""
        denoisers = {n: self.made(n) for n in self.ways if " + " not in n}
        kind = KINDS[self.twin.pictures]
        evaluator = kind.evaluator(zoo.path_of(self.cell.twin))
        solvers: dict[str, Any] = {}
        floor = self.floor()
        for solver in self.cell.solvers:
            run, arms = self.run(solver), self.arms(solver, denoisers)
            comparison = compare(
                run.pipeline,
                arms,
                prompts=kind.prompts(self.options.images, 1),
                num_inference_steps=run.num_inference_steps,
                evaluator=evaluator,
                folder=self.folder / "images" / solver,
                guidance_scale=run.guidance_scale,
                batch_size=50,
            )
            solvers[solver] = {
                "steps": run.num_inference_steps,
                "arms": [arm.as_dict() for arm in comparison.arms],
                "differences": differences(comparison, evaluator, self.cell.rivals),
            }
            yield {
                "twin": self.cell.twin,
                "bits": self.cell.bits,
                "seed": self.cell.seed,
                "counted": self.cell.counted,
                "optimizer_steps": self.optimizer_steps,
                "iterations": self.options.iterations,
                "images": self.options.images,
                "ways": self.ways,
                "complete": len(solvers) == len(self.cell.solvers),
                "floor": floor,
                "solvers": solvers,
            }

    def floor(self) -> dict[str, float]:
        """What full precision itself pays for the alignment, over the size of its output."""
        run = self.run(self.solver(2))
        intervals = self.steps(self.solver(1))
        with run.undisturbed():
            runs = mixed_order_runs(run, run.batches()[0], intervals)
        size = torch.stack([e.output.double().square().mean() for e in runs.first])
        relative = runs.floor / size
        return {"mean": float(relative.mean()), "last": float(relative[-1])}


def differences(
    comparison: Comparison, evaluator: Any, rivals: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
    """Every arm minus each rival, paired: PSNR in dB, and distance to full precision."""
    images = {n: x.float() / 255 for n, x in comparison.images.items()}
    names = list(images)
    full = images[names[0]]
    with torch.no_grad():
        features = {
            n: torch.cat([evaluator.features(p) for p in x.split(256)]) for n, x in images.items()
        }
    psnr = {n: per_image_psnr(x, full) for n, x in images.items()}
    found: dict[str, dict[str, Any]] = {}
    for rival in (r for r in rivals if r in names):
        for name in names[1:]:
            if name == rival:
                continue
            distance = frechet_difference(
                features[name], features[rival], features[names[0]], paired_reference=True
            )
            found.setdefault(name, {})[rival] = {
                "psnr": mean_difference(psnr[name], psnr[rival]).as_dict(),
                "frechet": distance.as_dict(),
            }
    return found


def _slug(name: str) -> str:
    return name.replace(", ", "-").replace(" + ", "-").replace(" ", "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cells", nargs="*", default=list(CELLS), metavar="CELL")
    parser.add_argument("--steps", type=int, default=1600, help="optimizer steps of the main cell")
    parser.add_argument("--iterations", type=int, default=1000, help="of AdaRound, per block")
    parser.add_argument("--images", type=int, default=200, help="per arm")
    parser.add_argument("--budget", type=float, default=0.11, help="bytes of ours beside the start")
    parser.add_argument("--work", type=Path, default=Path("runs/experiments/sampling_aware"))
    parser.add_argument("--made", action="store_true", help="train nothing, measure what is there")
    options = parser.parse_args()
    for name in options.cells:
        job, place = Job(name, CELLS[name], options), RESULTS / f"{name}.json"
        asked = {
            "optimizer_steps": job.optimizer_steps,
            "iterations": options.iterations,
            "images": options.images,
            "ways": job.ways,
            "complete": True,
        }
        if START not in job.ways:
            print(f"{name}: nothing is trained yet", flush=True)
            continue
        known = json.loads(place.read_text()) if place.exists() else {}
        if any(known.get(k) != v for k, v in asked.items()):
            for found in job.measured():
                write_atomically(place, json.dumps(found, separators=(",", ":")) + "\n")
                write_atomically(
                    HERE / "SAMPLING_AWARE.md", table(RESULTS, list(CELLS), __doc__ or "")
                )


if __name__ == "__main__":
    main()
