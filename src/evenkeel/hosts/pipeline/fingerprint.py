"""What a denoiser is made of: a digest that tells any two apart, and what quantized it."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor, nn

from evenkeel.hosts.backends.catalogue import backend_settings, backend_text, stored_tensors
from evenkeel.hosts.pipeline.offloaded import present

_SAMPLED = 65_536
BESIDE = "evenkeel_beside"  # attribute of a denoiser whose layers have adapters: their digest


def fingerprint(module: nn.Module) -> str:
    """A digest of class, configuration, quantizer and weights.

    Of large tensors 65,536 evenly spaced entries are hashed: enough to tell any two trained or
    quantized models apart, and seconds instead of minutes for billions of weights. Quantized weights
    are hashed as their backend stores them, with their scales; compiled or not, before and after the
    first call, and saved and loaded again, a network keeps its fingerprint.

    Raises:
        UnsupportedPipeline: weights are on the meta device and no offloading hook keeps them, or of a
            tensor class that does not show what it stores.

    """
    module = getattr(module, "_orig_mod", module)  # torch.compile wraps it; the network is the same
    digest = hashlib.sha256(type(module).__name__.encode())
    known = getattr(module, "config", {})
    known = (
        known.to_dict() if hasattr(known, "to_dict") else dict(known)
    )  # transformers' or diffusers'
    config = {k: v for k, v in known.items() if k[:1] != "_"}
    # Its layers tell better: a network quantized in memory has none, the same one loaded does.
    config.pop("quantization_config", None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(quantizer_text(module).encode())
    settings = backend_settings(module)
    if settings:
        digest.update(json.dumps(settings).encode())
    # Branches that layers share in memory (SVDQuant's) are a copy for each when loaded.
    tensors = stored_tensors(module, tied=True)
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        flat = present(module, name, tensor).reshape(-1)
        stride = max(1, flat.numel() // _SAMPLED)
        sampled = flat[::stride][:_SAMPLED].contiguous().cpu()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(_bytes(sampled))
    return digest.hexdigest()[:32]


def _bytes(tensor: Tensor) -> bytes:
    if tensor.numel() == 0:
        return b""
    data: bytes = tensor.view(torch.uint8).numpy().tobytes()
    return data


def quantizer_text(module: nn.Module) -> str:
    """What quantized this module, and how many layers; "none" for a plain one.

    evenkeel's own quantizers leave their specification; of other backends the layers are counted
    (``torchao:int8 x 46, plain x 7``); of one that is not known, what diffusers noted about it.
    """
    module = getattr(module, "_orig_mod", module)
    beside = getattr(module, BESIDE, "")
    if beside:
        return f"{_quantizer_text(module)} + adapters {beside}"
    return _quantizer_text(module)


def _quantizer_text(module: nn.Module) -> str:
    own = getattr(module, "evenkeel_quantizer", None)
    if own is not None:
        return str(own)
    text = backend_text(module)
    config = getattr(getattr(module, "config", None), "quantization_config", None)
    if text == "none" and config is not None:
        method = getattr(config, "quant_method", None) or dict(config).get("quant_method", "?")
        return f"diffusers:{getattr(method, 'value', method)}"
    return text
