"""The gallery: one page that needs nothing else, one picture, the right pixels in the right places."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from evenkeel.zoo.making.gallery import (
    ABREAST,
    FULL_PRECISION,
    GAP,
    HEADING,
    LABEL,
    QUANTIZED,
    SHOWN,
    SIDE,
    main,
    mosaic,
)

ARMS = (FULL_PRECISION, *QUANTIZED)


def plain(count, start, side):
    """Pictures of one grey each: arm -> (count, 3, side, side)."""
    greys = torch.arange(count * len(ARMS), dtype=torch.uint8).reshape(len(ARMS), count) + start
    return {
        a: g[:, None, None, None].expand(-1, 3, side, side)
        for a, g in zip(ARMS, greys, strict=True)
    }


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_picture_of_the_mosaic_is_where_its_arm_and_prompt_are(count):
    twins = {f"twin {i}": plain(SHOWN + 1, 40 * i, 32 << i % 2) for i in range(count)}
    pixels = np.array(Image.open(io.BytesIO(mosaic(twins))).convert("L"))
    block = HEADING + len(ARMS) * SIDE
    assert pixels.shape[0] == -(-count // ABREAST) * block + GAP
    for i, made in enumerate(twins.values()):
        left = i % ABREAST * (LABEL + SHOWN * SIDE + GAP) + LABEL
        top = i // ABREAST * block + HEADING
        for j, arm in enumerate(ARMS):
            for k in range(SHOWN):
                y, x = top + j * SIDE, left + k * SIDE
                shown = np.unique(pixels[y : y + SIDE, x : x + SIDE])
                assert shown.tolist() == [int(made[arm][k, 0, 0, 0])]


@pytest.mark.slow
def test_the_command_writes_a_page_that_needs_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gallery", "flux-schnell", "--out", str(tmp_path)])
    main()
    assert capsys.readouterr().out == "flux-schnell\n"
    with Image.open(tmp_path / "gallery.png") as picture:
        assert picture.size[0] == LABEL + SHOWN * SIDE + GAP
    page = (tmp_path / "gallery.html").read_text()
    assert "twin of FLUX.1 [schnell]" in page and "FlowMatchEulerDiscreteScheduler" in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    (grid,) = re.findall(r"data:image/png;base64,([^\"]+)", page)
    assert Image.open(io.BytesIO(base64.b64decode(grid))).size[0] > 12 * 32
