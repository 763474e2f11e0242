"""QNCD (Chu et al., ACM MM 2024, arXiv:2403.19140): ask the network again, take the mean off."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from evenkeel.corrections.base import Correction
from evenkeel.corrections.plan import Refresh, SamplerPlan, plain_plan
from evenkeel.errors import CalibrationError, UnsupportedSampler
from evenkeel.sampling.step_law import StepLaw

ASKS = "asks the network a second time"


@dataclass(frozen=True)
class QNCD(Correction):
    """Every ``interval`` steps, estimate a constant error of the predicted noise while sampling.

    At a refresh step, with y = x / alpha, s = sigma / alpha and a drawn n ~ N(0, I),

        x_prev = the step as the sampler would make it, from the uncorrected output q
        y_re   = y_prev + sqrt(s^2 - s_prev^2) n             back at the level that the step started from
        mu     = mean(eps(network at x_re) - n)              one number per image

    and from this step on, until the next refresh, eps(q) is replaced by eps(q) - mu. Nothing is
    subtracted before the first refresh, and what the sampler remembers are corrected outputs. Nothing is
    calibrated.

    What it really measures. The network predicts *all* noise of x_re, n is only the last bit of it, so
    the two cannot be compared element by element; their means can, and n's mean is close to zero. So mu
    is the mean of the output: the constant quantization error, *and* whatever mean the full-precision
    network has at that state, its own bias and the true noise's mean included. It takes off both.

    What it costs. One more network call per refresh and guidance branch: for 30 steps 3 calls more, 10 %.
    No other correction calls the network, and no bound on the overhead of a step holds for this one.

    How faithful it is. This is the estimation of inter-step noise as the authors' code (PLMS only) and
    the port in Q-Drift's code (Euler only) run it: l = 1, 2, ... counts steps from the *first*, and a
    refresh falls on (l - 2) mod interval = interval // 2: the 7th, 17th and 27th of 30. The variance that
    the paper also speaks of is computed and then set to zero in the authors' code; it is not here. Their
    smoothing of activations is a matter of the quantizer. Extended by us: every linear sampler by its
    step law (x_prev without the noise that the step injects, s_prev at that level), and predictions other
    than noise by their noise form, since v - n or x0 - n has no mean to compare; never the last step and
    never an intermediate stage; n belongs to the image, not to the batch or to global random numbers.

    Attributes:
        interval: steps between refreshes, at least 1.
        per_image: one mu per image (Q-Drift's port, which samples one image at a time). False: one over
            all elements of the batch, as the authors' code has it; an image then depends on its batch.
        seed: of n; drawn anew for every image from this seed and the image's own first state.

    Raises:
        CalibrationError: the interval is not a positive whole number.

    >>> QNCD().due(30)
    (6, 16, 26)

    """

    name = "qncd"
    references = ("arXiv:2403.19140, inter quantization noise",)
    stages = ("refresh",)
    made_for = None

    interval: int = 10
    per_image: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.interval, int) or self.interval < 1:
            raise CalibrationError(
                f"interval must be a whole number of steps, at least 1; got {self.interval!r}."
            )

    def due(self, steps: int) -> tuple[int, ...]:
        """Indices (from 0) at which a run of so many steps would refresh; never the last step."""
        wanted = self.interval // 2
        return tuple(k for k in range(steps - 1) if (k - 1) % self.interval == wanted)

    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        """Which steps refresh; see the class.

        A due step that has no re-noising keeps the mu of the refresh before; its explanation says why.

        Raises:
            UnsupportedSampler: that holds for every due step.

        """
        del allow_range  # nothing was calibrated
        due = self.due(law.steps)
        if not due:
            note = f"no refresh falls into {law.steps} steps at interval {self.interval}"
            return plain_plan(law, [note] * law.steps)
        obstacles = {k: _obstacle(law, k) for k in due}
        if all(obstacles.values()):
            reasons = "; ".join(f"step {k}: {why}" for k, why in obstacles.items())
            raise UnsupportedSampler(
                f"QNCD can refresh nowhere in {law.steps} steps of {law.sampler}: {reasons}. Use "
                f"another interval (now {self.interval}) or a sampler of one network call per step."
            )
        active = torch.zeros(law.steps, dtype=torch.bool)
        keep, spread = torch.ones(2, law.steps, dtype=torch.float64)
        notes = [""] * law.steps
        for k, why in obstacles.items():
            notes[k] = f"no refresh: {why}" if why else ASKS
            if not why:
                active[k] = True
                keep[k], spread[k] = renoising(law, k)
        refresh = Refresh(active, keep, spread, self.per_image, self.seed)
        return plain_plan(law, notes, refresh=refresh)


def renoising(law: StepLaw, k: int) -> tuple[float, float]:
    """(r, b) of ``x_re = r x_prev + b n``: from right after step k back to the level before it.

    With y = x / alpha and s = sigma / alpha: y_re = y_prev + sqrt(s^2 - s_prev^2) n, so
    r = alpha / alpha_next and b = alpha sqrt(s^2 - s_prev^2), where s_prev is the level without the
    noise that the step itself injects. Variance preserving: r^2 = 1 - b^2 = ab_t / ab_prev.

    Args:
        law: of the run.
        k: a step with signal before it, whose result has less noise.

    """
    before, after = float(law.alpha[k]), float(law.alpha[k + 1])
    gone = (float(law.sigma[k]) / before) ** 2 - (float(law.sigma_down[k]) / after) ** 2
    return before / after, before * math.sqrt(gone)


def _obstacle(law: StepLaw, k: int) -> str:
    """Why step k cannot be re-noised, or ""."""
    if law.intermediate[k]:
        return "the next step starts over from an earlier state (a second stage, a corrector)"
    if law.alpha[k] == 0:
        return "the state holds no signal (sigma = 1 of flow matching, zero terminal SNR)"
    if law.sigma[k] * law.alpha[k + 1] <= law.sigma_down[k] * law.alpha[k] * (1 + 1e-5):
        return "its result has no less noise than the state that the network saw"
    return ""
