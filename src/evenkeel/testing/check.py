"""What every correction promises, checked: whoever writes one proves it in two lines."""

from __future__ import annotations

import copy
import functools
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from evenkeel.applying import apply, remove
from evenkeel.corrections.base import Correction, Tables, refuse_foreign
from evenkeel.corrections.plan import STAGES, SamplerPlan
from evenkeel.errors import EvenkeelError, RecordError, UnsupportedSampler
from evenkeel.hosts.actuators.corrector import Corrector
from evenkeel.hosts.pipeline.layouts import LatentLayout
from evenkeel.hosts.pipeline.pipelines import denoiser_of
from evenkeel.hosts.scheduler.interception import install
from evenkeel.statistics.evidence import Evidence
from evenkeel.testing.pipeline import sampled, tiny_law, tiny_pipeline
from evenkeel.testing.scheduler_cases import LINEAR, SOME, Case
from evenkeel.testing.synthetic import drawn_evidence, evidence_of, law_of

ERROR = 0.3
_LAYOUT = LatentLayout(ndim=4, axis=1, channels=4, patch=1)

Make = Callable[[Evidence], Correction]


def check_correction(
    make: Make, *, needs_error: bool = True, schedulers: Sequence[Case] = LINEAR
) -> None:
    """Check a correction against everything that the library relies on; takes seconds, needs no GPU.

    - It declares what a ``Correction`` declares: name, references, stages, what it was made for.
    - Its digest is complete: it changes with everything that the correction holds, and survives copies.
    - On every scheduler its plan is finite and keeps to the declared stages, or is refused with a
      reason, and so are the states that it leads to.
    - Without an error it changes nothing, bit for bit.
    - What it writes to a file gives it back, if it has tables.
    - Applied to a real pipeline and removed, it leaves every weight, hook and image as it was.

    Args:
        make: from evidence; a correction that is not made from evidence ignores it, or takes its tables
            from it.
        needs_error: False for a correction that acts where the two denoisers agree (a baseline without
            calibration).
        schedulers: of ``evenkeel.testing.LINEAR``.

    Raises:
        AssertionError: naming the correction and what it breaks.

    Example::

        def test_my_correction():
            check_correction(MyCorrection)

    """
    law = tiny_law()
    one, other = (make(drawn_evidence(law, ERROR, seed=seed)) for seed in (0, 1))
    check_declared(one)
    measured = one.digest() != other.digest()
    _expect(one, not measured or one.made_for is not None, "is measured, but made_for is None")
    check_digest(one, make(drawn_evidence(law, ERROR)))
    check_plans(make, schedulers)
    if needs_error:
        check_identity(make, schedulers)
    check_tables(one)
    check_removal(one)


def check_declared(correction: Any) -> None:
    """Name, references and stages are there, and mean something."""
    refuse_foreign(correction)
    _expect(correction, isinstance(correction.name, str) and correction.name, "name must be a text")
    _expect(
        correction,
        isinstance(correction.references, tuple) and all(correction.references),
        "references must be a tuple of texts",
    )
    unknown = [s for s in correction.stages if s not in STAGES]
    _expect(correction, not unknown, f"stages are of {STAGES}, not {unknown}")
    heads = "head" in correction.stages
    _expect(
        correction,
        heads == (correction.heads is not None),
        "stage 'head' and heads belong together",
    )
    layers = "layers" in correction.stages or not correction.beside
    _expect(correction, layers, "has adapters but does not declare the stage 'layers'")


def check_digest(correction: Correction, again: Correction) -> None:
    """Equal for equals and copies, another one where anything is changed."""
    digest = correction.digest()
    _expect(correction, again.digest() == digest, "made twice, has two digests")
    _expect(correction, copy.deepcopy(correction).digest() == digest, "a copy has another digest")
    for path, changed in _varied(correction):
        _expect(correction, changed.digest() != digest, f"its digest does not see {path}")


def check_plans(make: Make, schedulers: Sequence[Case]) -> None:
    """Finite and as declared on every scheduler, or refused with a reason; not refused everywhere."""
    reasons = {}
    for case in _linear(schedulers):
        correction = make(evidence_of(case, ERROR))
        try:
            plan = correction.plan(law_of(case))
        except EvenkeelError as error:
            reasons[case.name] = str(error)
            _expect(correction, len(str(error)) > 10, f"is refused without a reason on {case}")
            continue
        _expect(correction, _is_finite(plan), f"has a plan that is not finite on {case}")
        undeclared = [s for s in plan.stages if s not in correction.stages]
        _expect(
            correction, not undeclared, f"changes {undeclared} on {case}, which it does not declare"
        )
        steps = len(plan.explanations)
        _expect(correction, steps == plan.law.steps, f"explains {steps} steps of {plan.law.steps}")
        if case in SOME:
            states = sampled_with(case, correction)
            _expect(
                correction, bool(states.isfinite().all()), f"leads to NaN or infinity on {case}"
            )
    everywhere = len(reasons) == len(_linear(schedulers))
    _expect(
        correction, not everywhere, f"is refused everywhere: {next(iter(reasons.values()), '')}"
    )


