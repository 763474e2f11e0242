"""The corrections that a cell asks for, each made once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from evenkeel.comparing.comparison import standard_arms
from evenkeel.comparing.marginal_check import marginal_check
from evenkeel.corrections import TAC, Composite, Correction
from evenkeel.corrections.catalogue import ALL, FORMS, available
from evenkeel.errors import EvenkeelError
from evenkeel.estimate import Estimate
from evenkeel.fitting import calibrate
from evenkeel.fitting.adapters.fit_adapters import fit_adapters
from evenkeel.fitting.closed_loop.forms import RULES, fit_closed_loop
from evenkeel.fitting.readout.fit_readout import fit_readout
from evenkeel.hosts.run import Run
from evenkeel.record import Record
from evenkeel.statistics.evidence import Evidence

ADAPTERS = 0.11  # share of the quantized denoiser's bytes
SUBSETS = 200  # drawn, of which the most deviating ones are taken


@dataclass(frozen=True)
class Makers:
    """Makes corrections for a run with its quantized denoiser; what costs a run is made once.

    Attributes:
        run: the calibration, with ``quantized``.
        subset, trajectory: see ``Cell``.

    """

    run: Run
    subset: Mapping[str, Any] | None = None
    trajectory: str = "full-precision"

    @property
    def _asked(self) -> dict[str, Any]:
        run = self.run
        return {
            "quantized": run.pair[1],
            "prompts": run.prompts.values,
            "num_inference_steps": run.num_inference_steps,
            "guidance_scale": run.guidance_scale,
            "seed": run.seed,
            "batch_size": run.batch_size,
            "call": run.call,
            "progress": False,
        }

    @cached_property
    def record(self) -> Record:
        """Of all calibration prompts."""
        return calibrate(self.run.pipeline, trajectory=self.trajectory, **self._asked)

    @cached_property
    def shared(self) -> Estimate:
        """Share of the quantized sampler's state error that all prompts have in common, of 32 of them."""
        asked = {k: v for k, v in self._asked.items() if k not in ("quantized", "seed")}
        found = marginal_check(
            self.run.pipeline,
            standard_arms(self.run.pipeline, self.run.pair[1], {}),
            **asked | {"prompts": self.run.prompts.values[:32]},
        ).shared
        assert found is not None
        return found

    @cached_property
    def evidence(self) -> Evidence:
        """Of all calibration prompts, or of the subset."""
        whole = self.record.evidence
        return whole if self.subset is None else most_deviating(whole, self.run, **self.subset)

    @cached_property
    def _made(self) -> dict[str, Correction]:
        return available(self.evidence, {}, forms=True)[0]

    def make(self, asked: Any) -> Correction:
        """A correction of this name, of a dictionary of name and options, or of a list of both.

        Of TAC ``steps`` keeps the first so many.

        Raises:
            EvenkeelError: no such name, or it cannot be made here.

        """
        if isinstance(asked, list):
            return Composite(tuple(self.make(part) for part in asked))
        options = dict(asked) if isinstance(asked, Mapping) else {"name": asked}
        name, steps = options.pop("name"), options.pop("steps", None)
        found = self._named(name)
        if options:
            found = replace(found, **options)  # type: ignore[type-var]
        return found if steps is None else first_steps(found, steps)

    def _named(self, name: str) -> Correction:
        pipeline = self.run.pipeline
        if name in RULES:
            return fit_closed_loop(self.run, [name], progress=False)[name]
        if name == "readout":
            return fit_readout(pipeline, **self._asked)
        if name == "adapters":
            return fit_adapters(pipeline, budget=ADAPTERS, **self._asked)[0]
        if name not in self._made:
            known = ", ".join([*ALL, *FORMS])
            raise EvenkeelError(
                f"no correction called {name!r} can be made here; there is {known}."
            )
        return self._made[name]


def first_steps(correction: Correction, steps: int) -> TAC:
    """TAC that acts on the first steps only.

    Raises:
        EvenkeelError: it is another correction.

    """
    if not isinstance(correction, TAC):
        raise EvenkeelError(f"only TAC is cut to its first steps, got {correction.name}.")
    gain, bias = correction.gain, correction.bias
    if gain is not None:
        gain = torch.cat([gain[:steps], torch.ones_like(gain[steps:])])
    if bias is not None:
        bias = torch.cat([bias[:steps], torch.zeros_like(bias[steps:])])
    return replace(correction, gain=gain, bias=bias)


def most_deviating(evidence: Evidence, run: Run, size: int, among: int, by: str) -> Evidence:
    """Of ``SUBSETS`` drawn subsets of prompts the one whose Q-Drift factors deviate most from all prompts'.

    Q-Drift Table 3, section 5.4: the largest sum over steps of |c - c_all| (``absolute``), the lowest or the
    highest sum of c - c_all; channels averaged. ``among``: of the first so many prompts.
    """
    from evenkeel.corrections import QDrift

    law = run.law()

    def factors(of: Evidence) -> torch.Tensor:
        return QDrift.published(of).plan(law).factor.mean(-1)

    generator = torch.Generator().manual_seed(0)
    pool = evidence.resampled(torch.arange(min(among, evidence.prompts)))
    whole = factors(pool)
    drawn = [torch.randperm(pool.prompts, generator=generator)[:size] for _ in range(SUBSETS)]
    off = torch.stack([factors(pool.resampled(index)) - whole for index in drawn])
    score = {"absolute": off.abs().sum(1), "lowest": -off.sum(1), "highest": off.sum(1)}[by]
    return pool.resampled(drawn[int(score.argmax())])
