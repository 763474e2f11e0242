"""One seeded training loop for every network of the zoo: cosine rate, EMA, resume after a kill.

Every step draws its randomness from a generator made of (seed, step), so a resumed run sees what an
uninterrupted run would have seen.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Container
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from tqdm.auto import tqdm

from evenkeel.storage import (
    Kind,
    Number,
    check_json,
    claim,
    read_tensors,
    write_atomically,
    write_tensors,
)

_AGAIN = "remove the folder and train again"
RUN = Kind("recipe", 1, _AGAIN, keys=("recipe",))
_SAID = {"step": Number(int, low=1), "seconds": float, "running": float, "curve": [dict]}
STATE = Kind("training of the zoo", 1, _AGAIN, keys=("state",))

# (network, generator of this step) -> scalar loss
Loss = Callable[[nn.Module, np.random.Generator], Tensor]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long and how fast a network is trained.

    Attributes:
        steps, learning_rate, warmup: cosine decay to a hundredth after a linear start.
        seed: of every step's randomness.
        weight_decay: of AdamW.
        ema: decay of the averaged weights.
        save_every: steps between resume points.
        bfloat16: compute in it where torch's autocast does; convolutions get 1.5 times faster on
            processors that have it, small matrices do not.

    """

    steps: int
    learning_rate: float
    seed: int
    warmup: int = 100
    weight_decay: float = 0.0
    ema: float = 0.999
    save_every: int = 500
    bfloat16: bool = False


def fit(
    network: nn.Module,
    loss_of: Loss,
    recipe: Recipe,
    folder: Path,
    *,
    keep: Container[int] = (),
) -> nn.Module:
    """Train ``network`` in place and return it holding its averaged (EMA) weights.

    ``folder`` receives ``state.safetensors`` (resume point), ``loss.jsonl`` (the loss curve) and
    ``recipe.json``.

    Args:
        network: on any device; not copied.
        loss_of: (network, generator of the step) -> scalar.
        recipe: how long and how fast.
        folder: of this run alone.
        keep: numbers of steps after which the averaged weights are also kept, as ``step-N.safetensors``.

    Raises:
        StorageError: the folder holds a run with another recipe, or of another network, or a damaged one.

    """
    from accelerate import Accelerator

    folder.mkdir(parents=True, exist_ok=True)
    claim(folder / "recipe.json", RUN, asdict(recipe))

    accelerator = Accelerator()
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    network, optimizer = accelerator.prepare(network, optimizer)
    plain: nn.Module = accelerator.unwrap_model(network)
    average = {k: v.detach().clone() for k, v in plain.state_dict().items()}
    state, first, spent = folder / "state.safetensors", 0, 0.0
    running, curve = None, []
    if state.exists():
        said = _load(state, plain, optimizer, average)
        first, spent, running, curve = (said[k] for k in ("step", "seconds", "running", "curve"))

    network.train()
    began = time.monotonic()
    progress = tqdm(range(first, recipe.steps), initial=first, total=recipe.steps, desc=folder.name)
    for step in progress:
        warm = min(1.0, (step + 1) / recipe.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * warm * max(cosine, 0.01)
        rng = np.random.default_rng([recipe.seed, step])
        torch.manual_seed(int(rng.integers(2**62)))
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=recipe.bfloat16):
            loss = loss_of(network, rng)
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        decay = min(recipe.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            now = plain.state_dict()
            floats = [k for k, v in average.items() if v.is_floating_point()]
            torch._foreach_lerp_([average[k] for k in floats], [now[k] for k in floats], 1 - decay)
        value = loss.item()
        running = value if running is None else 0.98 * running + 0.02 * value
        seconds = round(spent + time.monotonic() - began, 1)
        if (step + 1) % 50 == 0 or step + 1 == recipe.steps:
            curve.append({"step": step + 1, "loss": round(running, 6), "seconds": seconds})
            lines = (json.dumps(line) + "\n" for line in curve)
            write_atomically(folder / "loss.jsonl", "".join(lines))
            progress.set_postfix(loss=f"{running:.4f}")
        if step + 1 in keep:
            kept = {k: v.contiguous() for k, v in average.items()}
            write_atomically(folder / f"step-{step + 1}.safetensors", save(kept))
        if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
            said = {"step": step + 1, "seconds": seconds, "running": running, "curve": curve}
            _save(state, plain, optimizer, average, said)
    plain.load_state_dict(average)
    return plain.eval()


def _save(
    path: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
    said: dict[str, Any],
) -> None:
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.items()}
    for index, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in entry.items()}
    write_tensors(path, STATE, {"state": said}, tensors)


def _load(
    path: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
) -> dict[str, Any]:
    header, tensors = read_tensors(path, STATE)
    with STATE.valid(path):
        network.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("network.")})
        for k, v in tensors.items():
            if k.startswith("average."):
                average[k[8:]].copy_(v)
        saved = optimizer.state_dict()
        for k, v in tensors.items():
            if k.startswith("optimizer."):
                index, name = k[10:].split(".", 1)
                saved["state"].setdefault(int(index), {})[name] = v
        optimizer.load_state_dict(saved)
        check_json(header["state"], _SAID)
    return dict(header["state"])
