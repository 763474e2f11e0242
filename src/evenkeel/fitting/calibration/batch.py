"""One batch of prompts: two runs through the same states, and the moments of what they gave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from evenkeel.corrections.base import Correction, text_of
from evenkeel.errors import CalibrationError
from evenkeel.fitting.calibration.step_statistics import StepStatistics
from evenkeel.hosts.actuators.correcting import interceptors_of
from evenkeel.hosts.actuators.guidance import GuidanceMeter
from evenkeel.hosts.pipeline.denoiser_calls import finite, one_per_prompt
from evenkeel.hosts.run import Batch, Run
from evenkeel.hosts.scheduler.interception import Interceptor
from evenkeel.hosts.scheduler.tape import Recorder, Replayer, Tape
from evenkeel.record import Record, fixed_point_spectrum, prompt_key
from evenkeel.statistics.exact import Pending, settled, sum_pair, working
from evenkeel.statistics.histogram import Frame

FULL_PRECISION = "full-precision"
NOISED = "noised"
_FRESH = 1 << 40  # beyond all seeds that initial noise is drawn from


class SideBySide:
    """Leads one denoiser along a trajectory and the other through its states, batch by batch.

    Args:
        run: with a quantized twin.
        trajectory, correction, histograms: as of ``calibrate``.

    """

    def __init__(
        self, run: Run, trajectory: str, correction: Correction | None, histograms: bool
    ) -> None:
        self._run, self._trajectory, self._correction = run, trajectory, correction
        self._histograms = histograms
        self._leads = trajectory in (FULL_PRECISION, NOISED)  # the full-precision one
        self._leader, self._follower = run.pair if self._leads else run.pair[::-1]
        self._alone: Tape | None = None  # of the reference and a batch of one prompt

    def record(self, batch: Batch, frame: Frame | None) -> Record:
        """The batch's record, its histograms in this frame or one of its own."""
        self._alone = None
        tape = self._led(batch, self._leader, self._correction)
        if self._trajectory == NOISED:
            tape = self._noised(batch, tape)
        kept: StepStatistics | None = None

        def see(step: int, output: Tensor, reached: Pending[None]) -> None:
            nonlocal kept
            n, follower = len(batch), self._whose(self._follower)
            rows = tape.outputs[step], output, tape.samples[step]
            first, second, x = (one_per_prompt(t, n) for t in rows)
            layout = self._run.layout(x)
            if kept is None:
                kept = StepStatistics(layout, frame, self._histograms)
            e, q = (first, second) if self._leads else (second, first)
            kept.take(e, q, x, reached, finite(output, follower, step))
            if not self._leads or n > 1:
                tape.outputs[step] = first[:0]  # the sums are all that is needed of it

        self._follow(batch, self._follower, tape, see)
        assert kept is not None and tape.law is not None
        kept.settle()
        law = tape.law.until(len(tape.samples))  # the run may end before its schedule
        moments = kept.moments
        if not (moments.mean_d.any() or moments.s(0, 2).any()):
            raise CalibrationError(
                "the quantized denoiser gives exactly the full-precision outputs: nothing was quantized."
            )
        if self._leads and len(batch) == 1:
            self._alone = tape
        spectrum = kept.spectrum
        x = one_per_prompt(tape.samples[0], len(batch))[:, None]
        return Record(
            provenance=self._run.provenance(
                law, x, trajectory=self._trajectory, correction=text_of(self._correction)
            ),
            prompt_keys=torch.stack([prompt_key(text) for text in batch.prompts.keys]),
            seeds=torch.tensor(batch.seeds),
            moments=moments,
            gram=kept.gram,
            frame=kept.frame,
            spectrum=None if spectrum is None else fixed_point_spectrum(spectrum, kept.frame),
            histogram=kept.histogram,
            noise_floor=torch.zeros(len(tape.samples), dtype=torch.float64),
            law=law,
            residual=kept.residual,
        )

    def with_noise_floor(self, part: Record, batch: Batch, limit: float) -> Record:
        """Run one prompt twice with the reference: what differs is not quantization.

        Where the batch is that prompt and the reference led, its first run is there already.
        """
        reference = self._run.denoiser
        tape, self._alone = self._alone, None
        if tape is None:
            tape = self._led(batch.alone, reference, None)
        squares: list[Pending[Tensor]] = []
        checks: list[Pending[None]] = []
        first = tape

        def see(step: int, output: Tensor, reached: Pending[None]) -> None:
            left = (working(first.outputs[step]) - working(output)).flatten()
            total, count = sum_pair(left * left), left.numel()
            squares.append(Pending((total,), lambda pair: pair.sum() / count))
            checks.append(reached)

        self._follow(batch.alone, reference, tape, see)
        floor = torch.stack(settled([*checks, *squares])[len(checks) :])
        error = part.gram.double().diagonal(dim1=1, dim2=2).mean(0)
        if (floor > limit * error).any():
            step = int((floor / error.clamp_min(1e-300)).argmax())
            raise CalibrationError(
                f"two runs of the full-precision denoiser on the same input differ: at step {step} by "
                f"{floor[step]:.3g} (mean square), against a quantization error of {error[step]:.3g}. "
                f"Non-deterministic kernels or dropout; raise noise_floor_limit to accept it."
            )
        return replace(part, noise_floor=floor)

    def _led(self, batch: Batch, leader: nn.Module, correction: Correction | None) -> Tape:
        """What the leader met and gave."""
        tape = Tape()
        interceptors: list[Interceptor] = [Recorder(tape)]
        if correction is not None:
            run = self._run
            parts = interceptors_of(correction, run.pipeline, leader, layout=run.given_layout)
            interceptors = [*parts, *interceptors]
        self._sample(batch, leader, [GuidanceMeter(self._run, leader), *interceptors])
        # Now, or the replay would seem to differ.
        settled(finite(x, self._whose(leader), step) for step, x in enumerate(tape.outputs))
        return tape

    def _noised(self, batch: Batch, led: Tape) -> Tape:
        """The leader's answers at its results, made noisy again step by step (DCNC, Algorithm 1, line 4).

        ``x_k = alpha_k x_0 + sigma_k eps_k`` with an eps of its own for every prompt and step; the first
        state is the pipeline's own.
        """
        law = led.law
        assert law is not None
        clean = led.results[-1]
        each = len(clean) // len(batch) if len(clean) % len(batch) == 0 else 0
        if each not in (1, 2):  # class-conditional guidance hands over every row twice
            one_per_prompt(clean, len(batch))
        generators = [torch.Generator().manual_seed(_FRESH + seed) for seed in batch.seeds]
        states = led.samples[:1]
        for k in range(1, len(led.samples)):
            eps = torch.stack([torch.randn(clean.shape[1:], generator=g) for g in generators])
            eps = eps.repeat(each, *[1] * (eps.ndim - 1)).to(clean)
            states.append(float(law.alpha[k]) * clean + float(law.sigma[k]) * eps)
        tape = Tape(states, led.outputs, [*states[1:], clean], law)
        checks: list[Pending[None]] = []

        def see(step: int, output: Tensor, reached: Pending[None]) -> None:
            tape.outputs[step] = output.clone()
            checks.extend((reached, finite(output, self._whose(self._leader), step)))

        self._follow(batch, self._leader, tape, see)
        settled(checks)
        return tape

    def _follow(
        self,
        batch: Batch,
        follower: nn.Module,
        tape: Tape,
        see: Callable[[int, Tensor, Pending[None]], None],
    ) -> None:
        """Lead the follower through the states of the tape and show what it gives there."""
        replay = Replayer(tape, see)
        self._sample(batch, follower, [replay])
        if replay.steps != len(tape.samples):
            raise CalibrationError(
                f"the first run took {len(tape.samples)} steps, the second {replay.steps}; the "
                f"pipeline is not deterministic under replay."
            )

    def _sample(
        self, batch: Batch, denoiser: nn.Module, interceptors: Sequence[Interceptor]
    ) -> None:
        self._run.place(denoiser)
        with self._run.undisturbed(denoiser, *interceptors):
            self._run.sample(batch)

    def _whose(self, denoiser: nn.Module) -> str:
        return FULL_PRECISION if denoiser is self._run.denoiser else "quantized"
