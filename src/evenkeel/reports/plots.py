"""Pictures of a calibration and of what the arms made, each returned as the bytes of a PNG file.

Figures are built as objects, never through ``pyplot``: a caller's own figures stay untouched.
Channels are told apart by the colours of Okabe and Ito (2008), made for every kind of colour vision,
and by markers; where there are more than eight, by position on the cividis map (up to where it turns
too pale for white paper).
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from evenkeel.errors import EvenkeelError
from evenkeel.reports.grid import compose, new_figure

Calibration = Mapping[str, Any]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A7A00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DPI = 144


def factor_plot(calibration: Calibration) -> bytes:
    """By how much each step is stretched, c = factor - 1, with its 95 % bootstrap band, as PNG.

    Args:
        calibration: ``results["calibration"]``; its ``steps`` are read.

    Raises:
        EvenkeelError: there are no steps.

    """
    steps = _steps(calibration)
    figure, axes = _figure()
    x = [step["step"] for step in steps]
    factor, low, high = (_columns(steps, k) for k in ("factor", "factor_low", "factor_high"))
    colours = _colours(len(factor))
    axes.axhline(0, color="#666666", linewidth=1)
    for c, values in enumerate(factor):
        if c < len(low) and c < len(high):
            band = [v - 1 for v in low[c]], [v - 1 for v in high[c]]
            axes.fill_between(x, *band, color=colours[c], alpha=0.18, linewidth=0)
        _line(axes, x, [v - 1 for v in values], colours, c)
    axes.set_ylabel("c = factor − 1")
    axes.set_title("How much further each step goes")
    return _finished(figure, axes, colours)


def variance_plot(calibration: Calibration) -> bytes:
    """The variance V of the quantization error per step and channel, on a logarithmic axis, as PNG.

    A variance of zero has no place on that axis; how many there are is written below it.

    Args and Raises as for :func:`factor_plot`.
    """
    steps = _steps(calibration)
    figure, axes = _figure()
    columns = _columns(steps, "variance")
    colours = _colours(len(columns))
    x = [step["step"] for step in steps]
    for c, values in enumerate(columns):
        _line(axes, x, _positive(values), colours, c)
    axes.set_ylabel("V, variance of the error")
    axes.set_title("How noisy quantization makes each step")
    note = _logarithmic(axes, columns)
    return _finished(figure, axes, colours, note)


def gain_slope_plot(calibration: Calibration) -> bytes:
    """The part of the error that follows the model's output: gain K and slope a, as PNG.

    Args and Raises as for :func:`factor_plot`.
    """
    steps = _steps(calibration)
    figure, (left, right) = _figure(columns=2)
    from matplotlib.ticker import MaxNLocator

    x = [step["step"] for step in steps]
    colours: list[Any] = []
    for axes, key, label in (
        (left, "gain", "K, gain on the full-precision output"),
        (right, "slope", "a, slope on the quantized output"),
    ):
        columns = _columns(steps, key)
        colours = _colours(len(columns))
        axes.axhline(0, color="#666666", linewidth=1)
        for c, values in enumerate(columns):
            _line(axes, x, values, colours, c)
        axes.set_title(label)
    left.set_xlabel("step (the first is the noisiest)")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _finished(figure, right, colours)


def correlation_plot(calibration: Calibration) -> bytes:
    """Heat map of the correlation of the error between steps, as PNG.

    The title holds the mean over neighbouring steps (lag 1). Corrections that only know a variance
    per step take everything off the diagonal to be zero.

    Args:
        calibration: ``results["calibration"]``; its ``step_correlation`` (T, T) is read.

    Raises:
        EvenkeelError: the matrix is empty or not square.

    """
    matrix = calibration.get("step_correlation") or []
    if not matrix or any(len(row) != len(matrix) for row in matrix):
        raise EvenkeelError(
            f"'step_correlation' must be a square matrix with one row per step; found rows of "
            f"lengths {[len(row) for row in matrix]}."
        )
    figure, axes = _figure(width=5.6, height=4.6)
    from matplotlib.ticker import MaxNLocator

    image = axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="correlation")
    lag_one = [matrix[i][i + 1] for i in range(len(matrix) - 1)]
    mean = f"lag-1 mean {sum(lag_one) / len(lag_one):.2f}" if lag_one else "one step only"
    axes.set_title(f"Correlation of the error between steps\n({mean})")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(False)
    axes.set(xlabel="step", ylabel="step")
    return _png(figure)


def spectrum_plot(calibration: Calibration) -> bytes:
    """Power of the error per spatial frequency, one line per step, as PNG; white noise is flat.

    Args:
        calibration: ``results["calibration"]``; its ``error_spectrum`` (T, bins) is read.

    Raises:
        EvenkeelError: there is no spectrum.

    """
    spectrum = calibration.get("error_spectrum") or []
    if not spectrum or not spectrum[0]:
        raise EvenkeelError(
            "this calibration holds no 'error_spectrum' (it exists for picture-shaped latents "
            "only); leave this plot out."
        )
    figure, axes = _figure()
    bins = len(spectrum[0])
    x = [(i + 0.5) / (2 * bins) for i in range(bins)]
    colours = _colours(len(spectrum), many=0)
    for k, powers in enumerate(spectrum):
        axes.plot(x, _positive(powers), color=colours[k], linewidth=1.6, marker="o", markersize=3.5)
    note = _logarithmic(axes, spectrum)
    axes.set(
        xlabel="spatial frequency (cycles per latent pixel)" + note, ylabel="power of the error"
    )
    axes.set_title("Is the error white?")
    _colour_bar(figure, axes, len(spectrum), "step")
    return _png(figure)


def image_grid(arms: Mapping[str, Tensor], prompts: Sequence[str], scale: int = 3) -> bytes:
    """The same prompts through every arm, side by side, as PNG: a row per prompt, a column per arm.

    Pixels are repeated ``scale`` times and otherwise untouched. A prompt too long for its row ends
    in an ellipsis.

    Args:
        arms: name to pictures, uint8 (k, 3, H, W), equal shapes, k = number of prompts.
        prompts: one per row.
        scale: how many pixels wide and high a pixel becomes, at least 1.

    Raises:
        EvenkeelError: no arms, other dtypes or shapes, a scale below 1.

    """
    return _png(*compose(arms, prompts, scale))


def _steps(calibration: Calibration) -> list[Mapping[str, Any]]:
    steps = list(calibration.get("steps") or [])
    if not steps:
        raise EvenkeelError("this calibration holds no 'steps', so there is nothing to plot.")
    return steps


def _columns(steps: Sequence[Mapping[str, Any]], key: str) -> list[list[float]]:
    """Per channel, the values over steps; None (not available) becomes a gap in the line."""
    rows = [step[key] or [] for step in steps]
    if len({len(row) for row in rows}) > 1:
        raise EvenkeelError(
            f"'{key}' must have one number per channel at every step; found "
            f"{[len(row) for row in rows]} numbers."
        )
    return [[math.nan if v is None else float(v) for v in c] for c in zip(*rows, strict=True)]


def _figure(columns: int = 1, width: float = 0, height: float = 3.7) -> tuple[Any, Any]:
    figure = new_figure(
        figsize=(width or (7.0 if columns == 1 else 9.0), height), layout="constrained"
    )
    found = figure.subplots(1, columns)
    for axes in [found] if columns == 1 else found:
        axes.grid(True, color="#DDDDDD", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, found


def _colours(count: int, many: int = len(COLOURS)) -> list[Any]:
    if count <= many:
        return list(COLOURS[:count])
    return [_shades()(i / max(1, count - 1)) for i in range(count)]


def _shades() -> Any:
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap([colormaps["cividis"](0.85 * i / 255) for i in range(256)])


def _positive(values: Sequence[float]) -> list[float]:
    return [v if v > 0 else math.nan for v in values]


def _logarithmic(axes: Any, lines: Sequence[Sequence[float]]) -> str:
    """Make the axis logarithmic if anything can be drawn on it, and say how much cannot."""
    values = [v for line in lines for v in line]
    if any(v > 0 for v in values):
        axes.set_yscale("log")
    zeros = sum(v <= 0 for v in values)
    return f"\n{zeros} of {len(values)} values are 0 and not drawn" if zeros else ""


def _line(
    axes: Any, x: Sequence[float], y: Sequence[float], colours: Sequence[Any], c: int
) -> None:
    marker = MARKERS[c] if len(colours) <= len(MARKERS) else "."
    style = {"linewidth": 1.8, "markersize": 4.5, "markeredgewidth": 0}
    axes.plot(x, y, color=colours[c], marker=marker, label=f"channel {c}", **style)


def _finished(figure: Any, axes: Any, colours: Sequence[Any], note: str = "") -> bytes:
    """Step axis, legend (or colour bar where there are many channels), and out as PNG."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step (the first is the noisiest)" + note)
    if len(colours) > len(COLOURS):
        _colour_bar(figure, axes, len(colours), "channel")
    elif len(colours) > 1:
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return _png(figure)


def _colour_bar(figure: Any, axes: Any, count: int, label: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    scale = ScalarMappable(Normalize(0, max(1, count - 1)), cmap=_shades())
    figure.colorbar(scale, ax=axes, label=label, ticks=MaxNLocator(6, integer=True))


def _png(figure: Any, dpi: int = DPI) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)  # pixels, whatever windowing backend the caller has chosen
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return out.getvalue()
