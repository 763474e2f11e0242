"""Evaluators whose networks other packages carry, or a file of TorchScript holds."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evenkeel.errors import EvenkeelError, MissingExtra
from evenkeel.hosts.pipeline.prompts import Prompt

SIDE = 299  # of what Inception sees
# Whose name, module and what for.
_PACKAGES = {
    "torch_fidelity": ("torch-fidelity", "Inception's weights in PyTorch's format"),
    "lpips": ("lpips", "LPIPS"),
    "ImageReward": ("image-reward", "ImageReward"),
}


def package(module: str) -> Any:
    """The module.

    Raises:
        MissingExtra: it is not installed.

    """
    name, what = _PACKAGES[module]
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise MissingExtra(
            f"{what} needs the package {name}, which was not found ({e}): pip install {name}, with a "
            f"torchvision that fits your torch."
        ) from e


def script(file: Path) -> Any:
    """The network of a TorchScript file; None where the file is something else.

    Raises:
        EvenkeelError: there is no such file.

    """
    if not file.is_file():
        raise EvenkeelError(
            f"{file} is no file: expected the weights of an evaluator, downloaded once."
        )
    load: Any = torch.jit.load
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the file exists in this format alone
        try:
            return load(str(file), map_location="cpu").eval()
        except RuntimeError:
            return None


def resized_as_clean_fid(images: Tensor) -> Tensor:
    """(n, 3, H, W) in [0, 1] to 299 pixels, bicubic as Pillow's, neither rounded nor clipped.

    Parmar et al. 2022 (arXiv:2104.11222), mode ``clean``.
    """
    return torch.nn.functional.interpolate(images, (SIDE, SIDE), mode="bicubic", antialias=True)


def resized_as_adm(images: Tensor) -> Tensor:
    """(n, 3, H, W) in [0, 1] to 299 pixels, bilinear as TensorFlow 1 did in the graph of FID and ADM.

    Pixel i of the result is at place i H / 299: corners are not aligned, centres neither, and nothing is
    smoothed where pictures shrink.
    """
    for axis in (2, 3):
        size = images.shape[axis]
        place = torch.arange(SIDE, dtype=torch.float64) * (size / SIDE)
        low = place.floor().long()
        weight = (place - low).to(images).reshape(-1, *[1] * (3 - axis))
        high = (low + 1).clamp_max(size - 1)
        below, above = images.index_select(axis, low), images.index_select(axis, high)
        images = below + weight * (above - below)
    return images


class Inception:
    """The network of FID (Inception of 2015-12-05): its 2,048 features, and its classes.

    Args:
        file: NVIDIA's ``inception-2015-12-05.pt`` (TorchScript, no package needed), or the weights of
            torch-fidelity with that package.
        adm: resize as ADM's and the first FID's code; else as clean-fid.

    Raises:
        EvenkeelError: no such file, or TorchScript that is another network.
        MissingExtra: the file needs torch-fidelity.

    """

    def __init__(self, file: Path, adm: bool) -> None:
        self._resized = resized_as_adm if adm else resized_as_clean_fid
        self._script = script(file)
        if self._script is None:
            made = package("torch_fidelity").feature_extractor_inceptionv3
            self._net = made.FeatureExtractorInceptionV3(
                "inception-v3-compat",
                ["2048", "logits_unbiased"],
                feature_extractor_weights_path=str(file),
            )
        elif not hasattr(self._script, "layers"):
            raise EvenkeelError(
                f"{file} is TorchScript without 'layers', so not inception-2015-12-05.pt. Name it "
                f"torchscript:{file} to measure with its output as features."
            )

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) in [0, 1] to (n, 2048)."""
        if self._script is None:
            return self._packaged(images)[0]
        found: Tensor = self._script.layers((255 * self._resized(images) - 128) / 128)
        return found.flatten(1)

    @torch.no_grad()
    def posterior(self, images: Tensor) -> Tensor:
        """(n, 1008) of its classes, without the last layer's bias as the first Inception Score's code."""
        if self._script is None:
            return self._packaged(images)[1].softmax(1)
        found: Tensor = self._script(255 * self._resized(images), no_output_bias=True)
        return found

    def _packaged(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits; it takes bytes, and leaves pictures of its own size alone."""
        seen = (255 * self._resized(images)).round().clamp(0, 255).to(torch.uint8)
        features, logits = self._net(seen)
        return features, logits

    def matches(self, images: Tensor, prompts: Sequence[Prompt]) -> None:
        """None: it does not read prompts."""


class Script:
    """Any network of a TorchScript file, (n, 3, H, W) in [0, 1] to features (n, d).

    Args:
        file: of it.

    Raises:
        EvenkeelError: no such file, or no TorchScript.

    """

    def __init__(self, file: Path) -> None:
        self._net, self._file = script(file), file
        if self._net is None:
            raise EvenkeelError(
                f"{file} is no TorchScript: write it with torch.jit.trace(network, images).save(FILE)."
            )

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(n, d)."""
        found = self._net(images)
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
            raise EvenkeelError(
                f"{self._file} gives {getattr(found, 'shape', type(found).__name__)} for "
                f"{tuple(images.shape)} images; expected a row of features for each."
            )
        return found

    def matches(self, images: Tensor, prompts: Sequence[Prompt]) -> None:
        """None: it does not read prompts."""


class Lpips:
    """LPIPS (Zhang et al. 2018, arXiv:1801.03924) to the full-precision pictures.

    Args:
        net: ``alex``, ``vgg`` or ``squeeze``; the package brings the weights, or fetches them once.

    """

    def __init__(self, net: str) -> None:
        self._net = package("lpips").LPIPS(net=net or "alex", verbose=False).eval()

    @torch.no_grad()
    def perceptual(self, images: Tensor, others: Tensor) -> Tensor:
        """(n,)."""
        found: Tensor = self._net(images, others, normalize=True)
        return found.flatten()


class ImageReward:
    """ImageReward (Xu et al. 2023, arXiv:2304.05977) of every picture and its prompt.

    Measured as ``image_reward``.

    Args:
        model: its name or file, as ``ImageReward.load`` takes it.

    """

    score_name = "image_reward"

    def __init__(self, model: str) -> None:
        self._model = package("ImageReward").load(model or "ImageReward-v1.0")

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(n,), near 0 for what people would expect, above for better."""
        from PIL import Image

        pixels = (255 * images).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        pictures = [Image.fromarray(p.numpy()) for p in pixels.cpu()]
        pairs = zip(prompts, pictures, strict=True)
        return torch.tensor([float(self._model.score(str(p), [picture])) for p, picture in pairs])


class Several:
    """Several evaluators as one: whatever is asked of it, the first that can answers; all of them score.

    Attributes:
        evaluators: in this order.

    """

    def __init__(self, evaluators: Sequence[Any]) -> None:
        self.evaluators = tuple(evaluators)

    def __getattr__(self, name: str) -> Any:
        for evaluator in self.__dict__.get("evaluators", ()):
            if hasattr(evaluator, name):
                return getattr(evaluator, name)
        raise AttributeError(name)
