"""One cell of a paper, run on the zoo: quantize, calibrate, correct, compare with what is printed."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from evenkeel import zoo
from evenkeel.comparing.comparison import ArmResult, Comparison, compare, standard_arms
from evenkeel.errors import EvenkeelError
from evenkeel.fitting.quantize import quantize
from evenkeel.hosts.pipeline.pipelines import denoiser_of
from evenkeel.hosts.run import Run
from evenkeel.quantizers import QuantizerSpec, load_quantized, quantize_module
from evenkeel.quantizers.methods.catalogue import method_from
from evenkeel.reproduction.arms import Makers
from evenkeel.reproduction.cells import Cell, Row
from evenkeel.reproduction.verdict import Verdict, images_needed, judged
from evenkeel.storage import Kind, claim, digest, json_safe, json_text, read_json
from evenkeel.zoo.parts import KIND as TWIN
from evenkeel.zoo.pictures import KINDS

PILOT, MOST, LADDER_IMAGES = 100, 2000, 400
QUANTIZED = "quantized"
SEVERITIES = ("bits", "damage")
KIND = Kind(
    "reproduced cell",
    1,
    "run the cell again",
    keys=(
        "row",
        "cell",
        "severity",
        "calibration_seed",
        "twin",
        "quantizer",
        "images",
        "calibration_prompts",
        "shared",
        "verdict",
        "refused",
        "arms",
    ),
)
MARK = Kind("cell", 1, "remove that folder or give another one", keys=("identity",))
# Plain rounding from mild to harsh, for a damage that is the paper's.
LADDER = (
    *("w8a8-g32", "w4a8-g32", "w4a4-g32", "w3a8-g32", "w3a4-g32", "w3a4-g64"),
    *("w2a8-g8", "w2a8-g16", "w2a8-g32"),
)
# The paper's measures, and which of ours stands for each.
OURS = {
    "FID": "frechet_reference",
    "sFID": "spatial_frechet_reference",
    "IS": "inception_score",
    "LPIPS": "perceptual",
    "PSNR": "psnr",
    "SSIM": "ssim",
    "CLIP": "alignment",
}


def run_cell(
    row: Row,
    folder: Path,
    *,
    severity: str = "bits",
    calibration_seed: int = 0,
    images: int | None = None,
    only: Sequence[str] = (),
    said: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """What a row of a paper gives here, in types that JSON knows.

    Every arm's images are kept in ``folder`` as they are made, the quantized denoiser beside it, for all
    cells that have it; the same call goes on there.

    Args:
        row: with a cell.
        folder: of this cell.
        severity: ``bits``, the paper's quantizer; ``damage``, the one of ``LADDER`` at which the claimed
            measure, quantized over full precision, comes nearest to the paper's.
        calibration_seed: of the calibration's prompts and noise.
        images: per arm; None takes as many as the paper's gain needs, judged from ``PILOT`` of them, and at
            most ``MOST``. The damage is matched on ``LADDER_IMAGES`` then.
        only: names of arms to measure beside the claimed one; empty takes all of the cell.
        said: called with what is being done.

    Raises:
        EvenkeelError: the row has no cell, with the reason; no such severity.
        MissingExtra: where the twin's real pictures come from is not installed.

    """
    if row.cell is None or row.claim is None:
        raise EvenkeelError(f"{row.id} has no cell here: {row.reason}")
    if severity not in SEVERITIES:
        raise EvenkeelError(f"expected a severity of {', '.join(SEVERITIES)}, got {severity!r}.")
    cell, claimed, asked = row.cell, row.claim[0], _arms(row, only)
    claim_cell(row, folder)
    bench = Bench(cell, folder)
    # Real pictures may need an extra: that is said before minutes go by.
    bench.references(bench.prompts(1, 1))
    said("quantize")
    if severity == "bits":
        module, quantizer = bench.quantized(), str(method_from(cell.quantizer))
    else:
        module, quantizer = bench.as_damaged(row, images or LADDER_IMAGES, said)
    said("calibrate and fit")
    makers = Makers(bench.run(module, calibration_seed), cell.subset, cell.trajectory)
    arms, refused = {}, {}
    for name, what in asked.items():
        try:
            arms[name] = makers.make(what)
        except EvenkeelError as error:
            refused[name] = str(error)
    if claimed not in arms:
        raise EvenkeelError(f"{row.id}: {claimed} cannot be made here: {refused[claimed]}")
    count = images or _needed(row, bench.compared(module, {claimed: arms[claimed]}, PILOT))
    said(f"{len(arms)} arms, {count} images each")
    results = bench.compared(module, arms, count)
    return {
        "row": row.id,
        "cell": json_safe(asdict(cell)),
        "severity": severity,
        "calibration_seed": calibration_seed,
        "twin": cell.twin,
        "quantizer": quantizer,
        "images": count,
        "calibration_prompts": cell.calibration_prompts,
        "shared": makers.shared.as_dict(),
        "verdict": vars(_verdict(row, results)),
        "refused": refused,
        "arms": [arm.as_dict() for arm in results.values()],
    }


def variant(severity: str, calibration_seed: int) -> str:
    """What tells a row's results apart, in names of files and headings.

    >>> variant("bits", 0), variant("bits", 2)
    ('bits', 'bits-seed-2')

    """
    return severity if calibration_seed == 0 else f"{severity}-seed-{calibration_seed}"


def claim_cell(row: Row, folder: Path) -> None:
    """Mark a cell's folder as made with these settings and these weights.

    Raises:
        StorageError: it was made with others; says what differs.

    """
    if row.cell is not None:
        claim(folder / "cell.json", MARK, {**asdict(row.cell), "weights": _weights(row.cell)})


def is_kept(place: Path, row: Row, images: int | None, only: Sequence[str] = ()) -> bool:
    """Whether the result of this row as it is now is there, with so many images and these arms.

    For None, with as many images as `run_cell` takes.
    """
    if row.cell is None or not place.is_file():
        return False
    found = read_json(place, KIND)
    enough = found["images"] >= PILOT if images is None else found["images"] == images
    there = {arm["name"] for arm in found["arms"]} | found["refused"].keys()
    asked = json_safe(asdict(row.cell))
    return bool(enough and found["cell"] == asked and _arms(row, only).keys() <= there)


def _arms(row: Row, only: Sequence[str]) -> dict[str, Any]:
    """What stands for each arm: all of the cell, or the claimed one and these."""
    assert row.cell is not None and row.claim is not None
    asked = {**row.cell.arms, **{name: name for name in row.cell.also}}
    if unknown := [name for name in only if name not in asked]:
        raise EvenkeelError(f"{row.id} has the arms {', '.join(asked)}, not {', '.join(unknown)}.")
    wanted = (row.claim[0], *only) if only else tuple(asked)
    return {name: what for name, what in asked.items() if name in wanted}


def why_no_damage(row: Row) -> str:
    """Why the paper's damage cannot be looked for; empty where it can."""
    harm = row.damage()
    if harm is None:
        return f"{row.id}: the paper does not print what full precision has"
    return (
        f"{row.id}: the paper's quantized arm is not worse than full precision" if harm <= 1 else ""
    )


