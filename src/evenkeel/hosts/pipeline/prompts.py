"""What a pipeline is asked for: one entry per image, with everything that comes along with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evenkeel.errors import CalibrationError
from evenkeel.hosts.pipeline.contents import described

Prompt = str | int


@dataclass(frozen=True, eq=False)
class Column:
    """One input of every prompt, as a pipeline takes it for all of them.

    Attributes:
        value: a tensor or array with the prompts on ``axis``, or a list with an entry for each.
        axis: of a tensor or array.
        times: where the list has one entry per adapter or ControlNet: how often the rows of all prompts
            follow each other in each of them (0: it is the same for all prompts); None elsewhere.

    """

    value: Any
    axis: int = 0
    times: tuple[int, ...] | None = None

    def take(self, which: Sequence[int], of: int) -> Column:
        """The entries with these indices, out of so many."""
        if self.times is None:
            return replace(self, value=_taken(self.value, which, self.axis))
        parts = [
            part if n == 0 else _taken(part, [k * of + i for k in range(n) for i in which], 0)
            for part, n in zip(self.value, self.times, strict=True)
        ]
        return replace(self, value=parts)


@dataclass(frozen=True, eq=False)
class Prompts(Sequence[Prompt]):
    """Everything that differs from prompt to prompt, in order.

    Whatever comes per prompt (embeddings with their masks, an image, a negative prompt, latents) is one
    column here: nobody else knows how many inputs a prompt has.

    Attributes:
        values: texts, or class labels; with embeddings, what the prompts are called.
        columns: further inputs by the name of the pipeline's argument; made by ``of``.

    >>> Prompts.of(["a", "b", "c"])[1:].texts
    ['b', 'c']
    >>> Prompts.of(["a", "b"], negative_prompt=["x", "y"])[1:].arguments({"prompt"})
    {'prompt': ['b'], 'negative_prompt': ['y']}

    """

    values: tuple[Prompt, ...]
    columns: Mapping[str, Column] = field(default_factory=dict)

    @classmethod
    def of(cls, prompts: Sequence[Prompt] | None = None, **inputs: Any) -> Prompts:
        """A list of texts or labels as prompts; prompts as they are.

        Args:
            prompts: texts or labels; None numbers what comes in ``inputs``.
            **inputs: what else differs from prompt to prompt, by the name of the pipeline's argument: a
                tensor, array or list with an entry for each.

        Raises:
            CalibrationError: an input of another length.

        """
        if isinstance(prompts, Prompts):
            values, columns = prompts.values, dict(prompts.columns)
        elif prompts is None:
            values, columns = tuple(map(str, range(_length_of_all(inputs)))), {}
        else:
            values, columns = tuple(prompts), {}
        for name, value in inputs.items():
            found = _column(name, value, len(values), declared=True)
            assert found is not None
            columns[name] = found
        return cls(values, columns)

    def with_call(self, call: Mapping[str, Any], pipeline: Any) -> tuple[Prompts, dict[str, Any]]:
        """These with what comes per prompt among the arguments of a call, and the other arguments.

        Raises:
            CalibrationError: an argument that has to have an entry per prompt, and has not.

        """
        columns, rest = dict(self.columns), {}
        for name, value in call.items():
            found = None
            if name in _PER_ADAPTER or (name in _MANY_IMAGES and _has_many_nets(pipeline)):
                found = _nested(name, value, len(self))
            elif not (name in _MANY_IMAGES and _takes_many_images(pipeline)):
                found = _column(name, value, len(self), declared=False)
            if found is None:
                rest[name] = value
            elif name in columns:
                raise CalibrationError(f"{name} is given twice: with the prompts, and in call.")
            else:
                columns[name] = found
        return replace(self, columns=columns), rest

    def __len__(self) -> int:
        return len(self.values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Prompts) and self.keys == other.keys

    def __hash__(self) -> int:
        return hash(self.values)

    @overload
    def __getitem__(self, span: int) -> Prompt: ...
    @overload
    def __getitem__(self, span: slice) -> Prompts: ...
    def __getitem__(self, span: int | slice) -> Prompt | Prompts:
        """Some of the prompts, each with all of its inputs; or what one of them is called."""
        return self.values[span] if isinstance(span, int) else self.take(range(len(self))[span])

    def take(self, which: Sequence[int]) -> Prompts:
        """Those with these indices, each with all of its inputs; one may be taken more than once."""
        columns = {name: c.take(which, len(self)) for name, c in self.columns.items()}
        return replace(self, values=tuple(self.values[i] for i in which), columns=columns)

    @property
    def texts(self) -> list[str]:
        """What they are called."""
        return [str(value) for value in self.values]

    @property
    def keys(self) -> list[str]:
        """By which prompts are told apart: the text and, with further inputs, a digest of their content."""
        if not self.columns:
            return self.texts
        each = ({n: described(c.value) for n, c in p.columns.items()} for p in self._one_by_one())
        digests = (hashlib.sha256(json.dumps(e, sort_keys=True).encode()).hexdigest() for e in each)
        return [f"{text}\0{digest}" for text, digest in zip(self.texts, digests, strict=True)]

    def _one_by_one(self) -> list[Prompts]:
        return [self[i : i + 1] for i in range(len(self))]

    @property
    def embedded(self) -> bool:
        """Whether they come as embeddings, which stand in place of the texts."""
        return any(name.startswith("prompt_embeds") for name in self.columns)

    def arguments(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """As a pipeline's call takes them, whose parameters these are."""
        given = {name: column.value for name, column in self.columns.items()}
        if self.embedded:
            # The default of some pipelines is a text, which may not come beside embeddings.
            texts = ["prompt", *(["negative_prompt"] if "negative_prompt_embeds" in given else [])]
            return {name: None for name in texts if name in parameters} | given
        if "prompt" in parameters:
            return {"prompt": self.texts} | given
        if "class_labels" in parameters:
            return {"class_labels": [int(value) for value in self.values]} | given
        return ({"batch_size": len(self)} if "batch_size" in parameters else {}) | given


