"""Networks that people know as evaluators, from weights on this machine: what --evaluator takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evenkeel.comparing.packaged_evaluators import ImageReward, Inception, Lpips, Script
from evenkeel.errors import EvenkeelError
from evenkeel.hosts.pipeline.prompts import Prompt

FORMS = (
    "clip:FOLDER",
    "dinov2:FOLDER",
    "inception:FILE",
    "inception-adm:FILE",
    "torchscript:FILE",
    "lpips:NET",
    "imagereward:MODEL",
)
# No file says these where there is no preprocessor_config.json.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP_MEAN, _CLIP_STD = (0.4814547, 0.4578275, 0.4082107), (0.2686295, 0.2613026, 0.2757771)


def evaluator_named(text: str) -> Any:
    """An evaluator of one of ``FORMS``.

    A folder is as ``save_pretrained`` of transformers writes it. ``inception`` resizes as clean-fid, and
    ``inception-adm`` as ADM's code.

    Raises:
        EvenkeelError: another kind, a folder without a ``config.json``, no such file.
        MissingExtra: it needs a package that is not there; says which.

    """
    kind, _, place = text.partition(":")
    made = _MADE.get(kind)
    if made is None or (not place and kind not in ("lpips", "imagereward")):
        raise EvenkeelError(f"expected --evaluator {', '.join(FORMS)}; got {text!r}.")
    return made(place)


def _folder(place: str) -> Path:
    folder = Path(place)
    if not (folder / "config.json").is_file():
        raise EvenkeelError(
            f"{folder} holds no config.json: expected a folder of transformers with weights and "
            "configuration. Download it once and name the folder."
        )
    return folder


class _Seeing:
    """What both do with pictures: resized to the network's size, and normalised as it was trained."""

    def __init__(
        self, folder: Path, size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        place = folder / "preprocessor_config.json"
        said = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
        self._size = size
        self._mean = torch.tensor(said.get("image_mean", mean))[:, None, None]
        self._std = torch.tensor(said.get("image_std", std))[:, None, None]

    def _prepared(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) in [0, 1]: the whole picture, bicubic with antialiasing."""
        size = (self._size, self._size)
        resized = torch.nn.functional.interpolate(images, size, mode="bicubic", antialias=True)
        return (resized.clamp(0, 1) - self._mean) / self._std

    def matches(self, images: Tensor, prompts: Sequence[Prompt]) -> None:
        """None: it does not read prompts attribute by attribute."""


class Clip(_Seeing):
    """Image embeddings of unit length, on which CMMD is measured; and the CLIP score.

    score = 100 max(cos(image, text), 0) (Hessel et al. 2021, arXiv:2104.08718, without its 2.5). CMMD is
    published with ViT-L/14 at 336 pixels (Jayasumana et al. 2024, arXiv:2401.09603).

    Args:
        folder: of a ``CLIPModel`` with its tokenizer.

    """

    def __init__(self, folder: Path) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        self._model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
        self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        super().__init__(folder, self._model.config.vision_config.image_size, _CLIP_MEAN, _CLIP_STD)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) in [0, 1] to (n, d), rows of unit length."""
        pooled = self._model.vision_model(pixel_values=self._prepared(images)).pooler_output
        found: Tensor = torch.nn.functional.normalize(self._model.visual_projection(pooled))
        return found

    embeddings = features

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(n,) from 0 to 100."""
        longest = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            [str(p) for p in prompts],
            padding=True,
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        )
        texts = self._model.text_projection(self._model.text_model(**tokens).pooler_output)
        seen = torch.cat([self.features(part) for part in torch.split(images, 64)])
        return 100 * (seen * torch.nn.functional.normalize(texts)).sum(1).clamp_min(0)


class Dinov2(_Seeing):
    """The class token of DINOv2: its Fréchet distance is FD-DINOv2 (Stein et al. 2023, arXiv:2306.04675).

    Args:
        folder: of a ``Dinov2Model``.

    """

    def __init__(self, folder: Path) -> None:
        from transformers import Dinov2Model

        self._model = Dinov2Model.from_pretrained(folder, local_files_only=True).eval()
        patch = self._model.config.patch_size
        super().__init__(folder, max(224 // patch, 1) * patch, _MEAN, _STD)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) in [0, 1] to (n, d)."""
        found: Tensor = self._model(pixel_values=self._prepared(images)).pooler_output
        return found


_MADE: dict[str, Callable[[str], Any]] = {
    "clip": lambda place: Clip(_folder(place)),
    "dinov2": lambda place: Dinov2(_folder(place)),
    "inception": lambda place: Inception(Path(place), adm=False),
    "inception-adm": lambda place: Inception(Path(place), adm=True),
    "torchscript": lambda place: Script(Path(place)),
    "lpips": Lpips,
    "imagereward": ImageReward,
}
