"""What a file of evenkeel says, for people."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import evenkeel
from evenkeel.corrections import Readout
from evenkeel.errors import EvenkeelError
from evenkeel.record import Record
from evenkeel.record import describe as description

from .recover import read

WIDTH, HEIGHT, MARGIN = 640, 320, 48
_BLUE, _GREY, _LIGHT = (0, 90, 181), (90, 90, 90), (200, 220, 240)


def _found(path: str | os.PathLike[str]) -> Any:
    try:
        return evenkeel.load(path)
    except EvenkeelError:
        return read(path)


def text(path: str | os.PathLike[str]) -> str:
    """A record step by step, a readout's fits, or adapters' layers and sizes."""
    found = _found(path)
    if isinstance(found, Record):
        return description.text(description.describe(found))
    if not isinstance(found, tuple):
        return str(found) if isinstance(found, Readout) else f"{found.name}: {found.report}"
    factors, said = found
    size = sum(2 * (a.numel() + b.numel()) for a, b in factors.values())
    ranks = sorted(len(a) for a, _ in factors.values())
    return (
        f"recovery adapters beside {len(factors)} layers, ranks {ranks[0]} to {ranks[-1]}, "
        f"{size / 1e6:.2f} MB\nquantizer: {said.get('evenkeel.quantizer', 'not said')}\n"
        f"base recognised: {'yes' if 'evenkeel.recognition' in said else 'no'}"
    )


def picture(path: str | os.PathLike[str]) -> Tensor:
    """(1, height, width, 3) in [0, 1]: one bar per step or per layer, with its 95 % band if it has one."""
    found = _found(path)
    if isinstance(found, Record):
        steps = description.describe(found)["steps"]
        keys = ("factor", "factor_low", "factor_high")
        rows = [[float(np.mean(s[k])) - 1 if s[k] else 0.0 for k in keys] for s in steps]
        return _bars(np.array(rows), "by how much Q-Drift stretches each step, with its 95 % band")
    if isinstance(found, Readout):
        left = np.array([f.held_out for f in found.fits] or [1.0])[:, None].repeat(3, 1)
        return _bars(left, "error left by each head on held-out prompts; 1 is no change")
    if isinstance(found, tuple):
        ranks = [float(len(a)) for a, _ in found[0].values()]
    else:
        ranks = [float(a.rank) for a in found.beside]
    return _bars(np.array(ranks or [0.0])[:, None].repeat(3, 1), "rank of each layer's adapter")


def _bars(values: np.ndarray[Any, Any], title: str) -> Tensor:
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    scale = (HEIGHT - 2 * MARGIN) / ((high - low) or 1.0)

    def y(value: float) -> float:
        return HEIGHT - MARGIN - (value - low) * scale

    width = (WIDTH - 2 * MARGIN) / len(values)
    for i, (value, bottom, top) in enumerate(values):
        left = MARGIN + i * width
        draw.rectangle(
            (left + 1, min(y(value), y(0)), left + width - 1, max(y(value), y(0))), _LIGHT, _BLUE
        )
        draw.line((left + width / 2, y(bottom), left + width / 2, y(top)), fill=_BLUE, width=2)
    draw.line((MARGIN, y(0), WIDTH - MARGIN, y(0)), fill=_GREY)
    draw.text((MARGIN, 12), title, fill="black")
    draw.text((4, y(high) - 6), f"{high:.3g}", fill=_GREY)
    draw.text((4, y(low) - 6), f"{low:.3g}", fill=_GREY)
    return torch.from_numpy(np.asarray(image).copy()).float()[None] / 255
