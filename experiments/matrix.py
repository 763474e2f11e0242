"""Every twin at W4A8 and W3A4 under two dozen corrections: what helps where.

Frozen: each pipeline with its original's sampler, steps and guidance; plain rounding in groups of 32;
calibrated on 32 prompts (seed 0); images of other prompts (seed 1), the same noise in every arm. Each cell
is a file in matrix/, written when done: the command resumes, and measures an arm that was added since in
the cells that lack it, paired with a quantized arm of its own run (on another machine that one differs by up
to 0.3 dB at W3A4). Then writes MATRIX.md, the table of docs/choosing-a-correction.md, and what
`evenkeel recommend` reads.

    python experiments/matrix.py [CELL ...] [--images 100]     # default: all
    python experiments/matrix.py --table                       # from the results on disk
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from measured_cells import Cells, finish, known, not_run

from evenkeel import zoo
from evenkeel.comparing.comparison import Arm, compare, standard_arms
from evenkeel.errors import EvenkeelError
from evenkeel.fitting import refit_branches
from evenkeel.hosts.pipeline.pipelines import denoiser_of
from evenkeel.hosts.run import Run
from evenkeel.metrics.state_scores import input_bias_gain
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.reproduction.arms import Makers
from evenkeel.reproduction.recommend import MATRIX, Case, expected, features_of, hit_rates
from evenkeel.zoo.pictures import KINDS

HERE = Path(__file__).parent
CHOOSING = HERE.parent / "docs" / "choosing-a-correction.md"
MARKS = "<!-- experiments/matrix.py writes from here -->\n", "<!-- to here -->\n"
RESULTS = HERE / "matrix"
TWINS = (
    "flux-schnell",
    "sdxl-turbo",
    "ldm-8",
    "flux-dev",
    "pixart-sigma",
    "sana",
    "dit-xl",
    "ldm-4",
    "sdxl",
    "sd-v1.4",
    "sd-v2.1",
)
SPECS = ("w3a4-g32", "w4a8-g32")
EVIDENCE = (
    "q-drift:published",
    "q-drift",
    "exact-drift",
    "d2-dpm:published",
    "d2-dpm",
    "ptqd:published",
    "ptqd",
    "cnc:published",
    "cnc",
    "dns:published",
    "dns",
    "dcnc+dns:published",
    "dcnc+dns",
    "self-consistent",
    "tcec",
    "epsilon-scaling",
    "tsr",
)
TACS = (
    "tac:published",
    "tac-unconditional:published",
    "tac-least-squares",
    "tac",
    "tac-ibc",
    "tac-ibc-channel",
)
REFIT = "refit"
FITTED = (*TACS, "readout", REFIT, "adapters")
ARMS = (*EVIDENCE, *FITTED)
FEW = 8  # steps
SAME = 0.5  # dB; where inputs are rounded, another machine's last digits become tenths
PROMPTS = 32  # of the calibration
SAMPLER_SIDE = (*EVIDENCE, *TACS)
CELLS = {f"{twin} {spec}": (twin, spec) for spec in SPECS for twin in TWINS}
KEYS = ("psnr", "frechet_full_precision", "perceptual", "contrast")


def missing(name: str) -> list[str]:
    """Arms that a cell's result says nothing of."""
    found = known(RESULTS, [name]).get(name, {"changes": {}, "refused": {}})
    return [arm for arm in ARMS if arm not in found["changes"] and arm not in found["refused"]]


