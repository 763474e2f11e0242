"""One seeded training loop for every network of the zoo: cosine rate, EMA, resume after a kill.

Every step draws its randomness from a generator made of (seed, step), so a resumed run sees what an
uninterrupted run would have seen. Checkpoints are safetensors plus JSON; nothing is pickled.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Container
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm.auto import tqdm

from evenkeel.storage import write_atomically

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
    ``recipe.json``. A folder that was made with another recipe is refused.

    Args:
        network: on any device; not copied.
        loss_of: (network, generator of the step) -> scalar.
        recipe: how long and how fast.
        folder: of this run alone.
        keep: numbers of steps after which the averaged weights are also kept, as ``step-N.safetensors``.

    """
    from accelerate import Accelerator

    folder.mkdir(parents=True, exist_ok=True)
    written = folder / "recipe.json"
    if written.exists() and json.loads(written.read_text()) != asdict(recipe):
        raise ValueError(
            f"{folder} holds a run with another recipe: {written.read_text()}; "
            f"expected {json.dumps(asdict(recipe))}. Remove the folder or use another one."
        )
    write_atomically(written, json.dumps(asdict(recipe)))

    accelerator = Accelerator()
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    network, optimizer = accelerator.prepare(network, optimizer)
    plain: nn.Module = accelerator.unwrap_model(network)
    average = {k: v.detach().clone() for k, v in plain.state_dict().items()}
    state, first, spent = folder / "state.safetensors", 0, 0.0
    if state.exists():
        first, spent = _load(state, plain, optimizer, average)

    network.train()
    began = time.monotonic()
    curve = _curve_up_to(first, folder / "loss.jsonl")
    progress = tqdm(range(first, recipe.steps), initial=first, total=recipe.steps, desc=folder.name)
    running = None
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
        if (step + 1) % 50 == 0 or step + 1 == recipe.steps:
            seconds = spent + time.monotonic() - began
            line = {"step": step + 1, "loss": round(running, 6), "seconds": round(seconds, 1)}
            with curve.open("a") as file:
                file.write(json.dumps(line) + "\n")
            progress.set_postfix(loss=f"{running:.4f}")
        if step + 1 in keep:
            kept = {k: v.contiguous() for k, v in average.items()}
            write_atomically(folder / f"step-{step + 1}.safetensors", save(kept))
        if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
            _save(state, plain, optimizer, average, step + 1, spent + time.monotonic() - began)
    plain.load_state_dict(average)
    return plain.eval()


def _curve_up_to(step: int, path: Path) -> Path:
    """What was written after the resume point will be written again."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    write_atomically(path, "".join(line + "\n" for line in kept))
    return path


def _save(
    path: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
    step: int,
    seconds: float,
) -> None:
    # Clones: tied weights (T5's embedding) share memory, which the format refuses.
    tensors = {f"network.{k}": v.clone() for k, v in network.state_dict().items()}
    tensors |= {f"average.{k}": v.clone() for k, v in average.items()}
    for index, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in entry.items()}
    metadata = {"step": str(step), "seconds": f"{seconds:.1f}"}
    write_atomically(path, save(tensors, metadata))


def _load(
    path: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
) -> tuple[int, float]:
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        header = f.metadata()
    tensors = load_file(path)
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
    return int(header["step"]), float(header["seconds"])
