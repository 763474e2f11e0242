"""How many bits every layer gets: the integer program of mixed precision, and what it minimizes."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from torch import Tensor

from evenkeel.errors import QuantizationError
from evenkeel.statistics.exact import at_home

#: Of every layer: for each number of bits it may have, the damage that does.
Damage = Mapping[str, Mapping[int, float]]

# HiGHS takes a constraint as met up to about 1e-6; where that breaks the budget, ask for less.
_MARGINS = (0.0, 1e-5)


def allocate(damage: Damage, sizes: Mapping[str, int], mean_bits: float) -> dict[str, int]:
    """The bits of every layer that fit in a memory budget and do the least damage in all.

    minimize sum_l damage[l][b_l]  subject to  sum_l size_l b_l <= mean_bits sum_l size_l,
    solved by HiGHS to a relative gap of 1e-6. Layers count as independent, so damages must be of a
    kind that adds up, such as noise power. MixDQ's released code (arXiv:2405.17873)
    maximizes a sum of signal-to-noise ratios in decibels; these do not add up, and their sum pays
    as much for 6 dB where nothing is heard as where everything is.

    Args:
        damage: by layer and bits, finite; a layer has one of the bits given for it.
        sizes: weights in each of these layers, positive.
        mean_bits: per weight, over all these layers.

    Returns:
        Bits by layer, in the order of ``damage``.

    Raises:
        QuantizationError: nothing fits the budget, or a damage that is not finite.

    >>> damage = {"a": {2: 9.0, 4: 1.0, 8: 0.0}, "b": {2: 0.1, 4: 0.0, 8: 0.0}}
    >>> allocate(damage, {"a": 10, "b": 20}, 4.0)
    {'a': 8, 'b': 2}

    """
    _check(damage, sizes, mean_bits)
    budget, least = mean_bits * sum(sizes[name] for name in damage), _least(damage, sizes)
    spare = budget - least
    if spare < -1e-12 * budget:
        raise QuantizationError(
            f"No allocation fits {mean_bits:g} bits per weight: the fewest that these layers can have "
            f"are {least * mean_bits / budget:g} on average. Ask for more, or add smaller candidates."
        )
    # What a choice takes of the spare bits; what alone takes too much is out before it is solved.
    choices = [
        (row, name, bits, more)
        for row, (name, found) in enumerate(damage.items())
        for bits in found
        if (more := sizes[name] * (bits - min(found))) <= spare or more == 0
    ]
    cost = np.array([damage[name][bits] for _, name, bits, _ in choices])
    share = np.array([[more / max(spare, 1.0) for *_, more in choices]])
    rows = ([row for row, *_ in choices], range(len(choices)))
    one_each = csr_array((np.ones(len(choices)), rows))
    for margin in _MARGINS:
        solved = milp(
            cost / (np.abs(cost).max() or 1.0),
            integrality=np.ones(len(choices)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(share, 0, 1 - margin)],
            options={"mip_rel_gap": 1e-6},
        )
        taken = [c for c, x in zip(choices, solved.x, strict=True) if x > 0.5]
        if sum(more for *_, more in taken) <= max(spare, 0.0):
            break
    return {name: bits for _, name, bits, _ in taken}


def allocate_decoupled(
    content: Damage, quality: Damage, sizes: Mapping[str, int], mean_bits: float, ratio: float
) -> dict[str, int]:
    """The same for two groups of layers whose damages are measured in different units.

    Each group has a budget of its own, b_content = ratio b_quality, both together ``mean_bits`` per
    weight (MixDQ, arXiv:2405.17873). Content's budget is moved into the range that
    leaves both groups an allocation, and what content does not use goes to quality.

    Args:
        content: damage of the layers of one group; may be empty.
        quality: of the other.
        sizes: weights in each of these layers, positive.
        mean_bits: per weight, over the layers of both groups.
        ratio: mean bits of content over those of quality, positive.

    Returns:
        Bits by layer, content first.

    Raises:
        QuantizationError: nothing fits the budget, or a damage that is not finite.

    >>> one = {"a": {2: 1.0, 4: 0.1, 8: 0.0}}
    >>> other = {"b": {2: 1.0, 4: 0.1, 8: 0.0}}
    >>> allocate_decoupled(one, other, {"a": 10, "b": 20}, 6.0, 0.5)
    {'a': 2, 'b': 8}

    """
    if not content or not quality:
        return allocate({**content, **quality}, sizes, mean_bits)
    if not ratio > 0:
        raise QuantizationError(f"ratio must be positive, got {ratio!r}.")
    first, second = (sum(sizes[name] for name in group) for group in (content, quality))
    budget = mean_bits * (first + second)
    share = budget * ratio * first / (ratio * first + second)
    share = max(min(share, budget - _least(quality, sizes)), _least(content, sizes))
    chosen = allocate(content, sizes, share / first)
    left = budget - sum(sizes[name] * bits for name, bits in chosen.items())
    return chosen | allocate(quality, sizes, left / second)


def noise_share(found: Tensor, reference: Tensor) -> float:
    """Power of the error over power of the signal: ||y - y0||^2 / ||y0||^2.

    What MixDQ calls SQNR is -10 log10 of it.

    Args:
        found: floating point.
        reference: the same shape.

    Raises:
        QuantizationError: the reference is zero, or NaN somewhere.

    >>> noise_share(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]))
    0.01

    """
    wide = at_home(reference).double()
    signal, error = (
        wide.square().sum().item(),
        (at_home(found).double() - wide).square().sum().item(),
    )
    return _finite(error / signal if signal else float("nan"))


def structural_loss(found: Tensor, reference: Tensor) -> float:
    """1 - SSIM with one window over the whole field, averaged over samples and channels.

    SSIM = (2 m_x m_y + C1)(2 s_xy + C2) / ((m_x^2 + m_y^2 + C1)(s_x^2 + s_y^2 + C2)),
    C1 = (0.01 L)^2, C2 = (0.03 L)^2, L the range of the sample's reference. MixDQ looks at images
    of 512 pixels through a window of 511, which is the same thing; here fields are latents.

    Args:
        found: (N, C, ...) fields, or (N, tokens, C).
        reference: the same shape.

    Returns:
        0 for equal fields, at most 2.

    Raises:
        QuantizationError: NaN or infinity somewhere.

    >>> field = torch.arange(8.0).reshape(1, 2, 2, 2)
    >>> structural_loss(field, field)
    0.0

    """
    x, y = (_fields(t) for t in (found, reference))
    reach = (y.amax((1, 2)) - y.amin((1, 2))).clamp(min=torch.finfo(y.dtype).tiny)[:, None]
    c1, c2 = (0.01 * reach) ** 2, (0.03 * reach) ** 2
    mx, my = x.mean(-1), y.mean(-1)
    dx, dy = x - mx[..., None], y - my[..., None]
    sxy, sxx, syy = ((a * b).mean(-1) for a, b in ((dx, dy), (dx, dx), (dy, dy)))
    above = (2 * mx * my + c1) * (2 * sxy + c2)
    alike = above / ((mx**2 + my**2 + c1) * (sxx + syy + c2))
    return _finite(1 - alike.mean().item())


def _fields(t: Tensor) -> Tensor:
    """(N, C, positions), float64."""
    wide = at_home(t).double()
    return wide.movedim(-1, 1) if t.ndim == 3 else wide.flatten(2)


def _least(damage: Damage, sizes: Mapping[str, int]) -> float:
    """Bits of the smallest allocation there is."""
    return float(sum(sizes[name] * min(damage[name]) for name in damage))


def _check(damage: Damage, sizes: Mapping[str, int], mean_bits: float) -> None:
    if not damage or not all(damage.values()):
        raise QuantizationError("There is a layer with no bits to choose from, or no layer at all.")
    if not mean_bits > 0 or any(sizes[name] < 1 for name in damage):
        raise QuantizationError(f"The budget ({mean_bits!r}) and all sizes must be positive.")
    for name, found in damage.items():
        for bits, value in found.items():
            if not isfinite(value):
                raise QuantizationError(f"The damage of {bits} bits in {name!r} is {value}.")


def _finite(value: float) -> float:
    if not isfinite(value):
        raise QuantizationError(
            "The output of the denoiser, whole or with a layer quantized, is zero, NaN or infinite. "
            "Calibrate in float32 or bfloat16."
        )
    return value
