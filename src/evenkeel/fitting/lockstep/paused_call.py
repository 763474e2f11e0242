"""One pipeline call in a closed loop: it stops at its scheduler, once before and once after a step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from evenkeel.corrections.base import Correction
from evenkeel.errors import CalibrationError
from evenkeel.fitting.request import Settings
from evenkeel.hosts.actuators.correcting import heads_attached, interceptors_of
from evenkeel.hosts.pipeline.pipelines import Prompt, denoiser_name, run_pipeline
from evenkeel.hosts.pipeline.strand import Strand
from evenkeel.hosts.scheduler.interception import Interceptor, install, uninstall
from evenkeel.hosts.scheduler.probing import probe_scheduler
from evenkeel.hosts.scheduler.tape import steering, step_index
from evenkeel.sampling.step_law import StepLaw

AT_OUTPUT, AT_RESULT = "output", "result"


class PausedCall(Interceptor):
    """A call on a shell of the pipeline, with a denoiser and a scheduler of its own.

    Attributes:
        law: of the run, from its first step on; None where ``reads_law`` is not set.
        sample, output, result: of the current step, as the scheduler has them.
        reads_law: ask the scheduler for its law at the first step.
        is_wide: compute steps in float32 at least, as a correction at sampling time does.

    """

    def __init__(
        self,
        pipeline: Any,
        denoiser: Any,
        prompts: list[Prompt],
        seed: int,
        settings: Settings,
        correction: Correction | None,
    ) -> None:
        self.law: StepLaw | None = None
        self.sample = self.output = self.result = torch.empty(0)
        self.is_wide = self.reads_law = False
        self._prompts, self._seed, self._settings = prompts, seed, settings
        self._denoiser = denoiser
        self._answers: list[Tensor] = []
        self._is_doubled = False
        # Every call needs a scheduler of its own; the networks are shared.
        self._shell = copy.copy(pipeline)
        self._shell.scheduler = copy.deepcopy(pipeline.scheduler)
        uninstall(self._shell.scheduler)
        setattr(self._shell, denoiser_name(pipeline), denoiser)
        self._below: list[Interceptor] = []
        if correction is not None:
            options = {"layout": settings.layout}
            self._below = interceptors_of(correction, self._shell, denoiser, **options)
        # We see what the others made; what changes the denoiser for the next step does so after our
        # stop, when this call is about to use it.
        makers = [i for i in self._below if not i.on_denoiser]
        others = [i for i in self._below if i.on_denoiser]
        install(self._shell.scheduler, *makers, self, *others)
        self.strand = Strand(lambda _: self._body())

    def _body(self) -> None:
        s = self._settings
        run_pipeline(
            self._shell,
            self._prompts,
            range(self._seed, self._seed + len(self._prompts)),
            num_inference_steps=s.num_inference_steps,
            guidance_scale=s.guidance_scale,
            output_type="latent",
            call=s.call,
        )

    def resume(self, answer: Any, turn: int) -> Any:
        """Run to the next stop, with the denoiser as the correction below wants it."""
        _seed_global_noise(self._seed, turn)
        with heads_attached(self._below), self._listening():
            try:
                return self.strand.resume(answer)
            except BaseException:
                # An interrupted call still computes: it must end before the denoiser is restored.
                self.strand.abandon()
                raise

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Inside, the denoiser's outputs are kept until the end of the step."""

        def keep(module: Any, inputs: Any, output: Any) -> None:
            found = output if isinstance(output, Tensor) else output[0]
            self._answers.append(found.detach())

        handle = self._denoiser.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def wide(self) -> bool:
        """As ``is_wide`` says."""
        return self.is_wide

    def before(
        self, scheduler: Any, timestep: Any, output: Tensor, sample: Tensor, kwargs: dict[str, Any]
    ) -> None:
        """Read the law, once."""
        if self.reads_law and self.law is None:
            begin = step_index(scheduler, timestep)
            self.law = probe_scheduler(scheduler, step_kwargs=steering(kwargs), begin=begin)

    def edit(self, scheduler: Any, output: Tensor, sample: Tensor) -> Tensor:
        """Stop with the output; go on with what the answer says."""
        n = len(self._prompts)
        # Class-conditional guidance (DiT) hands over every row twice.
        self._is_doubled = len(output) == 2 * n and torch.equal(output[:n], output[n:])
        if len(output) != (2 * n if self._is_doubled else n):
            raise CalibrationError(
                f"the scheduler was handed {len(output)} samples for {n} prompts; fit with "
                f"num_images_per_prompt=1."
            )
        self.output, self.sample = output.detach(), sample.detach()
        changed = self.strand.pause(AT_OUTPUT)
        self._answers = []
        return output if changed is None else self._given(changed, output)

    def after(self, scheduler: Any, output: Tensor, sample: Tensor, result: Tensor) -> Tensor:
        """Stop with the result; go on from what the answer says."""
        self.result = result.detach()
        changed = self.strand.pause(AT_RESULT)
        return result if changed is None else self._given(changed, result)

    def kept(self, tensor: Tensor) -> Tensor:
        """One row per prompt."""
        return tensor[: len(self._prompts)] if self._is_doubled else tensor

    def _given(self, changed: Tensor, like: Tensor) -> Tensor:
        rows = torch.cat([changed, changed]) if self._is_doubled else changed
        return rows.to(like)

    def branches(self) -> tuple[Tensor, ...]:
        """The denoiser's outputs of this step, one per guidance branch."""
        like, n = self.output, len(self._prompts)
        found: list[Tensor] = []
        for tensor in self._answers:
            if tensor.dim() > 2 and tensor.shape[1] == 2 * like.shape[1]:
                tensor = tensor[:, : like.shape[1]]  # the rest is a learned variance
            if len(tensor) % n or tensor.shape[1:] != like.shape[1:]:
                return ()
            found += torch.split(tensor, n)
        return tuple(found)

    def refuse_non_finite(self, which: str, step: int) -> None:
        """Raise if the output of this step is not finite."""
        if not bool(self.output.isfinite().all()):
            raise CalibrationError(
                f"the {which} denoiser gave a non-finite output (NaN or infinity) at step {step}; "
                f"float16 often overflows where bfloat16 does not."
            )


@contextmanager
def global_noise_kept() -> Iterator[None]:
    """Afterwards, the global generators are as they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


def _seed_global_noise(seed: int, turn: int) -> None:
    """Pipelines that draw from the global generator draw the same in both runs of a batch."""
    # torch.manual_seed takes a tenth of a small denoiser's time where there is no device.
    torch.default_generator.manual_seed(seed + 1_000_003 * turn)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed + 1_000_003 * turn)
