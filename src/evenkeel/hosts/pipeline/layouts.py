"""What is a channel? Latents come as images, packed tokens, or videos with two axis orders."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from evenkeel.errors import UnsupportedPipeline

# Pipelines whose video latents are (batch, frames, channels, height, width).
_FRAMES_FIRST = ("CogVideoX", "StableVideoDiffusion")


@dataclass(frozen=True, slots=True)
class LatentLayout:
    """Where the channels of a latent are.

    Attributes:
        ndim: number of dimensions of the sample that enters ``scheduler.step``.
        axis: the channel axis.
        channels: number of latent channels C.
        patch: features per channel on that axis; FLUX packs 2x2 pixels, feature = channel * 4 + pixel.

    """

    ndim: int
    axis: int
    channels: int
    patch: int

    def as_channels(self, latent: Tensor) -> Tensor:
        """(batch, ...) to (batch, channels, elements)."""
        self._check(latent)
        moved = latent.movedim(self.axis, 1)
        return moved.reshape(len(latent), self.channels, -1)

    def broadcast(self, per_channel: Tensor) -> Tensor:
        """(C,) or (1,) values to a shape that multiplies a latent."""
        if len(per_channel) != 1:
            per_channel = per_channel.repeat_interleave(self.patch)
        shape = [1] * self.ndim
        shape[self.axis] = len(per_channel)
        return per_channel.reshape(shape)

    @property
    def is_spatial(self) -> bool:
        """Whether the last two axes are height and width."""
        return self.ndim in (4, 5)

    def as_dict(self) -> dict[str, int]:
        """For the record's header."""
        return asdict(self)

    def _check(self, latent: Tensor) -> None:
        features = self.channels * self.patch
        if latent.dim() != self.ndim or latent.shape[self.axis] != features:
            raise UnsupportedPipeline(
                f"expected a {self.ndim}-dimensional latent with {features} features on axis "
                f"{self.axis}; the sampler was handed {tuple(latent.shape)}."
            )


def find_layout(pipeline: Any, latent: Tensor) -> LatentLayout:
    """The layout of ``latent`` as it enters the scheduler of ``pipeline``.

    Raises:
        UnsupportedPipeline: the channel axis cannot be told; pass ``layout=`` yourself.

    """
    channels = _latent_channels(pipeline)
    name, shape = type(pipeline).__name__, tuple(latent.shape)
    if latent.dim() == 4:
        return LatentLayout(4, 1, shape[1], 1)
    if latent.dim() == 3:
        packed = channels is not None and shape[2] % channels == 0
        patch = shape[2] // channels if packed and channels else 1
        return LatentLayout(3, 2, shape[2] // patch, patch)
    if latent.dim() == 5:
        kinds = [kind.__name__ for kind in type(pipeline).__mro__]
        axis = 2 if any(kind.startswith(_FRAMES_FIRST) for kind in kinds) else 1
        if channels is not None and shape[axis] != channels and shape[3 - axis] == channels:
            axis = 3 - axis
        return LatentLayout(5, axis, shape[axis], 1)
    raise UnsupportedPipeline(
        f"{name} hands its scheduler latents of shape {shape}; expected (B,C,H,W), packed tokens "
        f"(B,N,F) or video with five axes. Pass layout=LatentLayout(...) to say where channels are."
    )


def _latent_channels(pipeline: Any) -> int | None:
    config = getattr(getattr(pipeline, "vae", None), "config", None)
    for key in ("latent_channels", "z_dim"):
        value = getattr(config, key, None)
        if isinstance(value, int):
            return value
    return None
