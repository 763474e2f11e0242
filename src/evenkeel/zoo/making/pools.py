"""Training data made once: latents with the tokens of their captions or their classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from evenkeel.storage import write_atomically
from evenkeel.zoo.making.text_encoders import caption_scenes
from evenkeel.zoo.scenes import sample_scene_pictures

Tokens = Callable[[list[str]], dict[str, Tensor]]


class Pool:
    """Rows of tensors that belong together, drawn at random."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.size = len(next(iter(tensors.values())))

    @classmethod
    def kept(cls, path: Path, make: Callable[[], dict[str, Tensor]]) -> Pool:
        """The pool in ``path``, made and written there first where there is none."""
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, save({k: v.contiguous() for k, v in make().items()}))
        return cls(load_file(path))

    def draw(self, n: int, rng: np.random.Generator, device: torch.device) -> dict[str, Tensor]:
        """``n`` rows, with repetition."""
        rows = torch.from_numpy(rng.integers(0, self.size, n))
        return {k: v[rows].to(device) for k, v in self.tensors.items()}


def scene_pool(
    path: Path, encode: Callable[[Tensor], Tensor], tokens: Tokens, pictures: int, seed: int
) -> Pool:
    """Latents of captioned scenes, and the tokens of the captions.

    Args:
        path: where the pool is kept.
        encode: pictures (n, 3, 32, 32) in [0, 1] to latents.
        tokens: captions to token ids, a tensor for each text encoder.
        pictures: how many.
        seed: of everything.

    """

    def make() -> dict[str, Tensor]:
        rng = np.random.default_rng(seed)
        drawn, scenes = sample_scene_pictures(pictures, rng)
        return {"latents": encode(drawn), **tokens(caption_scenes(scenes, rng)[0])}

    return Pool.kept(path, make)


def drop_captions(
    batch: dict[str, Tensor], empty: dict[str, Tensor], share: float, rng: np.random.Generator
) -> dict[str, Tensor]:
    """Captions replaced by the empty one at random, for classifier-free guidance.

    Args:
        batch: rows of a pool.
        empty: the empty caption's tokens (1, length), by the same names.
        share: probability that a caption is dropped.
        rng: of the choice.

    """
    dropped = torch.from_numpy(rng.random(len(next(iter(batch.values())))) < share)[:, None]
    return {
        k: torch.where(dropped.to(v.device), empty[k].to(v.device), v) if k in empty else v
        for k, v in batch.items()
    }
