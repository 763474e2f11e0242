"""Which backend quantized which layer of a denoiser, in what format, and what it stores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from evenkeel.errors import UnsupportedPipeline
from evenkeel.hosts.backends.base import Backend, number, written
from evenkeel.hosts.backends.bitsandbytes import BitsAndBytes
from evenkeel.hosts.backends.casting import Casting
from evenkeel.hosts.backends.comfy_kitchen import ComfyKitchen
from evenkeel.hosts.backends.evenkeel import Evenkeel
from evenkeel.hosts.backends.gguf import GGUF
from evenkeel.hosts.backends.modelopt import ModelOpt
from evenkeel.hosts.backends.nunchaku import Nunchaku
from evenkeel.hosts.backends.quanto import Quanto
from evenkeel.hosts.backends.sdnq import SDNQ
from evenkeel.hosts.backends.torchao import TorchAO

# The first one that owns a layer describes it.
BACKENDS: tuple[Backend, ...] = (
    TorchAO(),
    BitsAndBytes(),
    GGUF(),
    Quanto(),
    SDNQ(),
    ModelOpt(),
    Nunchaku(),
    ComfyKitchen(),
    Evenkeel(),
    Casting(),
)


@dataclass(frozen=True)
class BackendLayer:
    """One linear layer or convolution as its backend stores it.

    Attributes:
        name: dotted path in the denoiser, torch.compile's wrappers looked through.
        backend: ``torchao``, ``bitsandbytes``, ``gguf``, ``quanto``, ``sdnq``, ``modelopt``,
            ``nunchaku``, ``comfy-kitchen``, ``evenkeel``, ``casting`` (diffusers' layerwise casting),
            the package of an unknown tensor class, or ``plain``.
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
        BackendLayer(name, *form, int(number(form.text) or 0) or None, bytes_of(layer))
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
    found = {
        _plain_path(name): _context(tensor)
        for name, tensor in (*denoiser.named_parameters(), *denoiser.named_buffers())
    }
    for name, module in denoiser.named_modules():
        text = next((text for b in BACKENDS if (text := b.settings(module))), "")
        found |= {_plain_path(name): text} if text else {}
    return {name: text for name, text in sorted(found.items()) if text}


def stored_tensors(module: nn.Module, *, tied: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Name and plain tensor of everything that decides about the output, in no special order.

    For a plain module these are its parameters and buffers. The same network gives the same tensors
    before and after its first call, and compiled or not, although some backends move theirs about.

    Args:
        module: of any backend.
        tied: give a tensor that several places share under every one of its names, not once.

    Raises:
        UnsupportedPipeline: a tensor class, or a network in C++ (nunchaku's first FLUX loader), that
            shows nothing of what it stores.

    >>> sorted(name for name, tensor in stored_tensors(nn.Linear(8, 4)))
    ['bias', 'weight']

    """
    for named in (module.named_parameters, module.named_buffers):
        for name, tensor in named(remove_duplicate=not tied):
            yield from _plain(_plain_path(name), tensor)
    for name, part in module.named_modules():
        for backend in BACKENDS:
            if hidden := backend.hidden(part):
                raise UnsupportedPipeline(
                    f"the weights of {name or type(part).__name__} are {hidden}"
                )
            for key, tensor in backend.beside(part):
                yield from _plain(_plain_path(f"{name}.{key}").lstrip("."), tensor)


def bytes_of(module: nn.Module) -> int:
    """Memory of everything that `stored_tensors` gives.

    >>> bytes_of(nn.Linear(8, 4))
    144

    """
    return sum(tensor.numel() * tensor.element_size() for _, tensor in stored_tensors(module))


class _Format(NamedTuple):
    backend: str
    text: str


PLAIN = _Format("plain", "")


def _layers(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module, _Format]]:
    inside = "\0"
    for name, module in denoiser.named_modules():
        if not _is_layer(module) or name.startswith(inside):
            continue
        form = _format_of(module)
        if form != PLAIN:
            inside = f"{name}."  # what a backend keeps inside a layer is part of it
        yield _plain_path(name), module, form


def _is_layer(module: Any) -> bool:
    """Whether it says about itself that it is a linear layer or a convolution, and holds a weight."""
    size = ("in_features", "out_features"), ("in_channels", "out_channels", "kernel_size")
    holds = any(hasattr(module, key) for key in ("weight", "qweight"))
    # An adapter (peft) shows the sizes of the layer inside it, which is counted by itself.
    return (
        holds
        and not hasattr(module, "base_layer")
        and any(all(hasattr(module, key) for key in keys) for keys in size)
    )


def _format_of(layer: nn.Module) -> _Format:
    """The backend and format of one layer; ``PLAIN`` if it is an ordinary one."""
    for backend in BACKENDS:
        if backend.owns(layer):
            text = backend.format(layer)
            return _Format(backend.name, text) if text else PLAIN
    kind = type(getattr(layer, "weight", None))
    if issubclass(kind, Tensor) and kind not in (Tensor, nn.Parameter):  # nobody's we know
        return _Format(kind.__module__.split(".")[0], kind.__name__.lower())
    return PLAIN


def _plain_path(name: str) -> str:
    return name.replace("_orig_mod.", "")  # torch.compile's wrappers


def _plain(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors behind a parameter or buffer, whatever a backend wraps them in."""
    kind = type(tensor)
    if kind in (Tensor, nn.Parameter):
        yield name, tensor.detach()
        return
    own = next((t for b in BACKENDS if (t := b.tensors(name, tensor)) is not None), None)
    if own is not None:
        yield from own
    elif hasattr(tensor, "__tensor_flatten__"):
        for key in tensor.__tensor_flatten__()[0]:
            yield from _plain(f"{name}.{key}", getattr(tensor, key))
    elif issubclass(kind, nn.Parameter):  # with memory of its own (bitsandbytes' Int8Params)
        yield name, tensor.data.as_subclass(Tensor).detach()
    else:
        raise UnsupportedPipeline(
            f"{name} is a {kind.__module__}.{kind.__name__}: a tensor class without "
            f"__tensor_flatten__, so what it stores cannot be recognised again. Supported backends "
            f"are listed in docs/backends.md."
        )


def _context(tensor: Any) -> str:
    """What a wrapped tensor says about itself: group, dtype, how the input is rounded."""
    if type(tensor) in (Tensor, nn.Parameter):
        return ""
    if hasattr(tensor, "__tensor_flatten__"):
        return written(tensor.__tensor_flatten__()[1])
    return next((text for b in BACKENDS if (text := b.context(tensor))), "")
