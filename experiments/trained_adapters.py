"""Recovery adapters trained on the output's error: from where, with which loss, for how long.

Frozen: embedded pipeline, its own sampler, 20 steps and guidance 4.5; adapters for 11 % more bytes of the
quantized denoiser, 4 bits; 32 prompts (seed 0) to fit and train on, of which the last quarter keeps or gives
back what was trained; 64 pairs of other prompts and noise (seed 1) to measure on. All arms have the same
layers, ranks and bytes. A number of optimizer steps is the same number of denoiser calls in each.

    closed form          `fit_adapters`, nothing trained
    START, LOSS, RUN, N  `train_adapters`, N optimizer steps from the closed form or from adapters that add
                         nothing; each step's error weighted by the step law or evenly; runs that go on with
                         the trained denoiser's output (closed loop) or with full precision's

An arm that held-out pairs did not confirm is its start; the last column says what they said of the best state
on the way.

Every arm is a file in experiments/trained_adapters/; the command resumes.

    python experiments/trained_adapters.py [WEIGHTS ...]     # default: all; writes TRAINED_ADAPTERS.md
"""

from __future__ import annotations

import argparse
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from measured_cells import Cells, finish, known, not_run

import evenkeel
from evenkeel import zoo
from evenkeel.fitting.adapters.final_samples import FinalSamples
from evenkeel.hosts.run import Run
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.statistics.student import mean_and_bound
from evenkeel.storage import write_atomically
from evenkeel.zoo.pictures import KINDS

HERE = Path(__file__).parent
RESULTS = HERE / "trained_adapters"
TWIN, PROMPTS, PAIRS, BUDGET = "pixart-sigma", 32, 64, 0.11
WEIGHTS = ("w3a16-g32", "w4a8-g32", "w4a4-g32")
CLOSED = "closed form"
ARMS: dict[str, dict[str, Any]] = {
    CLOSED: {},
    "closed form, step law, closed loop, 400": {},
    "zero, step law, closed loop, 400": {"start": "zero"},
    "closed form, even, closed loop, 400": {"weighting": "even"},
    "closed form, step law, full precision, 400": {"closed_loop": False},
    "closed form, step law, closed loop, 1600": {},
    "zero, step law, closed loop, 1600": {"start": "zero"},
    "closed form, step law, closed loop, 100": {},
}


class Setting:
    """The pipeline with weights of one kind, and its pairs to measure on."""

    def __init__(self, weights: str) -> None:
        twin, self.pipe = zoo.twin(TWIN), zoo.load(TWIN)
        self.quantized, _ = quantize_module(self.pipe.transformer, QuantizerSpec.parse(weights))
        self.kind, self.steps = KINDS[twin.pictures], twin.num_inference_steps
        self.guidance_scale = twin.guidance_scale
        run = Run(
            self.pipe, self.kind.prompts(PAIRS, 1), self.steps,
            guidance_scale=self.guidance_scale, seed=1000, batch_size=16, quantized=self.quantized,
        )  # fmt: skip
        self.measured = FinalSamples(run)

    def measure(self, arm: str) -> dict[str, Any]:
        """What the arm's adapters bring, pair by pair, and what the training said of itself."""
        asked: dict[str, Any] = {
            "quantized": self.quantized,
            "prompts": self.kind.prompts(PROMPTS, 0),
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "budget": BUDGET,
            "bits": 4,
            "progress": False,
        }
        if arm == CLOSED:
            adapters, report = evenkeel.fit_adapters(self.pipe, **asked)
        else:
            steps = int(arm.rsplit(", ", 1)[1])
            adapters, report = evenkeel.train_adapters(
                self.pipe, optimizer_steps=steps, **asked, **ARMS[arm]
            )
        gains = self.measured.gains(range(PAIRS), adapters.layers)
        return {"gains": gains.tolist(), "report": report.as_dict(), "text": report.text()}


def said(gains: torch.Tensor) -> str:
    """Mean with its 95 % interval."""
    mean, low = mean_and_bound(gains, 0.975)
    return f"{mean:+.2f} [{low:+.2f}, {2 * mean - low:+.2f}]"


def table(cells: dict[str, Cells]) -> str:
    """TRAINED_ADAPTERS.md."""
    lines = ["# Trained recovery adapters", "", *(__doc__ or "").splitlines()[2:], ""]
    lines += not_run(cells, {weights: of for weights, of in cells.items() if of})
    for weights, of in cells.items():
        if not of:
            continue
        missing = [f"*{arm}*" for arm in ARMS if arm not in of]
        lines += [
            f"## {weights}",
            "",
            *([f"Not run yet: {'; '.join(missing)}.", ""] if missing else []),
        ]
        lines += ["| arm | dB [95 %] | to the closed form | held-out pairs |", "|---|---|---|---|"]
        gains = {arm: torch.tensor(cell["gains"]).double() for arm, cell in of.items()}
        for arm, cell in of.items():
            against = said(gains[arm] - gains[CLOSED]) if arm != CLOSED and CLOSED in gains else ""
            lines.append(f"| {arm} | {said(gains[arm])} | {against} | {kept(cell['report'])} |")
        lines.append("")
    return "\n".join(lines)


def kept(report: dict[str, Any]) -> str:
    """Whether the training was."""
    if "chosen" not in report or "candidates" in report:
        return ""
    word = "kept" if report["confirmed"] else "given back"
    return f"{report['gain']:+.2f} over the start (bound {report['bound']:+.2f}): {word}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("weights", nargs="*", default=list(WEIGHTS), metavar="WEIGHTS")
    options = parser.parse_args()
    for weights in options.weights:
        setting = cache(partial(Setting, weights))
        finish(
            ARMS,
            RESULTS / weights,
            lambda arm, setting=setting: setting().measure(arm),
            lambda: write_atomically(
                HERE / "TRAINED_ADAPTERS.md",
                table({w: known(RESULTS / w, ARMS) for w in WEIGHTS}),
            ),
        )


if __name__ == "__main__":
    main()
