"""Fixtures that the tests of this folder share."""

from __future__ import annotations

import sys

import pytest
from step_laws import (
    Noise,
)


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> Noise:
    stream = Noise()
    for name, module in list(sys.modules.items()):
        if name.startswith("diffusers.schedulers.scheduling_") and hasattr(module, "randn_tensor"):
            monkeypatch.setattr(module, "randn_tensor", stream.tensor)
    return stream
