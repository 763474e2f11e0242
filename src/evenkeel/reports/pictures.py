"""The pictures of a report as a table: prompts in rows, arms in columns, within a number of bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

from torch import Tensor

from evenkeel.reports.grid import check_images

MOST_BYTES = 3_000_000  # of all pictures; as text in the page they take a third more
EXACT_WIDTH = 64  # up to here a picture stays as it is, to the bit
PROBED = 6  # pictures of every arm that say how large files become
SPREAD = 1.2  # by which the others may be larger
WIDTHS = (768, 512, 384, 256, 192, 128, 96)


def encoded(images: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Every picture as a ``data:`` address: small ones exact, large ones as large as the bytes allow."""
    count, _, _, width = next(iter(images.values())).shape
    tried = [image for each in images.values() for image in each[:: max(1, count // PROBED)]]
    most = MOST_BYTES / (len(images) * count) / SPREAD
    for wide in (None, *(w for w in WIDTHS if w < width)):
        chosen = wide
        if sum(len(_file(image, wide)) for image in tried) <= most * len(tried):
            break
    made = {arm: [_file(image, chosen) for image in each] for arm, each in images.items()}
    kind = "png" if width <= EXACT_WIDTH else "jpeg"
    start = f"data:image/{kind};base64,"
    return {
        arm: [start + base64.b64encode(file).decode("ascii") for file in files]
        for arm, files in made.items()
    }


def _file(image: Tensor, width: int | None) -> bytes:
    from PIL import Image

    picture = Image.fromarray(image.detach().cpu().permute(1, 2, 0).contiguous().numpy())
    if width is not None:
        picture = picture.resize((width, max(1, round(width * picture.height / picture.width))))
    out = io.BytesIO()
    if image.shape[-1] <= EXACT_WIDTH:
        picture.save(out, "PNG", optimize=True)
    else:
        picture.save(out, "JPEG", quality=85)
    return out.getvalue()


def picture_table(images: Mapping[str, Tensor], prompts: Sequence[str]) -> str:
    """The table, what chooses of it, and the place where one picture is shown large.

    Raises:
        EvenkeelError: pictures that do not fit the prompts.

    """
    check_images(images, prompts)
    files = encoded(images)
    size = next(iter(images.values())).shape[-1]
    kind = "pictures exact" if size <= EXACT_WIDTH else "pictures"
    heads = "".join(f'<th scope="col">{escape(arm)}</th>' for arm in images)
    rows = "\n".join(
        f'<tr><th scope="row">{escape(prompt)}</th>'
        + "".join(_cell(arm, prompt, files[arm][i]) for arm in images)
        + "</tr>"
        for i, prompt in enumerate(prompts)
    )
    boxes = "".join(
        f'<label><input type="checkbox" value="{i}" checked>{escape(arm)}</label>'
        for i, arm in enumerate(images, 1)
    )
    return (
        f'<div class="controls" hidden><input type="search" aria-label="Search the prompts" '
        f'placeholder="search the prompts"><output></output><fieldset><legend>Arms</legend>{boxes}'
        f'</fieldset></div>\n<div class="scroll"><table class="{kind}"><caption>Each row is one prompt, '
        "each column one arm, the noise is the same along a row; a click enlarges.</caption>"
        f'<thead><tr><th scope="col">prompt</th>{heads}</tr></thead>\n<tbody>{rows}</tbody></table></div>'
        f'\n<dialog class="{kind}" aria-label="One picture"><img alt=""><p></p>'
        "<button autofocus>close</button></dialog>"
    )


def _cell(arm: str, prompt: str, address: str) -> str:
    return (
        f'<td><button type="button"><img loading="lazy" alt="{escape(f"{arm}: {prompt}")}" '
        f'src="{address}"></button></td>'
    )
