"""Outputs of both denoisers at the same states, element by element: what a record only keeps sums of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from evenkeel.hosts.pipeline.denoiser_calls import one_per_prompt
from evenkeel.hosts.run import Batch, Run
from evenkeel.hosts.scheduler.tape import Recorder, Replayer, Tape
from evenkeel.reproduction.run_cell import Bench
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.evidence import Evidence
from evenkeel.statistics.exact import Pending
from evenkeel.statistics.moments import PairedMoments

EACH = 64  # prompts of a call, and of a file


@dataclass(frozen=True)
class Pairs:
    """Of every prompt and step; (prompts, steps, channels, height, width) float32.

    Attributes:
        e, q: full-precision and quantized outputs, after guidance.
        x: states that they were given.
        law: of the run.

    """

    e: Tensor
    q: Tensor
    x: Tensor
    law: StepLaw

    @property
    def d(self) -> Tensor:
        """The quantization error."""
        return self.q - self.e

    def evidence(self) -> Evidence:
        """What corrections are made from."""
        moments = PairedMoments.of(*(t.flatten(3) for t in (self.e, self.d, self.x)))
        law = self.law
        return Evidence(law.prediction, law.alpha[:-1], law.sigma[:-1], moments)

    def at(self, share: float) -> int:
        """The step whose time is nearest to that share of the training's 1,000."""
        times = torch.as_tensor(self.law.timesteps).double()
        return int((times - 1000 * share).abs().argmin())


@lru_cache(maxsize=1)
def pairs(bench: Bench, count: int, *, noised: bool = False) -> Pairs:
    """Of ``count`` calibration prompts, kept in the cell's folder as they are made.

    Args:
        bench: of the cell.
        count: a multiple of ``EACH``.
        noised: at full-precision results with fresh noise of every step's level (DCNC, Algorithm 1),
            instead of along the full-precision trajectory.

    """
    run = bench.run_on(bench.prompts(count, 0), bench.quantized(), batch_size=EACH)
    parts = []
    for batch in run.batches():
        place = bench.folder / f"pairs{'-noised' if noised else ''}-{batch.first:06d}.safetensors"
        if not place.exists():
            found = {k: v.contiguous() for k, v in _batch(run, batch, noised).items()}
            save_file(found, place.with_suffix(".part"))
            place.with_suffix(".part").rename(place)
        parts.append(load_file(place))
    return Pairs(*(torch.cat([p[k] for p in parts]) for k in ("e", "q", "x")), run.law())


def _batch(run: Run, batch: Batch, noised: bool) -> dict[str, Tensor]:
    full, quantized = run.pair
    tape = Tape()
    with run.undisturbed(full, Recorder(tape)):
        run.sample(batch)
    if noised:
        tape = _noised(tape, batch)
        tape.outputs = led(run, batch, full, tape)
    columns = {"e": tape.outputs, "q": led(run, batch, quantized, tape), "x": tape.samples}
    n = len(batch)
    return {k: torch.stack([one_per_prompt(t, n) for t in v], 1) for k, v in columns.items()}


def _noised(tape: Tape, batch: Batch) -> Tape:
    """Every state but the first is the run's result with fresh noise of its level."""
    law, clean = tape.law, tape.results[-1]
    assert law is not None
    generator = torch.Generator().manual_seed(batch.seed)
    whole = one_per_prompt(clean, len(batch))
    states = tape.samples[:1]
    for k in range(1, len(tape.samples)):
        eps = torch.randn(whole.shape, generator=generator)
        eps = eps.repeat(len(clean) // len(whole), *[1] * (eps.ndim - 1))
        states.append(float(law.alpha[k]) * clean + float(law.sigma[k]) * eps)
    return Tape(states, list(tape.outputs), [*states[1:], clean], law)


def led(run: Run, batch: Batch, denoiser: nn.Module, tape: Tape) -> list[Tensor]:
    """What a denoiser gives at the states of the tape."""
    outputs: list[Tensor] = []

    def see(step: int, output: Tensor, reached: Pending[None]) -> None:
        reached.now()
        outputs.append(output.clone())

    with run.undisturbed(denoiser, Replayer(tape, see)):
        run.sample(batch)
    return outputs