def measure(name: str, images: int, work: Path) -> dict[str, Any]:
    """A cell; of one that is known the missing arms, with as many images as the others had."""
    twin, spec = CELLS[name]
    before = known(RESULTS, [name]).get(name)
    images = before["images"] if before else images
    entry, kind = zoo.twin(twin), KINDS[zoo.twin(twin).pictures]
    pipeline = zoo.load(twin)
    denoiser = denoiser_of(pipeline)
    quantized, _ = quantize_module(denoiser, QuantizerSpec.parse(spec))
    settings = {
        "num_inference_steps": entry.num_inference_steps,
        "guidance_scale": entry.guidance_scale,
    }
    fitted_on = kind.prompts(PROMPTS, 0)
    asked = Run(pipeline, fitted_on, batch_size=PROMPTS, quantized=quantized, **settings)
    makers, arms, refused = Makers(asked), standard_arms(pipeline, quantized, {}), {}
    for arm in missing(name):
        try:
            if arm == REFIT:
                refitted, _ = refit_branches(
                    pipeline,
                    quantized=quantized,
                    prompts=fitted_on,
                    batch_size=PROMPTS,
                    progress=False,
                    **settings,
                )
                arms.append(Arm(arm, refitted))
            else:
                arms.append(Arm(arm, quantized, makers.make(arm)))
        except EvenkeelError as error:
            refused[arm] = str(error)
    prompts = kind.prompts(images, 1)
    found = compare(
        pipeline,
        arms,
        prompts=prompts,
        batch_size=50,
        evaluator=kind.evaluator(zoo.path_of(twin)),
        folder=work / name.replace(" ", "-"),
        more=True,
        progress=False,
        **settings,
    )
    shutil.rmtree(work / name.replace(" ", "-"), ignore_errors=True)
    plain = {k: found["quantized"].measures[k].value for k in KEYS}
    changes = {
        arm.name: {
            k: [change.value, change.stderr, change.low, change.high]
            for k, change in arm.difference_to_quantized.items()
            if k in KEYS
        }
        for arm in found.arms[2:]
    }
    if before is None:
        return {
            "twin": twin,
            "quantizer": spec,
            "images": images,
            "features": features_of(makers.record),
            "shared": makers.shared.as_dict(),
            "quantized": plain,
            "refused": refused,
            "changes": changes,
        }
    if abs(plain["psnr"] - before["quantized"]["psnr"]) > SAME:
        raise EvenkeelError(
            f"{name}: the plain quantized arm has {plain['psnr']:.3f} dB, {before['quantized']['psnr']:.3f} "
            f"when the other arms were measured; delete its file in {RESULTS} to measure all again."
        )
    return before | {
        "refused": before["refused"] | refused,
        "changes": before["changes"] | changes,
    }


def publish() -> None:
    cells = known(RESULTS, CELLS)
    cases = [
        {
            "twin": c["twin"],
            "quantizer": c["quantizer"],
            "features": {k: round(v, 4) for k, v in c["features"].items()},
            "gains": {
                arm: [round(v, 4) for v in change["psnr"][:2]]
                for arm, change in c["changes"].items()
                if "psnr" in change
            },
            "input_bias": round(input_bias_gain(c["shared"]["value"], PROMPTS), 4),
        }
        for c in cells.values()
    ]
    MATRIX.write_text(json.dumps(cases, separators=(",", ":")) + "\n")
    (HERE / "MATRIX.md").write_text(table(cells, cases))
    before, rest = CHOOSING.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    CHOOSING.write_text(before + MARKS[0] + by_correction(cells) + MARKS[1] + after)


def by_correction(cells: Cells) -> str:
    """What each correction did, by weights and steps: mean and range, and how many changes are sure."""
    groups = {
        f"{spec.split('-')[0].upper()}, {steps}": [
            c
            for c in cells.values()
            if c["quantizer"] == spec
            and (zoo.twin(c["twin"]).num_inference_steps <= FEW) == (steps == "few steps")
        ]
        for spec in SPECS
        for steps in ("few steps", "many")
    }
    groups = {name: found for name, found in groups.items() if found}
    heads = [f"{name} ({len(found)})" for name, found in groups.items()]
    lines = [f"| correction | {' | '.join(heads)} |", f"|{'---|' * (1 + len(heads))}"]
    for arm in ARMS:
        changes = [
            [c["changes"][arm]["psnr"] for c in found if "psnr" in c["changes"].get(arm, {})]
            for found in groups.values()
        ]
        lines.append(f"| {arm} | {' | '.join(_summed(c) for c in changes)} |")
    return "\n".join(lines) + "\n"


def _summed(changes: list[list[float]]) -> str:
    if not changes:
        return "-"
    values = [c[0] for c in changes]
    helped, harmed = sum(c[2] > 0 for c in changes), sum(c[3] < 0 for c in changes)
    between = f" ({min(values):+.2f} to {max(values):+.2f})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):+.2f}{between}; {helped} up, {harmed} down"


