"""When does taking the mean state error off help? Predicted from what all prompts' errors have in common.

A correction that moves every state alike (TAC's input bias, `tac-ibc`) can take off the share s of the
final state error that all prompts share, and adds 1/n of the rest, as its mean is of n prompts:
-10 log10((1 - s)(1 + 1/n)) dB. The share is the marginal check's, of 32 prompts, without any image;
cells of matrix/ that lack it are given it. Cells in input_bias/ are measured on the final states alone,
of 32 prompts that the bias is not fitted on. Writes INPUT_BIAS.md.

    python experiments/input_bias.py [CELL ...]  # default: all
    python experiments/input_bias.py --table     # from the results on disk
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from measured_cells import finish, known, not_run, reproduced
from scipy import stats

from evenkeel import zoo
from evenkeel.comparing.comparison import standard_arms
from evenkeel.comparing.marginal_check import marginal_check
from evenkeel.hosts.pipeline.pipelines import denoiser_of
from evenkeel.hosts.run import Run
from evenkeel.metrics.state_scores import input_bias_gain
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.reproduction.arms import Makers
from evenkeel.storage import write_atomically
from evenkeel.zoo.pictures import KINDS

HERE = Path(__file__).parent
RESULTS = HERE / "input_bias"
ARM = "tac-ibc"
PROMPTS = 32  # that a matrix cell is calibrated on
STATES = [
    *("flux-schnell w4a8-g32", "sdxl-turbo w4a8-g32", "sana w3a4-g32", "pixart-sigma w3a4-g32"),
    *("dit-xl w3a4-g32", "ldm-4 w3a4-g32", "ddim-cifar w3a4-g32", "sd-v1.4 w3a4-g32"),
    *("sana w4a8-g32", "pixart-sigma w4a8-g32", "dit-xl w4a8-g32", "sdxl w3a4-g32"),
]


def run_of(twin_name: str, quantizer: str) -> Run:
    """The calibration of a cell."""
    twin, pipeline = zoo.twin(twin_name), zoo.load(twin_name)
    module, _ = quantize_module(denoiser_of(pipeline), QuantizerSpec.parse(quantizer))
    return Run(
        pipeline,
        KINDS[twin.pictures].prompts(PROMPTS, 0),
        twin.num_inference_steps,
        guidance_scale=twin.guidance_scale,
        batch_size=PROMPTS,
        quantized=module,
    )


def on_states(name: str) -> dict[str, Any]:
    """What the input bias does to the final states of prompts that it was not fitted on."""
    twin, quantizer = name.split()
    run = run_of(twin, quantizer)
    arms = standard_arms(run.pipeline, run.pair[1], {ARM: Makers(run).make(ARM)})
    check = marginal_check(
        run.pipeline,
        arms,
        prompts=KINDS[zoo.twin(twin).pictures].prompts(PROMPTS, 1),
        num_inference_steps=run.num_inference_steps,
        guidance_scale=run.guidance_scale,
        batch_size=PROMPTS,
        progress=False,
    )
    assert check.shared is not None
    error = check[ARM].scores["squared_error"]  # of the logarithm
    gain = [-10 / math.log(10) * v for v in (error.value, error.high, error.low)]
    return {"name": name, "shared": check.shared.as_dict(), "gain": gain}


def cells() -> list[dict[str, Any]]:
    """Name, share, prompts, the output error's share, and the measured gain of every cell that has them."""
    found = [
        _cell(f"{name}, states", name.split()[0], cell["shared"], PROMPTS, None, cell["gain"])
        for name, cell in known(RESULTS, STATES).items()
    ]
    for place in sorted((HERE / "matrix").glob("*.json")):
        cell = json.loads(place.read_text())
        if "shared" in cell and "psnr" in cell["changes"].get(ARM, {}):
            gain = [cell["changes"][ARM]["psnr"][i] for i in (0, 2, 3)]
            name = f"{cell['twin']} {cell['quantizer']}"
            common = cell["features"]["common"]
            found.append(_cell(name, cell["twin"], cell["shared"], PROMPTS, common, gain))
    for _, name, result in reproduced():
        arms = {arm["name"]: arm for arm in result["arms"]}
        if ARM in arms:
            change = arms[ARM]["difference_to_quantized"]["psnr"]
            gain = [change[k] for k in ("value", "low", "high")]
            prompts = result["calibration_prompts"]
            found.append(_cell(name, result["twin"], result["shared"], prompts, None, gain))
    return found