def refuse_unknown_labels(prompts: Prompts, config: Mapping[str, Any]) -> None:
    """Of a class-conditional pipeline: what is no class, or none that this denoiser knows.

    Diffusers looks a label up in the denoiser's table in the middle of a run, unchecked.

    Args:
        prompts: labels, or texts that are numbers.
        config: of the denoiser.

    Raises:
        CalibrationError: naming the first such entry.

    >>> refuse_unknown_labels(Prompts((3, "7")), {"num_class_embeds": 10})

    """
    classes = config.get("num_class_embeds")
    if classes is None and config.get("num_embeds_ada_norm") is not None:
        classes = config["num_embeds_ada_norm"] + 1  # and one for none of them
    for value in prompts.values:
        label = int(value) if str(value).strip().removeprefix("-").isdecimal() else -1
        if label < 0 or (classes is not None and label >= classes):
            raise CalibrationError(
                f"{value!r:.40} is no class of this pipeline; expected a number from 0 to "
                f"{'its number of classes' if classes is None else classes - 1}."
            )


# ---- which arguments of diffusers' pipelines come per prompt

_TEXTS = {f"{n}prompt{i}" for n in ("", "negative_") for i in ("", "_2", "_3", "_4")} - {"prompt"}
_IMAGES = {"image", "mask", "mask_image", "control_image", "control_mask", "conditioning_image"}
_LATENTS = {"latents", "image_latents", "masked_image_latents", "mask_latents"}
_AXES = {
    "prompt_embeds_llama3": 1,
    "negative_prompt_embeds_llama3": 1,
}  # HiDream: layers come first
_PER_ADAPTER = {"ip_adapter_image_embeds", "negative_ip_adapter_image_embeds"}
_MANY_IMAGES = {"image", "control_image"}


def text_names() -> frozenset[str]:
    """Arguments beside ``prompt`` that take a text per prompt."""
    return frozenset(_TEXTS)


def _takes_many_images(pipeline: Any) -> bool:
    """Whether a list of images is of references for every prompt (FLUX.2, Qwen-Image-Edit-Plus)."""
    return type(pipeline).__name__.startswith(("Flux2", "QwenImageEditPlus", "OmniGen"))


