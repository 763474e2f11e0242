"""Which layers are meant by a few patterns, and those that papers leave in full precision."""

from __future__ import annotations

from fnmatch import fnmatchcase

from evenkeel.errors import QuantizationError

# What post-training quantization papers leave in 16 bits: everything that turns conditions into
# vectors, that modulates by them, that enters or leaves the latent space, or that resamples.
# "*" spans dots, so "proj_out" is the denoiser's head and never a block's own `proj_out`.
DEFAULT_SKIP: tuple[str, ...] = (
    # time, guidance, text, caption and patch embedders, at any depth
    "*_embed",
    "*_embedder",
    "*_embedding",
    "*time_extra_emb",
    "*time_emb_proj",
    "*time_proj",
    "time_step_proj",
    "caption_projection",
    "encoder_hid_proj",
    # adaptive layer norm and other modulation
    "adaln_single",
    "*.norm*",
    "*modulation*",
    "distilled_guidance_layer",
    "*_mod",
    # the denoiser's first and last layer
    "proj_in",
    "img_in",
    "txt_in",
    "conv_in",
    "norm_out",
    "proj_out",
    "proj_out_1",
    "proj_out_2",
    "conv_out",
    # resampling and shortcuts of UNets
    "*downsamplers",
    "*upsamplers",
    "*conv_shortcut",
)


def first_match(name: str, patterns: tuple[str, ...]) -> str | None:
    """The first pattern that names this module or one it lies in, or None.

    A pattern is an ``fnmatch`` pattern, case sensitive, for the *whole* dotted name; ``*`` also
    matches dots. What lies below a matched module is matched too.

    >>> first_match("proj_out", ("proj_out",)), first_match("blocks.0.proj_out", ("proj_out",))
    ('proj_out', None)
    >>> first_match("time_embed.linear_1", ("*_embed",))
    '*_embed'
    """
    for pattern in patterns:
        if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*"):
            return pattern
    return None


def check_patterns(name: str, patterns: object) -> None:
    """Raise unless these are patterns."""
    # A bare string would be taken apart into one-letter patterns.
    if not isinstance(patterns, tuple) or not all(isinstance(p, str) and p for p in patterns):
        raise QuantizationError(
            f"{name} must be a tuple of non-empty name patterns such as ('*.attn2',), "
            f"got {patterns!r}."
        )
