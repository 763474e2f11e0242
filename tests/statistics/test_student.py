"""How sure a mean is."""

import pytest
import torch

from evenkeel.statistics.student import student_margin


def test_a_margin_is_students():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert student_margin(values) == pytest.approx(2.353363 * 1.290994 / 2, rel=1e-5)


def test_one_value_is_never_sure():
    assert student_margin(torch.tensor([5.0])) == float("inf")
