"""Prints by how much the peak memory of a process grows while a stack of blocks is quantized.

Run with MALLOC_MMAP_THRESHOLD_ small, so that freed tensors go back to the system at once.
"""

from __future__ import annotations

import json
import resource
import sys

import torch
from torch import Tensor, nn

from evenkeel.quantizers.methods.base import quantized_on
from evenkeel.quantizers.methods.catalogue import method_from
from evenkeel.quantizers.workspace.calibration_set import kept
from evenkeel.quantizers.workspace.workspace import Workspace

ROWS, TOKENS, CALLS = 32, 16, 4


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def quantized(method: dict, width: int, depth: int) -> dict[str, int]:
    net = Stack(width, depth)
    calls = kept([((torch.randn(ROWS, TOKENS, width),), {}) for _ in range(CALLS)])
    before = peak()
    quantized_on(Workspace(net, calls), method_from(method))
    per_token = width + 3 * width + width  # what enters both layers, and what comes out
    return {
        "growth": peak() - before,
        "weights": 4 * sum(p.numel() for p in net.parameters()),
        "activations": 4 * CALLS * ROWS * TOKENS * per_token,
    }


if __name__ == "__main__":
    method = json.loads(sys.argv[1])
    quantized(method, 32, 2)  # what libraries allocate once
    print(json.dumps(quantized(method, int(sys.argv[2]), int(sys.argv[3]))))