def _weights(cell: Cell) -> Any:
    return read_json(zoo.path_of(cell.twin) / zoo.TWIN_FILE, TWIN)["files"]


def _of_quantizing(cell: Cell) -> str:
    """A folder's name that tells apart whatever a quantized denoiser depends on."""
    names = ("twin", "quantizer", "steps", "guidance_scale", "sampler", "labels")
    asked = {name: getattr(cell, name) for name in names} | {"weights": _weights(cell)}
    return f"{cell.twin}-{digest(json_text(asked), {})[:12]}"


def _needed(row: Row, pilot: dict[str, ArmResult]) -> int:
    """Images per arm that resolve half of the paper's change, in fifties."""
    assert row.claim is not None
    name, measure = row.claim[0], OURS[row.claim[1]]
    change, gain = pilot[name].difference_to_quantized[measure], row.gain()
    assert gain is not None
    needed = images_needed(gain, change, pilot[QUANTIZED].measures[measure].value)
    return min(MOST, max(PILOT, 50 * math.ceil(needed / 50)))


def _verdict(row: Row, results: dict[str, ArmResult]) -> Verdict:
    assert row.claim is not None
    name, measure = row.claim[0], OURS[row.claim[1]]
    change = results[name].difference_to_quantized[measure]
    gain = row.gain()
    assert gain is not None
    return judged(gain, change, results[QUANTIZED].measures[measure].value)


