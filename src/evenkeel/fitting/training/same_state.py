"""Same-state alignment: student and teacher stand at the same states, those of one run of the pipeline."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Generator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from evenkeel.errors import CalibrationError, UnsupportedPipeline
from evenkeel.fitting.training.aligned_call import AlignedCall
from evenkeel.hosts.actuators.told_level import SAMPLE_NAMES, TIME_NAMES, argument_of
from evenkeel.hosts.pipeline.denoiser_calls import answer_of, guidance_of
from evenkeel.hosts.pipeline.strand import Finished, Strand
from evenkeel.hosts.run import Batch, Run
from evenkeel.hosts.scheduler.interception import Interceptor, install, plain_class
from evenkeel.quantizers.workspace.calibration_set import DenoiserCall

Advance = Literal["full-precision", "student"]


@dataclass(frozen=True)
class SameState:
    """Every denoiser call of a run of the pipeline; the target is full precision at the same input.

    Data-free, as EfficientDM (arXiv:2310.03270) trains: states come from seeds, prompts are drawn from
    those of ``run`` at random for each epoch. The pipeline's own loop and scheduler make the run.

    Args:
        run: pipeline, prompts to draw from, steps, guidance; its batch size is that of an epoch.
        advance: whose output the run goes on with; ``student`` is the closed loop, the states that the
            trained sampler meets (with the student's output before the optimizer's step).
        eta: of schedulers that take one (DDIM: 1 draws as much noise as DDPM); None is the pipeline's.

    Raises:
        CalibrationError: a choice that does not exist, or an eta that the scheduler does not take.

    """

    run: Run
    advance: Advance = "full-precision"
    eta: float | None = None

    def __post_init__(self) -> None:
        if self.advance not in ("full-precision", "student"):
            raise CalibrationError(
                f"advance is 'full-precision' or 'student', got {self.advance!r}."
            )
        scheduler = self.run.pipeline.scheduler
        if self.eta is not None and "eta" not in inspect.signature(scheduler.step).parameters:
            raise CalibrationError(
                f"eta={self.eta}: {plain_class(scheduler).__name__} takes none. Leave it out, or "
                "train with a DDIMScheduler."
            )

    @property
    def calls(self) -> int:
        """Of one epoch."""
        return len(self._probe)

    @property
    def levels(self) -> tuple[float, ...]:
        """In the order of the run, each once."""
        return tuple(dict.fromkeys(time for time, _ in self._probe))

    @property
    def identity(self) -> dict[str, Any]:
        """See ``Trajectories``."""
        run = self.run
        return {
            **run.identity,
            "trajectories": "same-state",
            "advance": self.advance,
            "eta": self.eta,
            "seed": run.seed,
            "batch_size": run.batch_size,
            "prompts": run.prompts.texts,
            "denoiser": run.fingerprint(run.denoiser),
        }

    def epoch(self, index: int) -> Generator[AlignedCall, Tensor | None, None]:
        """The calls of one run; see ``Trajectories``."""
        for k, (asked, output) in enumerate(self._asked(drawn_batch(self.run, index))):
            _, shares = self._probe[k]
            target = answer_of(output[0])
            channels = argument_of(self.run.denoiser, asked[0], asked[1], SAMPLE_NAMES).shape[1]
            if target.dim() > 2 and target.shape[1] == 2 * channels:
                target = target[:, :channels]
            learned = yield AlignedCall(DenoiserCall(*asked), target, shares)
            if self.advance == "student":
                if learned is None:
                    raise CalibrationError(
                        "a closed loop goes on with the student's output: send it back for each call."
                    )
                output[0] = repacked(output[0], learned)

    def _asked(self, batch: Batch) -> Generator[tuple[Any, list[Any]], None, None]:
        """Arguments of each call, and the output, which may be exchanged before the next one."""
        run = self.run

        def body(strand: Strand) -> Any:
            return run.sample(batch, on=_shell(run, strand.pause, self.eta, batch.seed))

        strand = Strand(body, trims=False)
        try:
            shown = strand.resume()
            while not isinstance(shown, Finished):
                with torch.no_grad():
                    output = [run.denoiser(*shown[0], **shown[1])]
                yield shown, output
                shown = strand.resume(output[0])
        finally:
            strand.abandon()

    @cached_property
    def _probe(self) -> list[tuple[float, tuple[float, ...]]]:
        """Told timestep and shares of the guidance branches, of every call of a run."""
        run = self.run
        times: list[float] = []
        outputs: list[Tensor] = []
        counts: list[int] = []  # denoiser calls before each step of the scheduler
        shares: list[tuple[float, ...]] = []

        class Steps(Interceptor):
            def before(self, scheduler: Any, timestep: Any, output: Tensor, *_: Any) -> None:
                counts.append(len(outputs))
                if counts[-1] - (counts[-2] if len(counts) > 1 else 0) == 1:
                    found = guidance_of(outputs[-1:], output)[1]
                    shares.append(tuple(found.tolist()))

        def ask(shown: Any) -> Any:
            times.append(told_time(run.denoiser, *shown))
            with torch.no_grad():
                output = run.denoiser(*shown[0], **shown[1])
            outputs.append(answer_of(output))
            return output

        batch = run.batches()[0].alone
        shell = _shell(run, ask, self.eta, batch.seed)
        install(shell.scheduler, Steps())
        run.sample(batch, on=shell)
        if not times:
            raise UnsupportedPipeline(f"{type(run.pipeline).__name__} never called its denoiser.")
        # Two branches at pure noise hardly differ, and tell little about the guidance: the median does.
        one: tuple[float, ...] = (1.0,)
        if len(counts) == len(times):
            one = tuple(round(s, 6) for s in torch.tensor(shares).median(0).values.tolist())
        return [(time, one) for time in times]


def told_time(denoiser: nn.Module, arguments: Any, keywords: Any) -> float:
    """The timestep that the first row of a denoiser call is told, in the denoiser's unit."""
    found = torch.as_tensor(argument_of(denoiser, arguments, dict(keywords), TIME_NAMES))
    return float(found.flatten()[0])


