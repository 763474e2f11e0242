"""What one optimizer step of a trained quantizer costs, over a plain forward pass of the denoiser.

The step: a call of full precision, one of the student and its gradient, AdamW, scales kept positive. Beside
it the same passes of the full-precision denoiser with gradients of all its weights, which is what training
without quantization would take.
Run: OMP_NUM_THREADS=1 python benchmarks/training.py [TWIN ...]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from timing import Spread, interleaved, ratio, report
from torch import Tensor

from evenkeel import zoo
from evenkeel.fitting.training.losses import Loss
from evenkeel.fitting.training.train_quantized import inputs_by_level, trajectories_of
from evenkeel.hosts.pipeline.denoiser_calls import answer_of
from evenkeel.hosts.run import Run
from evenkeel.quantizers import EfficientDM
from evenkeel.quantizers.methods.merged_training import Student
from evenkeel.quantizers.workspace.workspace import Workspace
from evenkeel.zoo.pictures import KINDS

REPEATS = 20
METHOD = EfficientDM(steps=(4,), calibration_runs=1)


def saved_bytes(work: Callable[[], object]) -> int:
    """Of what a forward pass keeps for its gradient, every storage once."""
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        work()
    return sum(seen.values())


def measure(name: str) -> None:
    twin = zoo.twin(name)
    prompts = KINDS[twin.pictures].prompts(8, 0)
    run = Run(zoo.load(name), prompts, 4, guidance_scale=twin.guidance_scale)
    (source,) = trajectories_of(run, METHOD)
    workspace = Workspace(run.denoiser)
    workspace.keep_matching(METHOD.skip)
    inputs = inputs_by_level(run.denoiser, workspace, [source], source.levels, 1)
    student = Student(run.denoiser, METHOD.starts(workspace, source.levels, inputs))
    plain, loss, call = copy.deepcopy(run.denoiser), Loss(), next(source.epoch(0))
    plain.requires_grad_(True)
    groups = {student.network: student.groups(METHOD), plain: list(plain.parameters())}
    optimizers = {n: torch.optim.AdamW(given, fused=True) for n, given in groups.items()}

    def forward(network: Any) -> Tensor:
        given = call.student
        return loss(call, answer_of(network(*given.arguments, **dict(given.keywords))))

    def step(network: Any) -> None:
        call.student.make(run.denoiser)
        forward(network).backward()  # type: ignore[no-untyped-call]
        optimizers[network].step()
        optimizers[network].zero_grad()
        student.settle()

    laps = interleaved(
        {
            "forward": lambda: lambda: call.student.make(run.denoiser),
            "step": lambda: lambda: step(student.network),
            "plain step": lambda: lambda: step(plain),
        },
        repeats=REPEATS,
    )
    kept = {n: saved_bytes(lambda n=n: forward(n)) for n in (student.network, plain)}
    trained = sum(p.numel() for p in student.network.parameters() if p.requires_grad)
    weights = sum(p.numel() for p in plain.parameters())
    cost, without = (ratio(laps, key, "forward") for key in ("step", "plain step"))
    row = {
        "benchmark": "training",
        "twin": name,
        "rows": len(call.target),
        "forward_ms": Spread.of(laps["forward"]).as_dict(2),
        "step_over_forward": cost.as_dict(2),
        "plain_step_over_forward": without.as_dict(2),
        "kept_for_gradients_over_plain": round(kept[student.network] / kept[plain], 2),
        "trained_over_weights": round(trained / weights, 2),
    }
    report(row, f"{name}: a step takes {cost} plain forward passes, without rounding {without}")


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("twins", nargs="*", default=["ldm-4"])
    for name in parser.parse_args().twins:
        measure(name)


if __name__ == "__main__":
    main()
