"""Fixtures that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from readout_rigs import (
    Rig,
    lent,
    shared_rig,
)

from evenkeel.corrections import Readout


@pytest.fixture
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    yield from lent(request.param)


@pytest.fixture
def pixart() -> Iterator[Rig]:
    yield from lent("pixart_sigma")


@pytest.fixture
def wan() -> Iterator[Rig]:
    yield from lent("wan")


@pytest.fixture
def flux() -> Iterator[Rig]:
    yield from lent("flux")


# ---- forms


@pytest.fixture(scope="module")
def shared_change() -> Readout:
    return shared_rig("pixart_sigma").refit(form="shared")