def table(cells: Cells, cases: list[dict[str, Any]]) -> str:
    measured = [Case(**case) for case in cases]
    lines = ["# What helps where", "", *(__doc__ or "").split("\n\n")[1].splitlines(), ""]
    lines += not_run(CELLS, cells)
    lines += [
        "Change of PSNR to full precision against the plain quantized arm, dB, paired. **Bold**: its 95 % "
        "interval excludes zero. Error: that of quantization over the output, mean squares; correlation: of "
        "the error between neighbouring steps; common: its share that is the same in all prompts. Infinite: "
        "some pictures are full precision's to the bit.",
        "",
        f"| twin | weights | images | error | correlation | common | quantized | {' | '.join(ARMS)} |",
        f"|{'---|' * (7 + len(ARMS))}",
    ]
    for cell in cells.values():
        f = cell["features"]
        start = (
            f"| {cell['twin']} | {cell['quantizer']} | {cell['images']} | "
            f"{math.exp(f['relative error']):.4f} | "
            f"{f['correlation']:.2f} | {f['common']:.3f} | {cell['quantized']['psnr']:.1f} |"
        )
        lines.append(start + "".join(f" {_change(cell, arm)} |" for arm in ARMS))
    for title, allowed in (("All corrections", ARMS), ("Sampler side only", SAMPLER_SIDE)):
        if len({c.twin for c in measured}) < 2:
            continue
        lines += [
            "",
            f"## {title}: the recommendation on twins that it has not seen",
            "",
            "| rule | cells | best within 0.1 dB | mean change, dB | worst |",
            "|---|---|---|---|---|",
        ]
        rates = hit_rates(measured, allowed)
        for rate in sorted(rates, key=lambda r: -r.gain):
            lines.append(
                f"| {rate.rule} | {rate.cells} | {rate.hits} | {rate.gain:+.2f} | {rate.worst:+.2f} |"
            )
    return "\n".join([*lines, *what_the_rule_knows(measured)]) + "\n"


def what_the_rule_knows(cases: list[Case]) -> list[str]:
    """How far off the rule is on twins that it has not seen, beside the mean of the other twins' cells."""
    lines = [
        "",
        "## What a record knows beyond the mean",
        "",
        "Root mean square of what the expected change is off by, dB, each cell from the other twins' cells: "
        "by the rule of `evenkeel recommend`, which weighs them by likeness, and by their plain mean.",
        "",
        "| correction | cells | rule | mean |",
        "|---|---|---|---|",
    ]
    for arm in ARMS:
        having = [replace(c, gains={arm: c.gains[arm]}) for c in cases if arm in c.gains]
        if len({c.twin for c in having}) < 3:
            continue
        off: tuple[list[float], list[float]] = [], []
        for case in having:
            others = [c for c in having if c.twin != case.twin]
            gains = [c.gains[arm][0] for c in others]
            rule = expected(case.features, others)[0].gain
            for errors, said in zip(off, (rule, sum(gains) / len(gains)), strict=True):
                errors.append(case.gains[arm][0] - said)
        rule, mean = (math.sqrt(sum(x * x for x in errors) / len(errors)) for errors in off)
        lines.append(f"| {arm} | {len(having)} | {rule:.2f} | {mean:.2f} |")
    return lines


def _change(cell: dict[str, Any], arm: str) -> str:
    if arm not in cell["changes"]:
        return "-"
    if "psnr" not in cell["changes"][arm]:
        return "infinite"
    value, _, low, high = cell["changes"][arm]["psnr"]
    return f"**{value:+.2f}**" if low > 0 or high < 0 else f"{value:+.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cells", nargs="*", metavar="CELL", help="default: all")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--work", type=Path, default=Path("runs/matrix"))
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if not options.table:
        finish(
            options.cells or CELLS,
            RESULTS,
            lambda name: measure(name, options.images, options.work),
            publish,
            lambda name: not missing(name),
        )
    publish()


if __name__ == "__main__":
    main()