def _has_many_nets(pipeline: Any) -> bool:
    """Whether a list of images has one entry, or those of all prompts, for each of several ControlNets."""
    nets = (getattr(pipeline, name, None) for name in ("controlnet", "adapter"))
    return any(hasattr(net, "nets") or hasattr(net, "adapters") for net in nets)


def _is_embedding(name: str) -> bool:
    return "embeds" in name or "embeddings" in name or name.endswith("prompt_attention_mask")


def _column(name: str, value: Any, n: int, *, declared: bool) -> Column | None:
    """An argument as a column; None where all prompts share it.

    ``declared``: it was said to come per prompt. Otherwise its name and form decide.
    """
    axis = _AXES.get(name, 0)
    many = _entries(name, value, axis, declared)
    if many is None or many == n:
        return None if many is None else Column(value, axis)
    shared = many == 1 and not declared and name not in _LATENTS
    if shared and _is_embedding(name):
        return Column(_repeated(value, n, axis), axis)
    if shared:
        return None
    raise CalibrationError(
        f"{name} has {many} entries for {n} prompts: expected one for each, in the same order"
        + ("." if declared or name in _LATENTS else ", or a single one for all of them.")
    )


def _entries(name: str, value: Any, axis: int, declared: bool) -> int | None:
    """How many prompts an argument is for; None where it says nothing about prompts."""
    sized = isinstance(value, (list, tuple, Tensor, np.ndarray))
    if declared and not sized:
        raise CalibrationError(
            f"{name} has to have an entry per prompt: expected a tensor, array or list, got "
            f"{type(value).__name__}. What all prompts share belongs into call."
        )
    if not sized or not (
        declared or name in _TEXTS | _IMAGES | _LATENTS | _AXES.keys() or _is_embedding(name)
    ):
        return None
    if isinstance(value, (list, tuple)):
        return len(value)
    # (3, H, W) and (H, W, 3) are one picture; masks come as (n, H, W), too.
    if name in _IMAGES and not declared and value.ndim < (3 if "mask" in name else 4):
        return None
    return int(value.shape[axis]) if value.ndim > axis else 0


def _nested(name: str, value: Any, n: int) -> Column:
    if not isinstance(value, (list, tuple)):
        raise CalibrationError(f"{name}: expected a list with one entry per adapter.")
    times = []
    for part in value:
        single = isinstance(part, Image.Image) or (
            isinstance(part, (Tensor, np.ndarray)) and part.ndim < 4 and name not in _PER_ADAPTER
        )
        count = 1 if single else len(part)
        # Guidance has the negative ones of all prompts in front of the positive ones.
        if count not in (1, n) and not (name in _PER_ADAPTER and count in (2, 2 * n)):
            raise CalibrationError(
                f"{name} has {count} entries for {n} prompts in one of its parts: expected one for "
                f"each prompt, or a single one for all of them."
            )
        times.append(count // n if count in (n, 2 * n) and not single else 0)
    return Column(list(value), times=tuple(times))


def _taken(value: Any, which: Sequence[int], axis: int) -> Any:
    if isinstance(value, Tensor):
        return value.index_select(
            axis, torch.tensor([*which], dtype=torch.long, device=value.device)
        )
    if isinstance(value, np.ndarray):
        return np.take(value, [*which], axis=axis)
    return [value[i] for i in which]


def _repeated(value: Any, n: int, axis: int) -> Any:
    """One entry for all prompts: a view, where it is a tensor."""
    if isinstance(value, Tensor):
        return value.expand(*(n if i == axis else -1 for i in range(value.ndim)))
    return np.repeat(value, n, axis) if isinstance(value, np.ndarray) else list(value) * n


def _length_of_all(inputs: Mapping[str, Any]) -> int:
    if not inputs:
        raise CalibrationError("expected prompts, or inputs that come per prompt; got neither.")
    name, value = next(iter(inputs.items()))
    found = _entries(name, value, _AXES.get(name, 0), True)
    return found or 0
