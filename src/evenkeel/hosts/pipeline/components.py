"""What the parts of a pipeline beside its denoiser are made of, and what has been set on all of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.hosts.pipeline.contents import described
from evenkeel.hosts.pipeline.fingerprint import fingerprint

_PLAIN = (bool, int, float, str, type(None), torch.dtype)
_OF_ADAPTERS = ("_active_adapter", "_disable_adapters")  # of peft: which one acts, and whether
_ELSEWHERE = ("config", "generation_config")  # part of the fingerprint, or of no account
# What schedulers derive from their configuration, and what users of them set by hand.
_OF_SCHEDULERS = ("betas", "alphas_cumprod", "final_alpha_cumprod", "_shift")


def component_keys(pipeline: Any, without: str) -> dict[str, str]:
    """A digest of every component but one, and of the pipeline's own settings: by name.

    Networks by their fingerprint and by what is set on them, tokenizers by their vocabulary, other parts
    by their configuration. Where a part is placed does not matter, nor whether it has been used.

    >>> component_keys(type("Host", (), {"components": {"vae": None}, "config": {}})(), "unet")["vae"]
    'none'

    """
    parts = {k: v for k, v in pipeline.components.items() if k != without}
    found = {name: component_key(part) for name, part in sorted(parts.items())}
    own = {k: v for k, v in dict(pipeline.config).items() if k[:1] != "_" and k not in parts}
    found["pipeline"] = _digest([own, {k: _set(v) for k, v in _public(pipeline, parts)}])
    return found


def component_key(part: Any) -> str:
    """A digest of one component: a network, a tokenizer, a scheduler, or whatever else there is."""
    if part is None:
        return "none"
    if isinstance(part, nn.Module):
        return f"{fingerprint(part)} {network_settings(part)}"
    found: list[Any] = [type(part).__name__]
    if hasattr(part, "get_vocab"):
        found += [part.get_vocab(), part.init_kwargs, part.model_max_length]
        if not found[0].startswith("Gemma"):  # pipelines set it on their first call
            found.append(part.padding_side)
        found += [getattr(part, "chat_template", None), _rules(part)]
    elif hasattr(part, "to_dict"):
        found.append(part.to_dict())
    else:
        # What begins so is diffusers' own, in no certain order.
        config = dict(getattr(part, "config", {}))
        found.append({k: v for k, v in config.items() if k[:1] != "_"})
        found += [described(getattr(part, name, None)) for name in _OF_SCHEDULERS]
    return _digest(found)


def network_settings(network: nn.Module) -> str:
    """A digest of what is set on a network and its layers and is no tensor.

    Which adapters act and how strongly, tiling of an autoencoder, FreeU, processors of attention: all
    of it lives in plain attributes.
    """
    network = getattr(network, "_orig_mod", network)
    found = {
        name.replace("_orig_mod.", ""): {k: _set(v, deep=True) for k, v in _public(module)}
        for name, module in network.named_modules()
    }
    return _digest(found)


def _public(thing: Any, without: Mapping[str, Any] | None = None) -> Iterator[tuple[str, Any]]:
    for name, value in sorted(getattr(thing, "__dict__", {}).items()):
        hidden = name.startswith(("_", "hf_")) or "cached" in name or name in _ELSEWHERE
        if (not hidden or name in _OF_ADAPTERS) and name not in (without or ()):
            yield name, value


def _set(value: Any, deep: bool = False) -> Any:
    """Plain values as they are, of others the class and, where asked for, its own plain values."""
    if isinstance(value, _PLAIN):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _set(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_set(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(v) for v in value)
    if isinstance(value, Tensor):
        return described(value)
    name = getattr(value, "__qualname__", type(value).__qualname__)
    own = {k: _set(v) for k, v in _public(value)} if deep else {}
    return [name, own]


def _rules(tokenizer: Any) -> Any:
    """How a tokenizer cuts texts; how long they were when it was last used does not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    return json.loads(backend.to_str()) | {"truncation": None, "padding": None}


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
