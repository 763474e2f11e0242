"""Layout of the image grid: prompts at the left, arms as columns, pixels repeated and untouched."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from evenkeel.errors import EvenkeelError, MissingExtra

# In pixels of the picture. A power of two keeps inches exact, so that the canvas has the size asked.
GRID_DPI = 128
LABEL_WIDTH, LINE = 232, 19
GAP, MARGIN, NARROWEST = 8, 12, 96
POINTS = 8.5  # font size


def new_figure(**options: Any) -> Any:
    """An empty figure of matplotlib, on no screen.

    Raises:
        MissingExtra: matplotlib is not installed.

    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise MissingExtra(
            "plots, image grids and report.html are drawn with matplotlib, which was not found: "
            "pip install 'evenkeel[reports]'."
        ) from e
    return Figure(**options)


def compose(arms: Mapping[str, Tensor], prompts: Sequence[str], scale: int) -> tuple[Any, int]:
    """The figure and its resolution; see :func:`evenkeel.reports.image_grid`."""
    check_images(arms, prompts)
    if scale < 1:
        raise EvenkeelError(f"scale must be at least 1, got {scale}.")
    high, wide = (scale * side for side in next(iter(arms.values())).shape[-2:])
    column = max(wide, NARROWEST)
    headings = [_wrapped(name, column, weight="bold") for name in arms]
    top = MARGIN + LINE * max(map(len, headings)) + GAP
    row = max(high, 3 * LINE) + GAP
    width = MARGIN + LABEL_WIDTH + len(arms) * (column + GAP) - GAP + MARGIN
    height = top + len(prompts) * row - GAP + MARGIN
    figure = new_figure(figsize=(width / GRID_DPI, height / GRID_DPI), dpi=GRID_DPI)

    def write(x: int, y: int, lines: Sequence[str], **style: Any) -> None:
        text = "\n".join(lines)
        # A prompt with two dollar signs is not a formula.
        figure.text(x / width, 1 - y / height, text, size=POINTS, parse_math=False, **style)

    for j, (images, heading) in enumerate(zip(arms.values(), headings, strict=True)):
        left = MARGIN + LABEL_WIDTH + j * (column + GAP)
        write(left + column // 2, top - GAP, heading, ha="center", va="bottom", weight="bold")
        for i, image in enumerate(images.detach().cpu()):
            large = image.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
            pixels = large.permute(1, 2, 0).contiguous().numpy()
            bottom = height - (top + i * row) - high
            figure.figimage(pixels, left + (column - wide) // 2, bottom, origin="upper")
    for i, prompt in enumerate(prompts):
        lines = _wrapped(prompt, LABEL_WIDTH - GAP, most=max(high, 3 * LINE) // LINE)
        write(MARGIN, top + i * row + high // 2, lines, ha="left", va="center")
    return figure, GRID_DPI


def check_images(arms: Mapping[str, Tensor], prompts: Sequence[str]) -> None:
    """Refuse what cannot be laid out side by side.

    Raises:
        EvenkeelError: no arms, not uint8, not (prompts, 3, H, W), or shapes that differ.

    """
    if not arms or not prompts:
        raise EvenkeelError(
            f"a grid needs at least one arm and one prompt; found {len(arms)} arms and "
            f"{len(prompts)} prompts."
        )
    shape = next(iter(arms.values())).shape
    for name, images in arms.items():
        fits = images.dim() == 4 and images.shape[:2] == (len(prompts), 3)
        if images.dtype != torch.uint8 or not fits or images.shape != shape:
            raise EvenkeelError(
                f"the pictures of arm {name!r} are {images.dtype} {tuple(images.shape)}; expected "
                f"uint8 ({len(prompts)}, 3, H, W), one per prompt and of one size in all arms."
            )


def _wrapped(text: str, pixels: int, weight: str = "normal", most: int | None = None) -> list[str]:
    """Lines no wider than ``pixels``, at most ``most`` of them and then an ellipsis."""
    # One line and never empty, so that every row and column keeps a label.
    plain = " ".join(text.split()) or "(empty)"
    for letters in range(max(8, pixels // 3), 2, -1):
        lines = textwrap.wrap(plain, letters, max_lines=most, placeholder=" …")
        if max(_width(line, weight) for line in lines) <= pixels:
            break
    return lines


def _width(line: str, weight: str) -> float:
    """In pixels, as it will be drawn: letters differ in width by a factor of four."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    font = FontProperties(size=POINTS, weight=weight)
    width, _, _ = RendererAgg(1, 1, GRID_DPI).get_text_width_height_descent(line, font, False)
    return float(width)
