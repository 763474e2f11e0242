"""GPTQ: round one input at a time and let the inputs that are left make up for the error."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.numbers.formats import wide
from evenkeel.quantizers.numbers.grids import Grid
from evenkeel.quantizers.numbers.scales import Scales, fit, snap
from evenkeel.statistics.exact import at_home

Order = Literal["given", "descending"]


def hessian_of(x: Tensor) -> Tensor:
    """Curvature of a linear layer's squared output error in one row of its weight.

    H = 2 X^T X / n, because the error of a row is (w - q) X^T X (w - q)^T. Batches merge by
    number of rows: (n1 H1 + n2 H2) / (n1 + n2). GPTQ does not depend on the size of H.

    Args:
        x: (..., in), inputs of the layer, floating point.

    Returns:
        (in, in), float64, symmetric.

    Raises:
        QuantizationError: no rows, or NaN or infinity in ``x``.

    >>> hessian_of(torch.tensor([[1.0, 2.0], [1.0, 0.0]]))
    tensor([[2., 2.],
            [2., 4.]], dtype=torch.float64)

    """
    if x.ndim == 0 or not x.is_floating_point() or x.numel() == 0:
        raise QuantizationError(
            f"Inputs must be floating point and not empty, got {tuple(x.shape)} of {x.dtype}."
        )
    rows = at_home(x.detach()).reshape(-1, x.shape[-1]).double()
    hessian = rows.T @ rows * (2 / len(rows))
    if not bool(torch.isfinite(hessian).all()):
        bad = x.numel() - int(torch.isfinite(x).sum())
        raise QuantizationError(
            f"The inputs of the layer hold {bad} of {x.numel()} values that are NaN or infinite. "
            "Run the pipeline in a wider dtype (bfloat16 or float32) and calibrate again."
        )
    return hessian


def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    scales: Scales | None = None,
    damp: float = 0.01,
    block: int = 128,
    order: Order = "given",
) -> tuple[Tensor, Scales]:
    """Round a weight so that the layer's output changes little: tr((W - Q) H (W - Q)^T).

    For every input j in order:  q_j = nearest(w_j),  e = (w_j - q_j) / U_jj,
    w_k -= e U_jk for the later inputs k,  with H^-1 = U^T U and U upper triangular
    (Frantar et al., arXiv:2210.17323, algorithm 1).

    The scales of a group are fitted when its first input is reached, to the weight as corrected
    by then. With ``order`` "descending" (the largest H_jj first, act-order) and with one scale per
    row or tensor they are fitted to the original weight. ``block`` only batches the corrections;
    it becomes a multiple of the group, so that no fit sees a weight that lags behind.
    An input that never was anything but zero is rounded to the nearest; the released code sets
    its weight to zero, which is wrong as soon as that input is used.

    Args:
        weight: (out, in), floating point, finite.
        hessian: (in, in), symmetric, from :func:`hessian_of`; any positive multiple does.
        grid: what to round to.
        scales: fixed scales, shaped as :func:`evenkeel.quantizers.numbers.scales.fit` makes them for
            ``weight``; None fits them.
        damp: this share of the mean of the diagonal is added to the diagonal.
        block: inputs between two corrections of all the later inputs.
        order: in which order inputs are rounded.

    Returns:
        Values of the grid, (out, in), float32 (float64 for a float64 weight); and their scales.

    Raises:
        QuantizationError: shapes that do not match, NaN or infinity, or a Hessian that is not
            positive definite after damping.

    >>> weight = torch.tensor([[3.0, 1.4]])
    >>> gptq(weight, torch.tensor([[1.0, 0.9], [0.9, 1.0]]), Grid.parse("int3"))[0]
    tensor([[3., 1.]])

    """
    _check(weight, hessian, damp, block, order)
    if at_home(weight) is not weight:  # the device knows no float64
        known = None if scales is None else _moved(scales, "cpu")
        values, scales = gptq(
            weight.cpu(), hessian.cpu(), grid, scales=known, damp=damp, block=block, order=order
        )
        return values.to(weight.device), _moved(scales, weight.device)
    exact = wide(weight.detach())
    group = grid.group if grid.group is not None and grid.group < weight.shape[1] else None
    late = scales is None and group is not None and order == "given"
    # A first fit in any case: it checks the weight, and late fits need its unit and its shapes.
    scales = fit(exact, grid) if scales is None else scales
    snap(exact, grid, scales)  # refuses scales of another shape
    shared = _per_row(scales, len(exact))

    sequence = _sequence(hessian, order)
    upper = _inverse_factor(hessian.double()[sequence][:, sequence], damp)
    left, values = exact.double()[:, sequence], torch.empty_like(exact)
    column, places = replace(grid, group=None, per_tensor=False), sequence.tolist()
    step = block if group is None else max(block // group, 1) * group
    for start in range(0, left.shape[1], step):
        stop = min(start + step, left.shape[1])
        errors = torch.empty_like(left[:, start:stop])
        for j in range(start, stop):
            at = places[j]
            k = 0 if group is None else at // group
            if late and group is not None and j % group == 0:
                part = fit(left[:, j : j + group].to(exact), column, unit=scales.unit)
                shared.scale[:, k : k + 1] = part.scale
                if shared.zero is not None and part.zero is not None:
                    shared.zero[:, k : k + 1] = part.zero
            value = snap(left[:, j : j + 1].to(exact), column, _of_group(shared, k))
            values[:, at : at + 1] = value
            errors[:, j - start] = (left[:, j] - value[:, 0]) / upper[j, j]
            left[:, j:stop] -= errors[:, j - start, None] * upper[j, j:stop]
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    return values, shared if late else scales


def _moved(scales: Scales, device: torch.device | str) -> Scales:
    zero, unit = (None if t is None else t.to(device) for t in (scales.zero, scales.unit))
    return Scales(scales.scale.to(device), zero, unit)


def _per_row(scales: Scales, rows: int) -> Scales:
    """A copy with one row of scales per output, also where one scale serves all."""
    scale, zero = scales.scale.expand(rows, -1).clone(), scales.zero
    return Scales(scale, None if zero is None else zero.expand(rows, -1).clone(), scales.unit)


def _of_group(scales: Scales, k: int) -> Scales:
    zero = scales.zero
    return Scales(scales.scale[:, k : k + 1], None if zero is None else zero[:, k : k + 1])


def _sequence(hessian: Tensor, order: Order) -> Tensor:
    if order == "given":
        return torch.arange(len(hessian), device=hessian.device)
    return hessian.diagonal().argsort(descending=True, stable=True)


def _inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """U, upper triangular with a positive diagonal, such that H^-1 = U^T U.

    From the factorization H = R R^T with R upper triangular, U = R^-1: the inverse is never
    formed, which is one rounding less than the two Cholesky factorizations of the released code.
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if bool((~dead).any()) else diagonal.new_ones(())
    damped = hessian + torch.diag(torch.where(dead, mean, damp * mean))
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(failed):
        raise QuantizationError(
            f"The Hessian is not positive definite with damp {damp}. It must be symmetric, as "
            "hessian_of makes it; if it is, raise damp, for example to 0.1."
        )
    eye = torch.eye(len(damped), dtype=damped.dtype, device=damped.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
    return inverse


def _check(weight: Tensor, hessian: Tensor, damp: float, block: int, order: str) -> None:
    if weight.ndim != 2 or tuple(hessian.shape) != (weight.shape[1],) * 2:
        raise QuantizationError(
            "GPTQ takes a weight (out, in) and a Hessian (in, in), got "
            f"{tuple(weight.shape)} and {tuple(hessian.shape)}. Flatten a convolution first."
        )
    bad = int((~torch.isfinite(hessian)).sum())
    if bad:
        raise QuantizationError(
            f"{bad} of {hessian.numel()} values of the Hessian are NaN or infinite. Calibrate "
            "again in a wider dtype (bfloat16 or float32)."
        )
    if not damp >= 0 or block < 1 or order not in ("given", "descending"):
        raise QuantizationError(
            "damp is at least 0, block at least 1 and order 'given' or 'descending', got "
            f"{damp!r}, {block!r} and {order!r}."
        )
