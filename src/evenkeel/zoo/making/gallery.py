"""``python -m evenkeel.zoo.making.gallery``: each twin at full precision and quantized, from the same noise.

For each twin three rows of pictures (full precision, W4A4, W3A4), a column for each prompt. Writes
``gallery.html``, which needs nothing else and has the prompts, and ``gallery.png``, with fewer columns.
"""

from __future__ import annotations

import argparse
import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from evenkeel import zoo
from evenkeel.comparing.generation import Arm, generate
from evenkeel.hosts.pipeline.pipelines import denoiser_of
from evenkeel.hosts.run import Run
from evenkeel.quantizers import QuantizerSpec, quantize_module
from evenkeel.reports.grid import new_figure
from evenkeel.reports.plots import image_grid
from evenkeel.reports.style import CSS
from evenkeel.storage import write_atomically
from evenkeel.zoo.making.card import fewer_colours
from evenkeel.zoo.pictures import KINDS

FULL_PRECISION = "full precision"
QUANTIZED = {"W4A4": "w4a4-g32-r16", "W3A4": "w3a4-g32-r16"}
SEED, COLUMNS = 51, 12
# Of the PNG: pictures of a twin, twins beside each other, and lengths in pixels.
SHOWN, ABREAST, SIDE = 7, 2, 64
LABEL, HEADING, GAP, DPI = 100, 30, 14, 100


def pictures_of(name: str, count: int) -> tuple[dict[str, Tensor], list[str]]:
    """The twin's pictures, arm -> (count, 3, size, size) uint8, and their prompts; same noise in all arms."""
    twin = zoo.twin(name)
    pipeline = zoo.load(name)
    prompts = KINDS[twin.pictures].prompts(count, SEED)
    run = Run(
        pipeline,
        prompts,
        twin.num_inference_steps,
        guidance_scale=twin.guidance_scale,
        seed=SEED,
        batch_size=count,
    )
    denoisers = {FULL_PRECISION: denoiser_of(pipeline)}
    for label, text in QUANTIZED.items():
        denoisers[label] = quantize_module(denoiser_of(pipeline), QuantizerSpec.parse(text))[0]
    made = {}
    for label, denoiser in denoisers.items():
        arm = Arm(label, denoiser)
        made[label], _ = generate(run, arm)
    return made, [str(p) for p in prompts]


def mosaic(twins: Mapping[str, Mapping[str, Tensor]]) -> bytes:
    """PNG: twins in two columns; each has a row for every arm and a column for every prompt."""
    arms = [FULL_PRECISION, *QUANTIZED]
    block_width, block_height = LABEL + SHOWN * SIDE + GAP, HEADING + len(arms) * SIDE
    width = min(len(twins), ABREAST) * block_width
    height = -(-len(twins) // ABREAST) * block_height + GAP
    figure = new_figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    for i, (name, made) in enumerate(twins.items()):
        left, top = i % ABREAST * block_width, i // ABREAST * block_height + HEADING
        figure.text(
            (left + LABEL) / width, 1 - (top - 5) / height, name, fontsize=10, weight="bold"
        )
        for j, arm in enumerate(arms):
            row = torch.cat(list(made[arm][:SHOWN]), 2)
            scale = SIDE // row.shape[1]
            large = row.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
            bottom = height - top - (j + 1) * SIDE
            figure.figimage(large.permute(1, 2, 0).numpy(), left + LABEL, bottom, origin="upper")
            figure.text(
                (left + LABEL - 8) / width,
                (bottom + SIDE / 2) / height,
                arm,
                fontsize=9,
                ha="right",
                va="center",
            )
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return out.getvalue()


def page(twins: Mapping[str, Mapping[str, Tensor]], prompts: Mapping[str, Sequence[str]]) -> str:
    """One self-contained HTML page with a grid for each twin."""
    sections = []
    for name, made in twins.items():
        twin = zoo.twin(name)
        grid = base64.b64encode(
            image_grid(made, prompts[name], scale=96 // KINDS[twin.pictures].size)
        ).decode()
        scheduler = next(iter(twin.schedulers.values())).scheduler
        guidance = "" if twin.guidance_scale is None else f", guidance {twin.guidance_scale}"
        sections.append(
            f"<h2>{escape(name)}: a twin of {escape(twin.original)}</h2>"
            f'<figure class="grid"><div class="scroll"><img alt="samples of {escape(name)}" '
            f'src="data:image/png;base64,{grid}"></div><figcaption>{escape(twin.pipeline)}, '
            f"{twin.num_inference_steps} steps of {escape(scheduler)}{guidance}; the same noise in "
            f"every column.</figcaption></figure>"
        )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>evenkeel: the zoo</title><style>{CSS}</style></head><body><main><header>"
        "<h1>The zoo, at full precision and quantized</h1><p>Small trained twins of the papers' "
        "models. Quantized by rounding to nearest in groups of 32 beside a low-rank branch of "
        f"rank 16 ({', '.join(QUANTIZED)}), not corrected.</p></header>"
        f"{''.join(sections)}</main></body></html>\n"
    )


def main() -> None:
    """Parse the command line and write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="twins (default: all whose weights are here)")
    parser.add_argument("--out", type=Path, default=Path("runs/gallery"), help="folder")
    options = parser.parse_args()
    names = options.names or [n for n in zoo.TWINS if zoo.find(n)]
    twins, prompts = {}, {}
    for name in names:
        twins[name], prompts[name] = pictures_of(name, COLUMNS)
        print(name, flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    picture = Image.open(io.BytesIO(mosaic(twins)))
    fewer_colours(picture).save(options.out / "gallery.png", optimize=True)
    write_atomically(options.out / "gallery.html", page(twins, prompts))


if __name__ == "__main__":
    main()
