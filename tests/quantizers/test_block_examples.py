"""Calls of a block as minibatches, rows of different calls mixed where that is possible."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evenkeel.errors import QuantizationError
from evenkeel.quantizers.methods.block_examples import Examples
from evenkeel.quantizers.workspace.calibration_set import CalibrationSet, kept
from evenkeel.quantizers.workspace.workspace import BlockCall


def calls(rows: int = 8, count: int = 4, dtype: torch.dtype = torch.float32) -> CalibrationSet:
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(dtype)  # noqa: E731
    return kept([((draw(rows, 3, 4),), {"shift": draw(rows, 1, 32)}) for _ in range(count)])


class Rotary(nn.Module):
    """Rows are independent; the table belongs to no row."""

    def forward(self, x: Tensor, table: Tensor, mode: str = "a") -> tuple[Tensor, Tensor]:
        return x * table, x.sum(1)


class Coupled(nn.Module):
    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return x - x.mean(0)


def recorded(block: nn.Module, rows: tuple[int, ...], table: Any) -> list[BlockCall]:
    g = torch.Generator().manual_seed(3)
    given = [(torch.randn(r, 5, 6, generator=g), table(i)) for i, r in enumerate(rows)]
    return [BlockCall(args, {}, block(*args)) for args in given]


def test_mixed_rows_are_the_rows_of_the_calls() -> None:
    made = recorded(Rotary(), (4, 3, 4), lambda _: torch.full((5, 6), 2.0))
    examples = Examples(made, [call.output for call in made], Rotary())
    assert examples.mixed
    assert examples.count == 11
    ((x, table), named), wanted = examples.at(torch.tensor([10, 0, 5]))
    expected = [made[2].arguments[0][3], made[0].arguments[0][0], made[1].arguments[0][1]]
    assert torch.equal(x, torch.stack(expected))
    assert torch.equal(table, made[0].arguments[1])
    assert named == {}
    assert [t.shape for t in wanted] == [(3, 5, 6), (3, 6)]
    assert torch.equal(wanted[0], x * table)
    assert sorted(torch.cat(list(examples.all(4))).tolist()) == list(range(11))


@pytest.mark.parametrize(
    ("block", "rows", "table"),
    [
        (Rotary(), (4, 4), lambda i: torch.full((5, 6), float(i))),  # a table of its own per call
        (Rotary(), (5, 5), lambda _: torch.arange(30.0).reshape(5, 6)),  # as long as the batch
        (Coupled(), (4, 4), lambda _: torch.zeros(1)),  # rows see each other
    ],
    ids=["table", "ambiguous", "coupled"],
)
def test_calls_that_cannot_be_mixed_stay_whole(
    block: nn.Module, rows: tuple[int, ...], table: Any
) -> None:
    made = recorded(block, rows, table)
    examples = Examples(made, [call.output for call in made], block)
    assert not examples.mixed
    assert examples.count == len(rows)
    ((x, own), _), _ = examples.at(torch.tensor([1]))
    assert torch.equal(x, made[1].arguments[0])
    assert torch.equal(own, made[1].arguments[1])
    assert [i.tolist() for i in examples.all(32)] == [[0], [1]]


def test_a_block_without_output_to_fit_is_refused() -> None:
    call = BlockCall((torch.ones(1),), {}, torch.tensor([1]))
    with pytest.raises(QuantizationError, match="no floating point tensor"):
        Examples([call], [call.output], nn.Identity())
