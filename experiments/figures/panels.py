"""Panels of pictures: which rows by a rule, columns by arm, the part that differs most enlarged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from evenkeel.comparing.comparison import ArmResult, Comparison
from evenkeel.metrics import per_image_psnr

FULL, QUANTIZED = "full-precision", "quantized"
QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
MEASURES = ("frechet_full_precision", "frechet_reference", "psnr")


def at_quantiles(values: Tensor, quantiles: Sequence[float] = QUANTILES) -> list[int]:
    """Indices of the values nearest below these quantiles.

    >>> at_quantiles(torch.tensor([30.0, 10.0, 20.0]), (0.0, 0.5))
    [1, 2]

    """
    order = values.argsort()
    return [int(order[int(q * (len(values) - 1))]) for q in quantiles]


def most_different(image: Tensor, other: Tensor, side: int) -> tuple[int, int]:
    """Top left corner of the square with the largest squared difference; (3, height, width) each."""
    squares = (image.float() - other.float()).square().sum(0)[None, None]
    sums = torch.nn.functional.avg_pool2d(squares, side, 1)[0, 0]
    return divmod(int(sums.argmax()), sums.shape[1])


def psnr(found: Comparison, arm: str) -> Tensor:
    """Of every image to its full-precision twin."""
    return per_image_psnr(found.images[arm].float() / 255, found.images[FULL].float() / 255)


def arm_numbers(arms: Sequence[ArmResult]) -> dict[str, Any]:
    """Distances and PSNR of every arm, and their paired changes against the quantized one."""
    return {
        arm.name: {
            key: {"value": arm.measures[key].value, "stderr": arm.measures[key].stderr}
            | (
                {"change": [change.value, change.low, change.high]}
                if (change := arm.difference_to_quantized.get(key))
                else {}
            )
            for key in MEASURES
            if key in arm.measures
        }
        for arm in arms
    }


def change_text(arm: Mapping[str, Any]) -> str:
    """Of one arm of ``arm_numbers``, against the quantized one."""
    words = {"frechet_full_precision": "FD to full precision", "frechet_reference": "FD to real"}
    parts = []
    for key in MEASURES:
        value, low, high = arm[key]["change"]
        unit = " dB" if key == "psnr" else ""
        parts.append(f"{words.get(key, 'PSNR')} {value:+.3g}{unit} [{low:+.3g}, {high:+.3g}]")
    return ", ".join(parts)


def level_text(arms: Mapping[str, Any]) -> str:
    """Of the full-precision and the quantized arm."""
    full, quantized = arms[FULL], arms[QUANTIZED]
    return (
        f"FD to full precision {quantized['frechet_full_precision']['value']:.3g}, FD to real "
        f"{quantized['frechet_reference']['value']:.3g} (full precision "
        f"{full['frechet_reference']['value']:.3g}), PSNR {quantized['psnr']['value']:.1f} dB"
    )


def panel(
    columns: Mapping[str, Tensor],
    labels: Sequence[str],
    zooms: Sequence[tuple[int, int]] = (),
    side: int = 12,
    size: float = 1.0,
) -> Figure:
    """Rows of pictures (rows, 3, height, width) uint8; beside each, with ``zooms``, that part of it."""
    each = 2 if zooms else 1
    wide = each * len(columns)
    figure = Figure(
        figsize=(size * wide + 1.6, size * len(labels) + 0.4), layout="constrained", dpi=80
    )
    axes = figure.subplots(len(labels), wide, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for i, label in enumerate(labels):
        axes[i, 0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=7)
        for j, (name, pictures) in enumerate(columns.items()):
            axis, image = axes[i, each * j], pictures[i].permute(1, 2, 0).numpy()
            axis.imshow(image, interpolation="nearest")
            if i == 0:
                axis.set_title(name, fontsize=8)
            if zooms:
                top, left = zooms[i]
                axis.add_patch(
                    Rectangle((left - 0.5, top - 0.5), side, side, fill=False, edgecolor="red")
                )
                part = image[top : top + side, left : left + side]
                axes[i, each * j + 1].imshow(part, interpolation="nearest")
    return figure
