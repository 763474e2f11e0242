"""What a pipeline is asked for: one entry per image, with everything that comes along with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

Prompt = str | int


@dataclass(frozen=True)
class Prompts:
    """Everything that differs from prompt to prompt, in order.

    Whatever comes per prompt (embeddings, an image, a negative prompt, latents) is one field here and one
    entry in ``arguments``: nobody else knows how many inputs a prompt has.

    Attributes:
        values: texts, or class labels.

    >>> Prompts.of(["a", "b", "c"])[1:].texts
    ['b', 'c']

    """

    values: tuple[Prompt, ...]

    @classmethod
    def of(cls, prompts: Sequence[Prompt] | Prompts) -> Prompts:
        """A list of texts or labels as prompts; prompts as they are."""
        return prompts if isinstance(prompts, Prompts) else cls(tuple(prompts))

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, span: slice) -> Prompts:
        """Some of the prompts, each with all of its inputs."""
        return replace(self, **{f.name: getattr(self, f.name)[span] for f in fields(self)})

    def take(self, which: Sequence[int]) -> Prompts:
        """Those with these indices, each with all of its inputs; one may be taken more than once."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{n: tuple(column[i] for i in which) for n, column in columns.items()}
        )

    @property
    def texts(self) -> list[str]:
        """By which prompts are told apart."""
        return [str(value) for value in self.values]

    def arguments(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """As a pipeline's call takes them, whose parameters these are."""
        if "prompt" in parameters:
            return {"prompt": self.texts}
        if "class_labels" in parameters:
            return {"class_labels": [int(value) for value in self.values]}
        return {"batch_size": len(self)} if "batch_size" in parameters else {}