def drawn_batch(run: Run, index: int) -> Batch:
    """Prompts and noise of one epoch: from the run's seed and ``index`` alone.

    The seeds lie beyond those that people give to images, so that what is held out is never trained on.
    """
    generator = torch.Generator().manual_seed((run.seed << 20) + index)
    which = torch.randint(len(run.prompts), (run.batch_size,), generator=generator).tolist()
    seed = ((run.seed + 1) << 32) + index * run.batch_size
    return Batch(run.prompts.take(which), 0, seed)


def repacked(output: Any, prediction: Tensor) -> Any:
    """A denoiser's return value with another prediction in it.

    Raises:
        UnsupportedPipeline: it returns images one by one.

    """
    if isinstance(output, Tensor):
        return prediction
    if isinstance(output[0], Tensor):
        if isinstance(output, tuple):
            return (prediction, *output[1:])
        return type(output)(**{**output, next(iter(output)): prediction})
    raise UnsupportedPipeline(
        f"this denoiser returns a {type(output).__name__} of {type(output[0]).__name__}; a run cannot go "
        "on with the student's output. Use advance='full-precision'."
    )


def _shell(run: Run, ask: Any, eta: float | None, seed: int) -> Any:
    """The pipeline with a scheduler of its own, whose denoiser's calls are answered by ``ask``."""
    shell = copy.copy(run.pipeline)
    shell.scheduler = scheduler = copy.deepcopy(run.pipeline.scheduler)
    install(scheduler)
    if hasattr(shell, "set_progress_bar_config"):
        shell.set_progress_bar_config(disable=True)
    if eta is not None:
        extra: dict[str, Any] = {"eta": eta}
        if "generator" in inspect.signature(scheduler.step).parameters:
            extra["generator"] = torch.Generator().manual_seed(seed)
        scheduler.step = functools.partial(scheduler.step, **extra)
    setattr(shell, run.name, _standing_in(run.denoiser, ask))
    return shell


def _standing_in(denoiser: nn.Module, ask: Any) -> nn.Module:
    """Looks like the denoiser, shares its weights, and asks in place of computing."""
    base = type(denoiser)

    @functools.wraps(base.forward)
    def forward(self: Any, *arguments: Any, **keywords: Any) -> Any:
        return ask((arguments, keywords))

    # Calls past all hooks: those that it shares with the denoiser fire when that computes.
    members = {"forward": forward, "__call__": forward, "__module__": base.__module__}
    made = copy.copy(denoiser)
    made.__class__ = type(base.__name__, (base,), members)
    return made
