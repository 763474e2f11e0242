"""Codes of a few bits, one after another without gaps, as files hold them."""

from __future__ import annotations

import torch
from torch import Tensor

from evenkeel.errors import QuantizationError


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes of ``bits`` bits one after another, without gaps, lowest bit first.

    Returns:
        uint8, ceil(codes.numel() bits / 8) bytes.

    Raises:
        QuantizationError: not uint8, or a code of more bits.

    >>> pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4)
    tensor([33,  3], dtype=torch.uint8)

    """
    if (
        codes.dtype != torch.uint8
        or not 2 <= bits <= 8
        or int(codes.max().item() if codes.numel() else 0) >> bits
    ):
        raise QuantizationError(
            f"Codes to pack are uint8 of 2 to 8 bits, got {codes.dtype} with {bits} bits."
        )
    count = codes.numel()
    # Eight codes are `bits` whole bytes, and fit in one 64-bit word.
    eights = torch.nn.functional.pad(codes.flatten(), (0, -count % 8)).reshape(-1, 8).long()
    words = (eights << torch.arange(0, 8 * bits, bits, device=codes.device)).sum(-1)
    return words.view(torch.uint8).reshape(-1, 8)[:, :bits].flatten()[: -(-count * bits // 8)]


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`pack`: ``count`` codes, flat, uint8.

    Raises:
        QuantizationError: the number of bytes does not fit ``count``.

    >>> unpack(torch.tensor([33, 3], dtype=torch.uint8), 4, 3)
    tensor([1, 2, 3], dtype=torch.uint8)

    """
    size = -(-count * bits // 8)
    if packed.dtype != torch.uint8 or packed.shape != (size,) or not 2 <= bits <= 8:
        raise QuantizationError(
            f"{count} codes of {bits} bits are {size} bytes (uint8), got {tuple(packed.shape)} "
            f"of {packed.dtype}."
        )
    if 8 % bits == 0:  # whole codes in every byte
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return ((packed[:, None] >> shifts) & ((1 << bits) - 1)).flatten()[:count]
    rows = torch.nn.functional.pad(packed, (0, -size % bits)).reshape(-1, bits)
    words = torch.nn.functional.pad(rows, (0, 8 - bits)).view(torch.int64)
    codes = (words >> torch.arange(0, 8 * bits, bits, device=packed.device)) & ((1 << bits) - 1)
    return codes.flatten()[:count].to(torch.uint8)
