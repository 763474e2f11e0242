"""Which backend quantized which layer of a denoiser, in what format, and what it stores.

Backends are recognised by the names of classes and of the modules they come from. None is imported:
a layer of a backend exists only where that backend is loaded already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from evenkeel.hosts.backends.formats import PLAIN, Format, format_of, is_layer
from evenkeel.hosts.backends.settings import settings_of
from evenkeel.hosts.backends.tensors import bytes_of, contexts_of


@dataclass(frozen=True)
class BackendLayer:
    """One linear layer or convolution as its backend stores it.

    Attributes:
        name: dotted path in the denoiser, torch.compile's wrappers looked through.
        backend: ``torchao``, ``bitsandbytes``, ``gguf``, ``quanto``, ``sdnq``, ``modelopt``,
            ``nunchaku``, ``evenkeel``, ``casting`` (diffusers' layerwise casting), the package of an
            unknown tensor class, or ``plain``.
        format: in the backend's words, then group (``g``), rank (``r``), activations (``a``):
            ``int4-g64``, ``int3-g64-r32-a4``, ``Q8_0``, ``nf4``. Empty for ``plain``.
        bits: of a weight's code; None where the format does not tell, and for ``plain``.
        stored_bytes: of all tensors that the layer holds in memory. A simulating backend (evenkeel,
            ModelOpt, torchao's QAT) holds weights of full precision.

    """

    name: str
    backend: str
    format: str
    bits: int | None
    stored_bytes: int


def backend_layers(denoiser: nn.Module) -> tuple[BackendLayer, ...]:
    """Every linear layer and convolution, in the order of ``named_modules``.

    >>> layer, = backend_layers(nn.Sequential(nn.Linear(8, 4), nn.ReLU()))
    >>> layer.name, layer.backend, layer.stored_bytes
    ('0', 'plain', 144)

    """
    return tuple(
        BackendLayer(name, form.backend, form.text, form.bits, bytes_of(layer))
        for name, layer, form in _layers(denoiser)
    )


def backend_text(denoiser: nn.Module) -> str:
    """Backends and formats with the number of layers of each; "none" where all are plain.

    >>> backend_text(nn.Sequential(nn.Linear(8, 4)))
    'none'
    >>> from torch import float8_e4m3fn
    >>> backend_text(nn.Sequential(nn.Linear(8, 4).to(float8_e4m3fn), nn.Linear(4, 4)))
    'casting:float8_e4m3fn x 1, plain x 1'

    """
    kinds = Counter(form for _, _, form in _layers(denoiser))
    plain = kinds.pop(PLAIN, 0)
    if not kinds:
        return "none"
    parts = sorted(f"{form.backend}:{form.text} x {n}" for form, n in kinds.items())
    return ", ".join([*parts, f"plain x {plain}"] if plain else parts)


def backend_settings(denoiser: nn.Module) -> dict[str, str]:
    """What decides about a quantized layer's output besides its tensors: text by tensor or layer.

    Empty for a plain denoiser and for evenkeel's own layers, which say it themselves.

    >>> backend_settings(nn.Sequential(nn.Linear(8, 4)))
    {}

    """
    found = contexts_of(denoiser)
    for name, module in denoiser.named_modules():
        text = settings_of(module)
        if text:
            found[name.replace("_orig_mod.", "")] = text
    return dict(sorted(found.items()))


def _layers(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module, Format]]:
    inside = "\0"
    for name, module in denoiser.named_modules():
        if not is_layer(module) or name.startswith(inside):
            continue
        form = format_of(module)
        if form != PLAIN:
            inside = f"{name}."  # what a backend keeps inside a layer is part of it
        yield name.replace("_orig_mod.", ""), module, form
