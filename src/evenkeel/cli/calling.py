"""``--call NAME=VALUE``: what the pipeline's own signature says about it, before anything is computed."""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Callable
from typing import Any

from evenkeel.errors import EvenkeelError
from evenkeel.hosts.pipeline.pipelines import call_parameters
from evenkeel.storage import parse_json

LARGEST = 16_384  # of sides in pixels, frames, tokens, timesteps
_SET_BY = {
    "prompt": "--prompts",
    "class_labels": "--prompts",
    "batch_size": "--batch-size",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance-scale",
    "generator": "--seed",
    "num_images_per_prompt": "--prompts",
    "num_videos_per_prompt": "--prompts",
}
_OURS = {"output_type", "return_dict", "callback", "callback_steps"}
_POSITIVE = {"height", "width", "num_frames", "max_sequence_length", "clip_skip"}


def parse_call(pairs: list[str], pipeline: Any) -> dict[str, Any]:
    """``["height=512", "negative_prompt=blurry"]`` to pipeline arguments, values read as JSON if they are.

    Raises:
        EvenkeelError: not NAME=VALUE, an argument that the pipeline does not take or that another option
            sets, or a value of a type or size that it cannot be.

    """
    known = {k: p for k, p in call_parameters(pipeline).items() if k not in ("self", "kwargs")}
    found: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or key not in known:
            raise EvenkeelError(
                f"--call {pair[:60]!a}: expected NAME=VALUE with a name that {type(pipeline).__name__} "
                f"takes: {', '.join(known)}."
            )
        if key in _SET_BY:
            raise EvenkeelError(f"--call {key}: this is what {_SET_BY[key]} sets.")
        if key in _OURS or key.startswith("callback_on"):
            raise EvenkeelError(f"--call {key}: this is evenkeel's own to set.")
        found[key] = _checked(key, read_value(value), known[key].annotation)
    return found


def read_value(text: str) -> Any:
    """JSON if it is, else the text itself.

    Raises:
        EvenkeelError: text that begins as JSON does and is nested without end.

    """
    try:
        return parse_json(text)
    except ValueError as e:
        if "nested" in str(e):
            raise EvenkeelError(f"{text[:20]!a}... is nested too deep.") from e
        return text


def _checked(key: str, value: Any, wanted: Any) -> Any:
    if not _fits(value, wanted):
        raise EvenkeelError(f"--call {key}: expected {_named(wanted)}, got {_brief(value)}.")
    for number in _numbers(value):
        whole = isinstance(number, int)
        if not math.isfinite(number) or abs(number) > (LARGEST if whole else 1e6):
            raise EvenkeelError(
                f"--call {key}: expected numbers up to {LARGEST}, got {_brief(value)}."
            )
        if key in _POSITIVE and number < 1:
            raise EvenkeelError(f"--call {key}: expected a number above 0, got {_brief(value)}.")
    return value


def _numbers(value: Any) -> list[float]:
    if isinstance(value, (list, dict)):
        inner = value.values() if isinstance(value, dict) else value
        return [number for part in inner for number in _numbers(part)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def _fits(value: Any, wanted: Any) -> bool:
    """Whether JSON's value can be what a parameter's annotation says; what it does not say fits."""
    if wanted in (inspect.Parameter.empty, Any):
        return True
    if wanted in (None, types.NoneType):
        return value is None
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(v, inner[0]) for v in value)
    if origin is tuple:
        return (
            isinstance(value, list) and len(value) == len(inner) and all(map(_fits, value, inner))
        )
    if origin is dict or wanted is dict:
        return isinstance(value, dict)
    if wanted is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    # A tensor, a picture, a function: no text on a command line is one.
    return wanted in (str, bool) and isinstance(value, wanted)


def _named(wanted: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if wanted in words:
        return words[wanted]
    said: Callable[[Any], str] = inspect.formatannotation
    return said(wanted).replace("typing.", "")


def _brief(value: Any) -> str:
    try:
        text = ascii(value)
    except ValueError:  # a whole number of thousands of digits
        text = "a number too long to write"
    return text if len(text) < 60 else f"{text[:57]}..."