def _cell(
    name: str,
    twin: str,
    shared: dict[str, Any],
    prompts: int,
    common: float | None,
    gain: list[float],
) -> dict[str, Any]:
    return {
        "name": name,
        "twin": twin,
        "shared": shared,
        "prompts": prompts,
        "common": common,
        "predicted": input_bias_gain(shared["value"], prompts),
        "gain": gain,
    }


def page(found: list[dict[str, Any]]) -> str:
    """INPUT_BIAS.md."""
    lines = [
        "# When does taking the mean state error off help?",
        "",
        *(__doc__ or "").split("\n\n")[1].splitlines(),
        "",
        *not_run(STATES, known(RESULTS, STATES)),
        "| cell | prompts | shared state error | shared output error | predicted, dB | measured, dB |",
        "|---|---|---|---|---|---|",
    ]
    for c in sorted(found, key=lambda c: -c["gain"][0]):
        s, (value, low, high) = c["shared"], c["gain"]
        common = "-" if c["common"] is None else f"{c['common']:.1%}"
        measured = f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"
        measured = f"**{measured}**" if low > 0 or high < 0 else measured
        lines.append(
            f"| {c['name']} | {c['prompts']} | {s['value']:.1%} [{s['low']:.1%}, {s['high']:.1%}] | "
            f"{common} | {c['predicted']:+.2f} | {measured} |"
        )
    return "\n".join([*lines, "", *_verdict(found)]) + "\n"


def _verdict(found: list[dict[str, Any]]) -> list[str]:
    if len({c["twin"] for c in found}) < 3:
        return ["Fewer than three twins: nothing can be said."]
    within = sum(c["gain"][1] <= c["predicted"] <= c["gain"][2] for c in found)
    told = [c for c in found if c["common"] is not None]
    sure = [c for c in found if c["gain"][1] > 0]
    above = sum(c["gain"][0] > c["predicted"] for c in sure)
    return [
        f"{len(found)} cells of {len({c['twin'] for c in found})} twins. Rank correlation of the prediction "
        f"and the gain: {_ranked(found, 'predicted')}; {within} of the predictions lie within the gain's "
        f"95 % interval. Where the gain is sure, it lies above the prediction in {above} of {len(sure)} "
        f"cells, by up to {max(c['gain'][0] - c['predicted'] for c in sure):.1f} dB: the share ranks, and "
        "says at least how much; it is of the last state alone, while the bias is taken off after "
        "every step.",
        "",
        f"On the {len(told)} cells of the matrix, where both are known: {_ranked(told, 'predicted')}; the "
        f"share of the *output* error, which a record holds: {_ranked(told, 'common')}.",
    ]


def _ranked(found: list[dict[str, Any]], key: str) -> str:
    """Spearman's correlation with the gain; its interval from 2,000 draws of whole twins."""

    def correlation(cells: list[dict[str, Any]]) -> float:
        return float(stats.spearmanr([c[key] for c in cells], [c["gain"][0] for c in cells])[0])

    twins = sorted({c["twin"] for c in found})
    rng = np.random.default_rng(0)
    drawn = [
        correlation(
            [c for twin in rng.choice(twins, len(twins)) for c in found if c["twin"] == twin]
        )
        for _ in range(2000)
    ]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return f"{correlation(found):+.2f} [{low:+.2f}, {high:+.2f}]"


def publish() -> None:
    """The page."""
    write_atomically(HERE / "INPUT_BIAS.md", page(cells()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cells", nargs="*", metavar="CELL", help="default: all")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if not options.table:
        for place in sorted((HERE / "matrix").glob("*.json")):
            cell = json.loads(place.read_text())
            if "shared" not in cell:
                cell["shared"] = Makers(run_of(cell["twin"], cell["quantizer"])).shared.as_dict()
                write_atomically(place, json.dumps(cell, separators=(",", ":")) + "\n")
        finish(options.cells or STATES, RESULTS, on_states, publish)
    publish()


if __name__ == "__main__":
    main()
