"""Adapters as factors of the layers that ComfyUI's model has, q, k and v in one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from evenkeel.errors import RecordError
from evenkeel.record.comfyui_names import KNOWN, Place, place_of

Pair = tuple[
    Tensor, Tensor
]  # down (r, F) and up (O, r); of a convolution (r, C, k, k), (O, r, 1, 1)


def in_comfyui(pairs: Iterable[tuple[str, Pair]], pipeline_class: str) -> dict[str, Pair]:
    """Factors by ComfyUI's layer; layers that are fused there have one pair of summed rank.

    ``W_qkv + B A`` with ``A = [A_q; A_k; A_v]`` and ``B = diag(B_q, B_k, B_v)`` is what q, k and v
    compute apart, so that nothing is approximated.

    Args:
        pairs: factors by diffusers' layer.
        pipeline_class: of diffusers; says which architecture it is.

    Raises:
        RecordError: an architecture or a layer whose place is not known, or a fused layer of which
            parts are missing and have sizes that the others do not tell.

    """
    namer = place_of(pipeline_class)
    if namer is None:
        raise RecordError(
            f"where ComfyUI keeps the layers of a {pipeline_class} is not known; expected one of {KNOWN}. "
            f"Export another layout, and rename its layers."
        )
    parts: dict[str, dict[int, tuple[Place, Pair]]] = defaultdict(dict)
    unknown = []
    for name, pair in pairs:
        place = namer(name)
        if place is None:
            unknown.append(name)
        else:
            parts[place.layer][place.part] = place, _in_order(pair, place)
    if unknown:
        raise RecordError(
            f"where ComfyUI keeps {', '.join(sorted(unknown)[:5])} of a {pipeline_class} is not known "
            f"({len(unknown)} layers). Export another layout, and rename them."
        )
    return {layer: _fused(layer, found) for layer, found in parts.items()}


def _in_order(pair: Pair, place: Place) -> Pair:
    """Rows in ComfyUI's order."""
    down, up = pair
    if place.halves and len(up) == 2 * down.shape[1]:
        up = torch.cat(up.chunk(2)[::-1])
    return down, up


def _fused(layer: str, found: dict[int, tuple[Place, Pair]]) -> Pair:
    """One pair for the layer; parts without an adapter have rows of zeros."""
    widths = next(iter(found.values()))[0].widths
    if len(widths) == 1:
        return found[0][1]
    features = next(iter(found.values()))[1][0].shape[1]
    expected = [width * features for width in widths]
    sizes = [len(found[i][1][1]) if i in found else rows for i, rows in enumerate(expected)]
    if len(found) < len(widths) and sizes != expected:
        raise RecordError(
            f"{layer} is {len(widths)} layers of diffusers, {len(found)} of which have an adapter; expected "
            f"{expected} outputs, found {sizes}, so that the sizes of the others are not known."
        )
    downs, ups = [], []
    for i in sorted(found):
        down, up = found[i][1]
        rows = up.new_zeros(sum(sizes), up.shape[1])
        rows[sum(sizes[:i]) : sum(sizes[: i + 1])] = up
        downs.append(down)
        ups.append(rows)
    return torch.cat(downs), torch.cat(ups, 1)
