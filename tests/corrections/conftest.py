"""Fixtures that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from qncd_hosts import (
    lent,
)
from tiny_pipelines import ALL, TinyPipeline

# ---- real pipelines


@pytest.fixture
def sdxl(sdxl_pipeline: TinyPipeline) -> Iterator[TinyPipeline]:
    yield from lent(sdxl_pipeline)


@pytest.fixture(scope="module")
def sdxl_pipeline() -> TinyPipeline:
    return ALL["sdxl"]()
