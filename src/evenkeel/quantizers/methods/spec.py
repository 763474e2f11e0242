"""What to quantize and how finely, as a frozen value with a short text form (``w3a4-g32-r16``)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from evenkeel.errors import QuantizationError

Activation = Literal["group", "token"]

GRAMMAR = (
    "w<2..8|16>a<4..8|16>[-g<size>|-gnone][-r<rank>][-token], "
    "for example w4a8, w3a4-g32-r16, w4a8-gnone-token"
)
_TEXT = re.compile(r"w(\d+)a(\d+)(?:-g(\d+|none))?(?:-r(\d+))?(-token)?", re.ASCII)

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


@dataclass(frozen=True, slots=True)
class QuantizerSpec:
    """How many bits weights and activations keep, over which groups, and in which layers.

    ``weight_bits``: 2 to 8, or 16 for not quantized. ``activation_bits``: 4 to 8, or 16.
    ``group``: values along the input features that share a scale; None is one scale per output
    channel for weights and one per token for activations. ``rank``: width of the 16-bit branch
    that carries the best low-rank part of every linear weight. ``activation``: ``"group"`` shares
    ``group`` with the weights, ``"token"`` is one scale per token (per pixel). ``skip`` and
    ``only``: patterns of :func:`first_match`; skip wins. They are not in the text form.

    Raises:
        QuantizationError: a field outside its range, or a rank without quantized weights.

    >>> QuantizerSpec.parse("w3a4-g32-r16")  # doctest: +ELLIPSIS
    QuantizerSpec(weight_bits=3, activation_bits=4, group=32, rank=16, activation='group', ...
    >>> str(QuantizerSpec(4, 8, group=None, activation="token"))
    'w4a8-gnone-token'

    """

    weight_bits: int
    activation_bits: int = 16
    group: int | None = 64
    rank: int = 0
    activation: Activation = "group"
    skip: tuple[str, ...] = DEFAULT_SKIP
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_bits("weight_bits", self.weight_bits, 2)
        _check_bits("activation_bits", self.activation_bits, 4)
        if self.group is not None and (type(self.group) is not int or self.group < 2):
            raise QuantizationError(
                f"group must be an integer of at least 2, or None, got {self.group!r}."
            )
        if type(self.rank) is not int or self.rank < 0:
            raise QuantizationError(f"rank must be an integer of at least 0, got {self.rank!r}.")
        if self.rank and self.weight_bits == 16:
            raise QuantizationError(
                f"rank is {self.rank} but the weights stay at 16 bits: there is no residual to "
                "carry. Use rank 0, or weight_bits from 2 to 8."
            )
        if self.activation not in ("group", "token"):
            raise QuantizationError(
                f"activation must be 'group' or 'token', got {self.activation!r}."
            )
        _check_patterns("skip", self.skip)
        _check_patterns("only", self.only)

    @classmethod
    def parse(
        cls, text: str, *, skip: tuple[str, ...] = DEFAULT_SKIP, only: tuple[str, ...] = ()
    ) -> QuantizerSpec:
        """Read the text form; what it leaves out has the default value.

        Raises:
            QuantizationError: not of the grammar (which the message shows), or out of range.

        >>> QuantizerSpec.parse("w4a8").group
        64

        """
        found = _TEXT.fullmatch(text)
        if found is None:
            raise QuantizationError(
                f"{text!r} is not a quantizer specification. The grammar is {GRAMMAR}."
            )
        weight, activation, group, rank, token = found.groups()
        sizes: dict[str, int | None] = {"64": 64, "none": None}
        try:
            return cls(
                weight_bits=int(weight),
                activation_bits=int(activation),
                group=sizes[group or "64"] if (group or "64") in sizes else int(group),
                rank=int(rank or 0),
                activation="token" if token else "group",
                skip=skip,
                only=only,
            )
        except QuantizationError as error:
            raise QuantizationError(f"{text!r}: {error} The grammar is {GRAMMAR}.") from error

    def __str__(self) -> str:
        group = "" if self.group == 64 else f"-g{self.group or 'none'}"
        rank = f"-r{self.rank}" if self.rank else ""
        token = "-token" if self.activation == "token" else ""
        return f"w{self.weight_bits}a{self.activation_bits}{group}{rank}{token}"

    @property
    def activation_group(self) -> int | None:
        """Values of an activation that share a scale; None is all features of a token."""
        return self.group if self.activation == "group" else None

    def as_dict(self) -> dict[str, Any]:
        """Every field, patterns included, in types that JSON knows.

        >>> QuantizerSpec.from_dict(QuantizerSpec(4).as_dict()) == QuantizerSpec(4)
        True
        """
        return {
            "weight_bits": self.weight_bits,
            "activation_bits": self.activation_bits,
            "group": self.group,
            "rank": self.rank,
            "activation": self.activation,
            "skip": list(self.skip),
            "only": list(self.only),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> QuantizerSpec:
        """The inverse of :meth:`as_dict`.

        Raises:
            QuantizationError: a field is missing, unknown, or out of range.

        """
        expected, found = set(cls.__slots__), set(fields)
        if expected != found:
            raise QuantizationError(
                f"A quantizer specification has exactly the fields {sorted(expected)}; missing "
                f"{sorted(expected - found)}, unknown {sorted(found - expected)}."
            )
        patterns = {k: fields[k] for k in ("skip", "only")}
        for name, value in patterns.items():
            if not isinstance(value, list):
                raise QuantizationError(f"{name} must be a list of patterns, got {value!r}.")
        return cls(**{**fields, **{k: tuple(v) for k, v in patterns.items()}})


def _check_bits(name: str, bits: object, least: int) -> None:
    if type(bits) is not int or not (least <= bits <= 8 or bits == 16):
        raise QuantizationError(
            f"{name} must be an integer from {least} to 8, or 16 for not quantized, got {bits!r}."
        )


def _check_patterns(name: str, patterns: object) -> None:
    # A bare string would be taken apart into one-letter patterns.
    if not isinstance(patterns, tuple) or not all(isinstance(p, str) and p for p in patterns):
        raise QuantizationError(
            f"{name} must be a tuple of non-empty name patterns such as ('*.attn2',), "
            f"got {patterns!r}."
        )