def check_identity(make: Make, schedulers: Sequence[Case]) -> None:
    """Nothing is changed where the quantized denoiser gives what the full-precision one does."""
    for case in _linear(schedulers):
        correction = make(evidence_of(case, 0.0))
        try:
            plan = correction.plan(law_of(case))
        except EvenkeelError:
            continue
        heads = correction.heads
        same = plan.is_identity and (heads is None or heads.table.is_identity)
        _expect(correction, same, f"acts without an error on {case}: {plan.stages or 'head'}")
        if case in SOME:
            same = torch.equal(sampled_with(case, correction), sampled_with(case, None))
            _expect(correction, same, f"changes bits without an error on {case}")


def check_tables(correction: Correction) -> None:
    """What a file holds of it makes the same correction again."""
    try:
        tables = correction.tables()
    except RecordError:  # it says why it cannot be saved
        return
    if tables is None or correction.made_for is None:
        return
    described = json.loads(json.dumps(tables.described))
    own = {n: t.contiguous().clone() for n, t in tables.tensors.items()}
    tensors = load(save(own)) if own else {}
    back = type(correction).from_tables(Tables(described, tensors), correction.made_for)
    _expect(
        correction, back.digest() == correction.digest(), "is another one after saving and loading"
    )


def check_removal(correction: Correction) -> None:
    """Applied to a real pipeline it gives finite images; removed, everything is bit-equal."""
    pipeline = tiny_pipeline()
    before, plain = _state_of(pipeline), sampled(pipeline)
    allowed = ("denoiser", "scheduler", "guidance")
    apply(pipeline, correction, allow=allowed)
    _expect(
        correction, bool(sampled(pipeline).isfinite().all()), "makes images that are not finite"
    )
    remove(pipeline)
    after = _state_of(pipeline)
    changed = [name for name, part in before.items() if not _same(part, after.get(name))]
    changed += sorted(after.keys() - before.keys())
    _expect(correction, not changed, f"removed, it leaves another {', '.join(changed)}")
    _expect(correction, torch.equal(sampled(pipeline), plain), "removed, it leaves other images")


def sampled_with(case: Case, correction: Correction | None) -> Tensor:
    """The state after a run of a real scheduler with a smooth toy denoiser."""
    scheduler = case.ready()
    if correction is not None:
        install(scheduler, Corrector(correction, _NOBODY, layout=_LAYOUT))
    generator = torch.Generator().manual_seed(3)
    start = float(getattr(scheduler, "init_noise_sigma", 1.0))
    x = torch.randn(2, 4, 4, 4, generator=generator) * start
    draws = "generator" in inspect.signature(scheduler.step).parameters
    drawing = {"generator": generator} if draws else {}
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        m = torch.tanh(seen) * 0.7
        x = scheduler.step(m, t, x, return_dict=False, **case.step, **drawing)[0]
    return x


class _Nobody:
    """Stands for the pipeline that a correction is bound to."""


_NOBODY = _Nobody()


def _expect(correction: Any, holds: object, what: str) -> None:
    if not holds:
        raise AssertionError(f"{correction.name}: {what}.")


def _linear(schedulers: Sequence[Case]) -> list[Case]:
    """Those that have a step law at all."""
    return [case for case in schedulers if _has_law(case)]


@functools.cache
def _has_law(case: Case) -> bool:
    try:
        law_of(case)
    except UnsupportedSampler:
        return False
    return True


def _is_finite(plan: SamplerPlan) -> bool:
    changes = [plan, *(c for c in (plan.edit, plan.relabel, plan.refresh) if c is not None)]
    values = [getattr(c, f.name) for c in changes for f in fields(c)]
    return all(bool(v.isfinite().all()) for v in values if isinstance(v, Tensor))


def _varied(value: Any) -> Iterator[tuple[str, Any]]:
    """Copies that differ in one attribute, number or element, wherever it lies; with its path."""
    if isinstance(value, Tensor) and value.numel():
        changed = value.clone()
        middle = changed.view(-1)[value.numel() // 2 :][:1]
        middle.copy_(~middle if value.dtype == torch.bool else middle + 1)
        yield "", changed
    elif isinstance(value, np.ndarray) and value.size:
        changed_array = value.copy()
        changed_array.flat[value.size // 2] += 1
        yield "", changed_array
    elif isinstance(value, bool):
        yield "", not value
    elif isinstance(value, int | float):
        yield "", value + 1
    elif isinstance(value, str):
        yield "", value + "x"
    elif value is None:
        yield "", 0
    elif isinstance(value, tuple | list):
        yield "", type(value)([*value, None])
        for i, part in enumerate(value):
            for path, changed in _varied(part):
                yield f"[{i}]{path}", type(value)([*value[:i], changed, *value[i + 1 :]])
    elif isinstance(value, dict):
        yield "", {**value, "another": None}
    elif isinstance(value, Correction) or is_dataclass(value):
        for name, part in vars(value).items():
            for path, changed in _varied(part):
                copied = copy.copy(value)
                object.__setattr__(copied, name, changed)
                yield f".{name}{path}", copied


def _state_of(pipeline: Any) -> dict[str, Any]:
    """Whatever applying could leave behind."""
    denoiser, scheduler = denoiser_of(pipeline), pipeline.scheduler
    hooks = [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in denoiser.named_modules()
    ]
    return {
        **{f"weight {name}": t.clone() for name, t in denoiser.state_dict().items()},
        "hooks": hooks,
        "class of the scheduler": type(scheduler),
        "configuration of the scheduler": dict(scheduler.config),
        "attributes of the pipeline": sorted(pipeline.__dict__),
    }


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)
