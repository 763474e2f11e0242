"""One batch of prompts: two runs through the same states, and the moments of what they gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from evenkeel.corrections.base import Correction, text_of
from evenkeel.errors import CalibrationError
from evenkeel.hosts.actuators.correcting import interceptors_of
from evenkeel.hosts.pipeline.denoiser_calls import one_per_prompt, refuse_non_finite
from evenkeel.hosts.run import Batch, Run
from evenkeel.hosts.scheduler.interception import Interceptor
from evenkeel.hosts.scheduler.tape import Recorder, Replayer, Tape
from evenkeel.record import Record, fixed_point_spectrum, prompt_key
from evenkeel.statistics.error_structure import radial_spectrum, step_gram
from evenkeel.statistics.histogram import ErrorHistogram, Frame
from evenkeel.statistics.moments import PairedMoments
from evenkeel.statistics.residual import ResidualHistogram
from evenkeel.statistics.second_order import SecondOrder

FULL_PRECISION = "full-precision"


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
        self._leads = trajectory == FULL_PRECISION  # the full-precision one
        self._leader, self._follower = run.pair if self._leads else run.pair[::-1]

    def record(self, batch: Batch, frame: Frame | None) -> Record:
        """The batch's record, its histograms in this frame or one of its own."""
        tape, replayed = self._through(batch, self._leader, self._follower, self._correction)
        outputs = [
            one_per_prompt(torch.stack(steps, 1), len(batch)).cpu()
            for steps in (tape.outputs, replayed)
        ]
        x = one_per_prompt(torch.stack(tape.samples, 1), len(batch)).cpu()
        e, q = outputs if self._leads else outputs[::-1]
        layout = self._run.layout(x[:, 0])
        d = q.double() - e.double()
        if not d.any():
            raise CalibrationError(
                "the quantized denoiser gives exactly the full-precision outputs: nothing was quantized."
            )

        def channels(t: Tensor) -> Tensor:
            flat = layout.as_channels(t.flatten(0, 1))
            return flat.reshape(*t.shape[:2], *flat.shape[1:])

        e_c, d_c = channels(e), channels(d)
        moments = PairedMoments.of(e_c, d_c, channels(x))
        if frame is None:
            frame = _frame_of(moments)
        spectrum = fixed_point_spectrum(radial_spectrum(d), frame) if layout.is_spatial else None
        assert tape.law is not None
        return Record(
            provenance=self._run.provenance(
                tape.law, x, trajectory=self._trajectory, correction=text_of(self._correction)
            ),
            prompt_keys=torch.stack([prompt_key(text) for text in batch.prompts.texts]),
            seeds=torch.tensor(batch.seeds),
            moments=moments,
            gram=step_gram(d_c),
            frame=frame,
            spectrum=spectrum,
            histogram=ErrorHistogram.of(frame, e_c, d_c) if self._histograms else None,
            noise_floor=torch.zeros(x.shape[1], dtype=torch.float64),
            law=tape.law,
            residual=ResidualHistogram.of(frame, e_c, d_c) if self._histograms else None,
        )

    def with_noise_floor(self, part: Record, batch: Batch, limit: float) -> Record:
        """Run one prompt twice with the reference: what differs is not quantization."""
        reference = self._run.denoiser
        tape, again = self._through(batch.alone, reference, reference, None)
        pairs = zip(tape.outputs, again, strict=True)
        floor = torch.stack([(a.double() - b.double()).pow(2).mean().cpu() for a, b in pairs])
        error = part.gram.double().diagonal(dim1=1, dim2=2).mean(0)
        if (floor > limit * error).any():
            step = int((floor / error.clamp_min(1e-300)).argmax())
            raise CalibrationError(
                f"two runs of the full-precision denoiser on the same input differ: at step {step} by "
                f"{floor[step]:.3g} (mean square), against a quantization error of {error[step]:.3g}. "
                f"Non-deterministic kernels or dropout; raise noise_floor_limit to accept it."
            )
        return replace(part, noise_floor=floor)

    def _through(
        self, batch: Batch, leader: nn.Module, follower: nn.Module, correction: Correction | None
    ) -> tuple[Tape, list[Tensor]]:
        """What the leader met and gave, and what the follower gave at the same states."""
        tape = Tape()
        interceptors: list[Interceptor] = [Recorder(tape)]
        if correction is not None:
            run = self._run
            parts = interceptors_of(correction, run.pipeline, leader, layout=run.given_layout)
            interceptors = [*parts, *interceptors]
        self._sample(
            batch, leader, interceptors, tape.outputs
        )  # or the replay would seem to differ
        replay = Replayer(tape)
        self._sample(batch, follower, [replay], replay.outputs)
        if len(replay.outputs) != len(tape.outputs):
            raise CalibrationError(
                f"the first run took {len(tape.outputs)} steps, the second {len(replay.outputs)}; the "
                f"pipeline is not deterministic under replay."
            )
        return tape, replay.outputs

    def _sample(
        self,
        batch: Batch,
        denoiser: nn.Module,
        interceptors: Sequence[Interceptor],
        outputs: list[Tensor],
    ) -> None:
        self._run.place(denoiser)
        with self._run.undisturbed(denoiser, *interceptors):
            self._run.sample(batch)
        whose = FULL_PRECISION if denoiser is self._run.denoiser else "quantized"
        for step, output in enumerate(outputs):
            refuse_non_finite(output, whose, step)


def _frame_of(moments: PairedMoments) -> Frame:
    pooled = moments.pooled(0)
    second = SecondOrder.of(pooled)
    return Frame(
        mean_d=pooled.mean_d,
        std_d=second.dd.sqrt(),
        mean_e=pooled.mean_e,
        std_e=second.ee.sqrt(),
        gain=second.gain,
        std_r=second.residual.sqrt(),
    )
