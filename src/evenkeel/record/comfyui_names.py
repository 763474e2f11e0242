"""Where the layers of a diffusers denoiser stand in ComfyUI's model of the same architecture.

ComfyUI keeps the names of the original checkpoints, and their fused layers: q, k and v are one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Place(NamedTuple):
    """A layer, or some rows of one.

    Attributes:
        layer: its name in ComfyUI's model.
        part: which of the layer's parts, counted from 0 in the order of its rows.
        widths: outputs of every part over the layer's features, for parts that no adapter tells.
        halves: the two halves of the rows are exchanged where there are twice as many as features:
            ComfyUI's last modulation gives shift and scale, diffusers' gives scale and shift.

    """

    layer: str
    part: int = 0
    widths: tuple[int, ...] = (1,)
    halves: bool = False


Namer = Callable[[str], "Place | None"]
_QKV = (1, 1, 1)


def place_of(pipeline_class: str) -> Namer | None:
    """What names the layers of this pipeline's denoiser; None where the architecture is not known.

    >>> place_of("FluxPipeline")("single_transformer_blocks.7.attn.to_k")
    Place(layer='single_blocks.7.linear1', part=1, widths=(1, 1, 1, 4), halves=False)
    >>> place_of("FluxPipeline")("some.other.layer"), place_of("SanaPipeline")
    (None, None)

    """
    found = (n for pattern, n in ARCHITECTURES.items() if re.match(pattern, pipeline_class))
    return next(found, None)


def _table(places: Mapping[str, Place | str]) -> Namer:
    """By name; ``*`` is the number of a block, ``**`` all that follows."""
    rules = [
        (re.compile(re.escape(key).replace(r"\*\*", "(.+)").replace(r"\*", r"(\d+)")), place)
        for key, place in places.items()
    ]

    def named(name: str) -> Place | None:
        for pattern, found in rules:
            if match := pattern.fullmatch(name):
                place = Place(found) if isinstance(found, str) else found
                parts = re.split(r"\*\*|\*", place.layer)
                numbers = [*match.groups(), ""]
                layer = "".join(a + b for a, b in zip(parts, numbers, strict=True))
                return place._replace(layer=layer)
        return None

    return named


def _parts(
    source: str, layer: str, names: tuple[str, ...], widths: tuple[int, ...] = _QKV
) -> dict[str, Place | str]:
    return {f"{source}.{name}": Place(layer, i, widths) for i, name in enumerate(names)}


_Q, _ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
_LAST: dict[str, Place | str] = {
    "norm_out.linear": Place("final_layer.adaLN_modulation.1", halves=True),
    "proj_out": "final_layer.linear",
}


def _embedder(
    source: str, to: str, first: str = "in_layer", last: str = "out_layer"
) -> dict[str, str]:
    return {f"{source}.linear_1": f"{to}.{first}", f"{source}.linear_2": f"{to}.{last}"}


def _mlp(source: str, to: str) -> dict[str, str]:
    return _embedder(source, f"{to}.mlp", "0", "2")


_STREAMS: dict[str, Place | str] = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    **_parts("transformer_blocks.*.attn", "double_blocks.*.img_attn.qkv", _Q),
    **_parts("transformer_blocks.*.attn", "double_blocks.*.txt_attn.qkv", _ADDED),
    "transformer_blocks.*.attn.to_out.0": "double_blocks.*.img_attn.proj",
    "transformer_blocks.*.attn.to_add_out": "double_blocks.*.txt_attn.proj",
    **_LAST,
}

_FLUX: dict[str, Place | str] = {
    **_STREAMS,
    **_embedder("time_text_embed.timestep_embedder", "time_in"),
    **_embedder("time_text_embed.guidance_embedder", "guidance_in"),
    **_embedder("time_text_embed.text_embedder", "vector_in"),
    "transformer_blocks.*.norm1.linear": "double_blocks.*.img_mod.lin",
    "transformer_blocks.*.norm1_context.linear": "double_blocks.*.txt_mod.lin",
    "transformer_blocks.*.ff.net.0.proj": "double_blocks.*.img_mlp.0",
    "transformer_blocks.*.ff.net.2": "double_blocks.*.img_mlp.2",
    "transformer_blocks.*.ff_context.net.0.proj": "double_blocks.*.txt_mlp.0",
    "transformer_blocks.*.ff_context.net.2": "double_blocks.*.txt_mlp.2",
    "single_transformer_blocks.*.norm.linear": "single_blocks.*.modulation.lin",
    **_parts(
        "single_transformer_blocks.*",
        "single_blocks.*.linear1",
        (*(f"attn.{name}" for name in _Q), "proj_mlp"),
        (1, 1, 1, 4),
    ),
    "single_transformer_blocks.*.proj_out": "single_blocks.*.linear2",
}

_FLUX2: dict[str, Place | str] = {
    **_STREAMS,
    **_embedder("time_guidance_embed.timestep_embedder", "time_in"),
    **_embedder("time_guidance_embed.guidance_embedder", "guidance_in"),
    **{f"{m}.linear": f"{m}.lin" for m in ("single_stream_modulation",)},
    **{
        f"double_stream_modulation_{s}.linear": f"double_stream_modulation_{s}.lin"
        for s in ("img", "txt")
    },
    "transformer_blocks.*.ff.linear_in": "double_blocks.*.img_mlp.0",
    "transformer_blocks.*.ff.linear_out": "double_blocks.*.img_mlp.2",
    "transformer_blocks.*.ff_context.linear_in": "double_blocks.*.txt_mlp.0",
    "transformer_blocks.*.ff_context.linear_out": "double_blocks.*.txt_mlp.2",
    "single_transformer_blocks.*.attn.to_qkv_mlp_proj": "single_blocks.*.linear1",
    "single_transformer_blocks.*.attn.to_out": "single_blocks.*.linear2",
}

_SD3: dict[str, Place | str] = {
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    **_mlp("time_text_embed.timestep_embedder", "t_embedder"),
    **_mlp("time_text_embed.text_embedder", "y_embedder"),
    **_parts("transformer_blocks.*.attn", "joint_blocks.*.x_block.attn.qkv", _Q),
    **_parts("transformer_blocks.*.attn2", "joint_blocks.*.x_block.attn2.qkv", _Q),
    **_parts("transformer_blocks.*.attn", "joint_blocks.*.context_block.attn.qkv", _ADDED),
    "transformer_blocks.*.attn.to_out.0": "joint_blocks.*.x_block.attn.proj",
    "transformer_blocks.*.attn2.to_out.0": "joint_blocks.*.x_block.attn2.proj",
    "transformer_blocks.*.attn.to_add_out": "joint_blocks.*.context_block.attn.proj",
    "transformer_blocks.*.norm1.linear": "joint_blocks.*.x_block.adaLN_modulation.1",
    "transformer_blocks.*.norm1_context.linear": Place(
        "joint_blocks.*.context_block.adaLN_modulation.1", halves=True
    ),
    "transformer_blocks.*.ff.net.0.proj": "joint_blocks.*.x_block.mlp.fc1",
    "transformer_blocks.*.ff.net.2": "joint_blocks.*.x_block.mlp.fc2",
    "transformer_blocks.*.ff_context.net.0.proj": "joint_blocks.*.context_block.mlp.fc1",
    "transformer_blocks.*.ff_context.net.2": "joint_blocks.*.context_block.mlp.fc2",
    **_LAST,
}

_PIXART: dict[str, Place | str] = {
    "pos_embed.proj": "x_embedder.proj",
    **_mlp("adaln_single.emb.timestep_embedder", "t_embedder"),
    **_mlp("adaln_single.emb.resolution_embedder", "csize_embedder"),
    **_mlp("adaln_single.emb.aspect_ratio_embedder", "ar_embedder"),
    "adaln_single.linear": "t_block.1",
    **_embedder("caption_projection", "y_embedder.y_proj", "fc1", "fc2"),
    **_parts("transformer_blocks.*.attn1", "blocks.*.attn.qkv", _Q),
    "transformer_blocks.*.attn1.to_out.0": "blocks.*.attn.proj",
    "transformer_blocks.*.attn2.to_q": "blocks.*.cross_attn.q_linear",
    **_parts("transformer_blocks.*.attn2", "blocks.*.cross_attn.kv_linear", _Q[1:], (1, 1)),
    "transformer_blocks.*.attn2.to_out.0": "blocks.*.cross_attn.proj",
    "transformer_blocks.*.ff.net.0.proj": "blocks.*.mlp.fc1",
    "transformer_blocks.*.ff.net.2": "blocks.*.mlp.fc2",
    "proj_out": "final_layer.linear",
}

_Z_IMAGE: dict[str, Place | str] = {
    "all_x_embedder.2-1": "x_embedder",
    "all_final_layer.2-1.**": "final_layer.**",
}
for _blocks in ("layers", "noise_refiner", "context_refiner"):
    _Z_IMAGE |= _parts(f"{_blocks}.*.attention", f"{_blocks}.*.attention.qkv", _Q)
    _Z_IMAGE[f"{_blocks}.*.attention.to_out.0"] = f"{_blocks}.*.attention.out"
    _Z_IMAGE |= {
        f"{_blocks}.*.{m}.**": f"{_blocks}.*.{m}.**" for m in ("feed_forward", "adaLN_modulation")
    }
_Z_IMAGE |= {f"{m}.**": f"{m}.**" for m in ("cap_embedder", "t_embedder")}

_WAN = {
    **_embedder("condition_embedder.time_embedder", "time_embedding", "0", "2"),
    **_embedder("condition_embedder.text_embedder", "text_embedding", "0", "2"),
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    **{
        f"blocks.*.{old}.to_{letter}{end}": f"blocks.*.{new}.{place}"
        for old, new in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for letter, end, place in (
            ("q", "", "q"),
            ("k", "", "k"),
            ("v", "", "v"),
            ("out", ".0", "o"),
        )
    },
    "blocks.*.attn2.add_k_proj": "blocks.*.cross_attn.k_img",
    "blocks.*.attn2.add_v_proj": "blocks.*.cross_attn.v_img",
    "blocks.*.ffn.net.0.proj": "blocks.*.ffn.0",
    "blocks.*.ffn.net.2": "blocks.*.ffn.2",
    "proj_out": "head.head",
}

# ComfyUI's model of Qwen-Image has the names of diffusers.
_QWEN = {
    **{f"{m}.**": f"{m}.**" for m in ("time_text_embed", "norm_out", "transformer_blocks")},
    **{m: m for m in ("img_in", "txt_in", "proj_out")},
}


def _unet(levels: int, attentions_up: tuple[int, ...], per_level: int = 2) -> Namer:
    """Down and up blocks are numbered through in the original names.

    Args:
        levels: resolutions.
        attentions_up: up blocks that have attention; the upsampler stands behind it.
        per_level: residual blocks per level on the way down; one more on the way up.

    """
    step = per_level + 1
    table: dict[str, Place | str] = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        **_embedder("time_embedding", "time_embed", "0", "2"),
        **_embedder("add_embedding", "label_emb.0", "0", "2"),
        "mid_block.attentions.0.**": "middle_block.1.**",
        **_residual("mid_block.resnets.0", "middle_block.0"),
        **_residual("mid_block.resnets.1", "middle_block.2"),
    }
    for level in range(levels):
        down, up = f"down_blocks.{level}", f"up_blocks.{level}"
        for i in range(per_level):
            to = f"input_blocks.{1 + step * level + i}"
            table |= {f"{down}.attentions.{i}.**": f"{to}.1.**"}
            table |= _residual(f"{down}.resnets.{i}", f"{to}.0")
        for i in range(step):
            to = f"output_blocks.{step * level + i}"
            table |= {f"{up}.attentions.{i}.**": f"{to}.1.**"}
            table |= _residual(f"{up}.resnets.{i}", f"{to}.0")
        table[f"{down}.downsamplers.0.conv"] = f"input_blocks.{step * (level + 1)}.0.op"
        behind = 2 if level in attentions_up else 1
        table[f"{up}.upsamplers.0.conv"] = f"output_blocks.{step * level + per_level}.{behind}.conv"
    return _table(table)


def _residual(source: str, to: str) -> dict[str, str]:
    return {
        f"{source}.conv1": f"{to}.in_layers.2",
        f"{source}.conv2": f"{to}.out_layers.3",
        f"{source}.time_emb_proj": f"{to}.emb_layers.1",
        f"{source}.conv_shortcut": f"{to}.skip_connection",
    }


#: Start of the pipeline's class name -> names; the first that fits.
ARCHITECTURES: dict[str, Namer] = {
    "Flux2": _table(_FLUX2),
    r"Flux(?!\d)": _table(_FLUX),
    "StableDiffusion3": _table(_SD3),
    "StableDiffusionXL": _unet(3, (0, 1)),
    "StableDiffusion(?!Cascade)|LatentConsistency": _unet(4, (1, 2, 3)),
    "PixArt": _table(_PIXART),
    "QwenImage": _table(_QWEN),
    "ZImage": _table(_Z_IMAGE),
    "Wan": _table(_WAN),
}
#: The same in words.
KNOWN = "FLUX, FLUX.2, SD 1 and 2, SDXL, SD 3, PixArt, Qwen-Image, Z-Image, Wan"
