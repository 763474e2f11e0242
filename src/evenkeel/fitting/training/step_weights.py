"""What a step's output moves in the final sample, as a weight of its loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor, nn

from evenkeel.fitting.training.aligned_call import AlignedCall
from evenkeel.fitting.training.same_state import told_time
from evenkeel.hosts.run import Run
from evenkeel.quantizers.layers.told_timestep import nearest

_OTHER_UNIT = 2.0  # between two schedules of one denoiser the first timesteps differ by less


class StepWeighted:
    """w_t times a loss, w_t = (d x_final / d output_t)^2: last row of the step law's trajectory weights.

    An error of the output near pure noise moves the final sample more than a hundred times as far as one of
    the last steps does; a loss that weighs all steps alike improves what hardly matters, and may pay for
    it with what does.

    Args:
        loss: of one aligned call.
        run: as deployed; its law is read off one run.
        levels: the timesteps that students are told; each gets the weight of the run's nearest.
        denoiser: with which the law is read; the run's own if not given.

    """

    def __init__(
        self,
        loss: Callable[[AlignedCall, Tensor], Tensor],
        run: Run,
        levels: Sequence[float],
        denoiser: nn.Module | None = None,
    ) -> None:
        law = run.law(denoiser)
        moved = np.abs(law.trajectory[1][-1]) ** 2
        times = np.asarray(law.timesteps, dtype=np.float64)
        # Pipelines tell the scheduler's timestep in a unit of their own (FLUX: a thousandth).
        unit = max(levels) / times.max()
        if 1 / _OTHER_UNIT < unit < _OTHER_UNIT:
            unit = 1.0
        found = np.array([moved[nearest((times * unit).tolist(), level)] for level in levels])
        self._loss, self._denoiser = loss, run.denoiser
        self._weights: dict[float, float] = dict(
            zip(levels, (found / found.mean()).tolist(), strict=True)
        )

    def __call__(self, call: AlignedCall, output: Tensor) -> Tensor:
        """0-dimensional."""
        time = told_time(self._denoiser, call.student.arguments, call.student.keywords)
        value: Tensor = self._weights[time] * self._loss(call, output)
        return value
