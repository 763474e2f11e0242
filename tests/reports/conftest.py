"""Fixtures that the tests of this folder share."""

from __future__ import annotations

import pytest
from report_inputs import (
    make_images,
    make_results,
)


@pytest.fixture
def results():
    return make_results()


@pytest.fixture
def images():
    return make_images()
