"""How many bits every layer gets: the integer program of mixed precision, and what it minimizes."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_array, csr_array, kron
from torch import Tensor

from evenkeel.errors import QuantizationError

#: Of every layer: for each number of bits it may have, the damage done.
Damage = Mapping[str, Mapping[int, float]]

# HiGHS takes a constraint as met, and a number as whole, up to about 1e-6.
_SLACKS = (0.0, 1e-5, 1e-3)


def allocate(damage: Damage, sizes: Mapping[str, int], mean_bits: float) -> dict[str, int]:
    """The bits of every layer that do the least damage in all and fit in a memory budget.

    minimize sum_l damage[l][b_l]  subject to  sum_l size_l b_l <= mean_bits sum_l size_l.
    Layers are taken as independent: damages must be of a kind that adds up, such as noise power.
    MixDQ (arXiv:2405.17873, section 4.3) maximizes a sum of signal-to-noise ratios in decibels under
    this budget; decibels of independent errors do not add up, so their sum pays as much for 6 dB
    where nothing is heard as where everything is. Give noise power instead. Solved to optimality
    (relative gap 1e-6) by HiGHS.

    Args:
        damage: by layer and bits, finite; a layer chooses among the bits given for it.
        sizes: weights in each of these layers, positive.
        mean_bits: per weight, over all these layers.

    Returns:
        By layer, in the order of ``damage``.

    Raises:
        QuantizationError: nothing fits the budget, or a damage that is not finite.

    >>> damage = {"a": {2: 9.0, 4: 1.0, 8: 0.0}, "b": {2: 0.1, 4: 0.0, 8: 0.0}}
    >>> allocate(damage, {"a": 10, "b": 20}, 4.0)
    {'a': 8, 'b': 2}

    """
    choices = _checked(damage, sizes, mean_bits)
    if not choices:
        return {}
    total = sum(sizes[name] for name in damage)
    cost = np.array([damage[name][bits] for name, bits in choices])
    share = np.array([sizes[name] * bits / (total * mean_bits) for name, bits in choices])
    one_each = csr_array(
        [[float(name == other) for other, _ in choices] for name in damage]
    )
    largest = np.abs(cost).max()
    for slack in _SLACKS:
        found = milp(
            cost / largest if largest > 0 else cost,
            integrality=np.ones(len(choices)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(share[None], -np.inf, 1 - slack),
            ],
            options={"mip_rel_gap": 1e-6},
        )
        if found.x is None:
            break
        chosen = {
            name: bits for (name, bits), x in zip(choices, found.x, strict=True) if x > 0.5
        }
        if sum(sizes[n] * b for n, b in chosen.items()) <= mean_bits * total * (1 + 1e-9):
            return chosen
    least = sum(sizes[name] * min(damage[name]) for name in damage) / total
    raise QuantizationError(
        f"No allocation fits {mean_bits:g} bits per weight: the fewest bits these layers may have "
        f"are {least:g} on average. Ask for more, or add smaller candidates."
    )
