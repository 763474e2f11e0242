"""A device that is none: tensors that say they are elsewhere, and a count of what leaves.

Every tensor on it wraps one on the CPU. As on a real device, tensors of the two places do not mix
(numbers and tensors without axes do), and whatever the host must wait for is counted: a copy to the
CPU, a number or truth value, a shape that depends on values. As on Apple's, there is no float64.
"""

from __future__ import annotations

import traceback
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("meta")  # the only kind besides the CPU that every build of torch knows
_WAITS = (
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "bincount",
    "unique",
)


class Elsewhere(Tensor):
    """A tensor of the fake device."""

    inner: Tensor
    is_meta = False  # there are values

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        found = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, dtype=inner.dtype, device=DEVICE, strides=inner.stride()
        )
        found.inner = inner
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Transfers(TorchDispatchMode):
    """Inside, the fake device exists and what leaves it is counted, by the line of ours that asked.

    Attributes:
        count: transfers so far.
        places: how many came from which line of the library (or of diffusers, outside of ours).

    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.places: Counter[str] = Counter()

    def __enter__(self) -> Any:
        global _ACTIVE
        _ACTIVE = self
        return super().__enter__()

    def __exit__(self, *args: Any) -> Any:
        global _ACTIVE
        _ACTIVE = None
        return super().__exit__(*args)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def note(self) -> None:
        """Something leaves."""
        self.count += 1
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename]
        ours = [f for f in frames if "/evenkeel/" in f.filename or "/diffusers/" in f.filename]
        last = ours[-1] if ours else frames[-1]
        self.places[f"{last.filename.rsplit('/', 2)[-1]}:{last.lineno} {last.name}"] += 1


_ACTIVE: Transfers | None = None


class There(TorchDispatchMode):
    """The fake device in another thread: a mode holds in the thread that entered it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.__name__.split(".")[0]
    flat: list[Any] = []
    tree_map(flat.append, (args, kwargs))
    ours = [a for a in flat if isinstance(a, Elsewhere)]
    target = kwargs.get("device")
    there = target is not None and torch.device(target).type == DEVICE.type
    if not ours and not there:
        return func(*args, **kwargs)
    leaves = ours and (name in _WAITS or (name == "_to_copy" and target is not None and not there))
    copies = name in ("_to_copy", "copy_", "_copy_from")
    for other in flat:
        if ours and isinstance(other, Tensor) and not isinstance(other, Elsewhere) and other.dim():
            assert copies or name == "index" or there, f"{func} mixes tensors of two devices"
    if name == "index":  # a mask has as many results as it has values that hold
        leaves = leaves or any(isinstance(a, Tensor) and a.dtype == torch.bool for a in flat[1:])
    if name == "copy_" and not isinstance(args[0], Elsewhere):
        leaves = True
    if leaves and _ACTIVE is not None:
        _ACTIVE.note()
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    plain = tree_map(lambda a: a.inner if isinstance(a, Elsewhere) else a, (args, kwargs))
    out = func(*plain[0], **plain[1])
    if leaves and (name != "index"):
        return out if name != "copy_" else args[0]
    if name.endswith("_") and isinstance(args[0], Elsewhere):
        return args[0]
    return tree_map(_wrapped, out)


def _wrapped(found: Any) -> Any:
    if not isinstance(found, Tensor) or isinstance(found, Elsewhere):
        return found
    assert found.dtype not in (torch.float64, torch.complex128), "this device has no float64"
    return Elsewhere(found)


def sent(module: nn.Module) -> nn.Module:
    """The module with all of its parameters and buffers on the fake device."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                moved = nn.Parameter(Elsewhere(parameter.data), requires_grad=False)
                part._parameters[name] = moved
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = Elsewhere(buffer)
    return module
