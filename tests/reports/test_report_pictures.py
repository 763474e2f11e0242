"""Pictures of a report: small ones exact, large ones within their bytes."""

from __future__ import annotations

from pathlib import Path

import torch
from report_inputs import make_results
from torch import Tensor

import evenkeel.reports as reports


def large(seed: int) -> Tensor:
    """64 pictures of 256 x 256, as busy as noise of 4 pixels."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 256, (64, 3, 64, 64), dtype=torch.uint8, generator=generator)
    return small.repeat_interleave(4, 2).repeat_interleave(4, 3)


def test_64_prompts_stay_below_5_mb(tmp_path: Path) -> None:
    results = make_results() | {"calibration": None}
    images = {name: large(i) for i, name in enumerate(("full-precision", "quantized", "q-drift"))}
    prompts = [f"picture {i}" for i in range(64)]
    path = reports.write_report(tmp_path / "r.html", results, images, prompts)
    text = Path(path).read_text(encoding="utf-8")
    assert 500_000 < len(text.encode()) < 5_000_000
    assert text.count("data:image/jpeg;base64,") == 3 * 64
