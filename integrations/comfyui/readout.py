"""A head per noise level beside the last layer of a model in ComfyUI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from evenkeel.corrections import Readout
from evenkeel.errors import Incompatible
from evenkeel.record.comfyui_names import KNOWN, place_of

from .beside import APPLY_MODEL, add_once, attached, layer_of, refuse_compiled
from .sampling import levels_at

Change = tuple[Tensor, Tensor]


class Heads:
    """``dW h + db`` of every image, at the noise level and for the guidance branch that it has.

    Args:
        readout: with its table over noise levels.
        model_sampling: of the model; says what a sigma means.
        strength: factor on the change.
        allow_range: levels that were not fitted keep the original head.

    """

    def __init__(
        self, readout: Readout, model_sampling: Any, strength: float, allow_range: bool
    ) -> None:
        self._table, self._strength, self._allow_range = readout.table, strength, allow_range
        self._branches = branches_of(readout)
        self._sampling = model_sampling
        self._made: dict[float, list[Change] | None] = {}

    def at(self, sigma: float) -> list[Change] | None:
        """Per branch (O, F) and (O,) float32; None: the original head.

        Raises:
            OutOfRange: no head was fitted for this level, and ``allow_range`` is False.

        """
        if sigma not in self._made:
            alpha, level = levels_at(self._sampling, [sigma])
            (found,) = self._table.at(alpha, level, allow_range=self._allow_range)
            s = self._strength
            self._made[sigma] = found and [
                (w.T.contiguous() * s, b * s) for w, b in zip(*found, strict=True)
            ]
        return self._made[sigma]

    def addition(self, sigmas: Tensor, branches: Sequence[int]) -> Any:
        """For one call of the model.

        Args:
            sigmas: (images,) of the batch.
            branches: per chunk of the batch 0 with the prompt, 1 with the negative one.

        """
        per = len(sigmas) // max(len(branches), 1)
        rows: list[Change | None] = []
        for i, sigma in enumerate(sigmas.tolist()):
            found = self.at(sigma)
            chunk = branches[min(i // max(per, 1), len(branches) - 1)] if branches else 0
            rows.append(found and found[self._branches[min(chunk, 1)]])

        def added(layer: Any, x: Tensor) -> Tensor | None:
            if all(row is None for row in rows):
                return None
            parts = [_applied(layer, x[i : i + 1], row) for i, row in enumerate(rows)]
            return torch.cat(parts)

        return added


def branches_of(readout: Readout) -> tuple[int, int]:
    """Which heads of the table are for the prompt and for the negative one.

    A diffusers pipeline that calls its denoiser once for both has one. Of two calls the one with the
    prompt is the one with the larger share in the guidance: the first in FLUX, the second elsewhere.

    Raises:
        Incompatible: the file does not say.

    """
    if readout.table.branches == 1:
        return 0, 0
    said = readout.provenance.guidance
    shares = [float(word) for word in said.split() if word.lstrip("-").replace(".", "").isdigit()]
    if readout.table.branches != 2 or len(shares) != 2:
        raise Incompatible(
            f"the readout has a head for each of {readout.table.branches} calls in a step, and its guidance "
            f"({said or 'not said'}) does not tell which of them has the prompt. Fit it again with this "
            f"version and a guidance of two parts."
        )
    prompted = int(shares[1] > shares[0])
    return prompted, 1 - prompted


def _applied(layer: Any, x: Tensor, change: Change | None) -> Tensor:
    convolution = hasattr(layer, "out_channels")
    if change is None:
        size = (layer.out_channels,) if convolution else (layer.out_features,)
        shape = (1, *size, *x.shape[2:]) if convolution else (*x.shape[:-1], *size)
        return x.new_zeros(shape)
    weight, constant = (c.to(x.device, x.dtype) for c in change)
    if not convolution:
        return F.linear(x, weight, constant)
    weight = weight.reshape(len(weight), -1, *layer.kernel_size)
    return F.conv2d(x, weight, constant, layer.stride, layer.padding, layer.dilation)


def apply_readout(model: Any, readout: Readout, strength: float, allow_range: bool) -> Any:
    """A clone of the model whose head depends on the noise level.

    Raises:
        Incompatible: another architecture, or a head of another size; a readout with a sampler
            correction behind it.

    """
    made_for = readout.provenance
    namer = place_of(made_for.pipeline_class)
    place = None if namer is None else namer(readout.head)
    if place is None:
        raise Incompatible(
            f"where ComfyUI keeps the head {readout.head!r} of a {made_for.pipeline_class} is not known; "
            f"expected one of {KNOWN}."
        )
    shape = (readout.table.weight.shape[3], readout.table.weight.shape[2])
    layer_of(model.model.diffusion_model, place.layer, shape)
    clone = model.clone()
    if readout.table.is_identity or strength == 0:
        return clone
    heads = Heads(readout, model.get_model_object("model_sampling"), strength, allow_range)

    def wrapper(executor: Any, x: Tensor, t: Tensor, *arguments: Any, **named: Any) -> Any:
        options = arguments[3] if len(arguments) > 3 else named.get("transformer_options", {})
        refuse_compiled(options)
        sigmas = t.flatten().float().expand(len(x)) if t.numel() == 1 else t.flatten().float()
        addition = heads.addition(sigmas, options.get("cond_or_uncond", ()))
        with attached(executor.class_obj.diffusion_model, {place.layer: addition}):
            return executor(x, t, *arguments, **named)

    add_once(clone, APPLY_MODEL, f"Evenkeel Readout {readout.digest()[:16]}", wrapper)
    return clone