class Bench:
    """A twin under a cell's settings; what takes long is kept in ``folder``.

    Attributes:
        cell, folder: as given.
        twin, kind: what the zoo says of it, and of what it draws.
        pipeline, guidance, evaluator: as the cell asks for.

    """

    def __init__(self, cell: Cell, folder: Path) -> None:
        self.cell, self.folder = cell, folder
        self.twin = zoo.twin(cell.twin)
        self.kind = KINDS[self.twin.pictures]
        self.pipeline = zoo.load(cell.twin, cell.sampler)
        guidance = cell.guidance_scale
        self.guidance = self.twin.guidance_scale if guidance is None else guidance
        self.evaluator = self.kind.evaluator(zoo.path_of(cell.twin))

    def prompts(self, count: int, seed: int) -> list[Any]:
        """Of the cell's class, or drawn: thousands to calibrate, 1 to evaluate, 3 to quantize."""
        if self.cell.labels is not None:
            return [self.cell.labels] * count
        return self.kind.prompts(count, seed)

    def references(self, prompts: Sequence[Any]) -> Tensor:
        """Real pictures for these prompts, uint8.

        Raises:
            MissingExtra: where they come from is not installed.

        """
        return self.kind.references(prompts, 1)

    def run(self, module: nn.Module, seed: int = 0) -> Run:
        """The calibration."""
        prompts = self.prompts(self.cell.calibration_prompts, 1000 * seed)
        return self.run_on(prompts, module, seed=1000 * seed)

    def run_on(
        self,
        prompts: Sequence[Any],
        module: nn.Module | None = None,
        *,
        seed: int = 0,
        batch_size: int = 32,
    ) -> Run:
        """These prompts under the cell's settings."""
        return Run(
            self.pipeline,
            prompts,
            self.cell.steps,
            guidance_scale=self.guidance,
            seed=seed,
            batch_size=batch_size,
            quantized=module,
        )

    def quantized(self) -> nn.Module:
        """By the paper's quantizer, kept beside the cells: rows of one table share it."""
        place = self.folder.parent / "quantized" / _of_quantizing(self.cell)
        if (place / "quantized.json").is_file():
            return load_quantized(place)[0]
        return quantize(
            self.pipeline,
            method_from(self.cell.quantizer),
            prompts=self.prompts(32, 3),
            num_inference_steps=self.cell.steps,
            guidance_scale=self.guidance,
            out=place,
            progress=False,
        )[0]

    def as_damaged(
        self, row: Row, count: int, said: Callable[[str], None]
    ) -> tuple[nn.Module, str]:
        """The denoiser rounded until the damage to ``count`` images is the paper's, and how."""
        if why := why_no_damage(row):
            raise EvenkeelError(f"{why}, so there is no damage to match.")
        wanted = row.damage()
        assert row.claim is not None and wanted is not None
        measure, found = OURS[row.claim[1]], {}

        def damage(text: str) -> float:
            arms = self.compared(self._rounded(text), {}, count, f"ladder-{text}")
            full, damaged = (arms[n].measures[measure].value for n in ("full-precision", QUANTIZED))
            found[text] = damaged / full
            said(f"{text}: {found[text]:.2f} times full precision, {wanted:.2f} in the paper")
            return found[text]

        bisect.bisect_left(LADDER, wanted, key=damage)  # asks for both neighbours of what is wanted
        nearest = min(found, key=lambda text: abs(math.log(found[text] / wanted)))
        return self._rounded(nearest), nearest

    def _rounded(self, text: str) -> nn.Module:
        return quantize_module(denoiser_of(self.pipeline), QuantizerSpec.parse(text))[0]

    def compared(
        self, module: nn.Module, arms: dict[str, Any], count: int, place: str = ""
    ) -> dict[str, ArmResult]:
        """Full precision, quantized and these arms, measured."""
        found = self.comparison(module, arms, count, place)
        return {arm.name: arm for arm in found.arms}

    def comparison(
        self, module: nn.Module, arms: dict[str, Any], count: int, place: str = ""
    ) -> Comparison:
        """The same with the images."""
        prompts = self.prompts(count, 1)
        return compare(
            self.pipeline,
            standard_arms(self.pipeline, module, arms),
            prompts=prompts,
            num_inference_steps=self.cell.steps,
            guidance_scale=self.guidance,
            batch_size=50,
            evaluator=self.evaluator,
            reference_images=self.references(prompts),
            folder=self.folder / (place or f"images-{count}"),
            more=not place,
            progress=False,
        )
