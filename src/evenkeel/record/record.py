"""The record: one small, safe file that holds what a calibration measured and what it was made for.

A safetensors file: float64 moments per prompt, step and channel, and a JSON header with the
provenance. Nothing in it can execute. A digest over header and tensors makes every change evident.
The format is specified in docs/record-format.md.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from evenkeel.corrections.base import Correction
from evenkeel.corrections.catalogue import available
from evenkeel.errors import Incompatible, RecordError
from evenkeel.record.closed_loop import PREFIX, ClosedLoop
from evenkeel.record.schema import FRAME, LAW, check_record, readable
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.error_structure import step_correlation
from evenkeel.statistics.evidence import Evidence
from evenkeel.statistics.histogram import UNIT, ErrorHistogram, Frame
from evenkeel.statistics.moments import MOMENTS, PairedMoments
from evenkeel.statistics.provenance import Provenance, differences
from evenkeel.statistics.residual import ResidualHistogram
from evenkeel.storage import Kind, read_tensors, write_tensors

SCHEMA_VERSION = 2
KIND = Kind(
    "record",
    SCHEMA_VERSION,
    "run evenkeel calibrate again",
    keys=("provenance", "closed_loop"),
    error=RecordError,
)


@dataclass(frozen=True)
class Record:
    """Moments of P prompts at T sampler calls and C channels, and where they come from.

    Attributes:
        provenance: see ``Provenance``.
        prompt_keys: (P, 8) uint8, the first bytes of each prompt's SHA-256.
        seeds: (P,) int64, of each prompt's initial noise.
        moments: leading shape (P, T, C).
        gram: (P, T, T) float32, see ``step_gram``.
        frame: pilot frame of histogram and spectrum.
        spectrum: (T, bins) int64 in units of 2^-20 of the pilot's variance, summed over prompts; or None.
        histogram: or None.
        residual: histogram of the residual; or None.
        closed_loop: what was measured in closed loop.
        noise_floor: (T,) mean squared difference of two runs of the reference; 0 when repeatable.
        law: of the calibrated run, so that factors can be computed and shown without the pipeline.

    """

    provenance: Provenance
    prompt_keys: Tensor
    seeds: Tensor
    moments: PairedMoments
    gram: Tensor
    frame: Frame
    spectrum: Tensor | None
    histogram: ErrorHistogram | None
    noise_floor: Tensor
    law: StepLaw | None = None
    residual: ResidualHistogram | None = None
    closed_loop: ClosedLoop = field(default_factory=ClosedLoop)

    @property
    def prompts(self) -> int:
        """Number of prompts P."""
        return len(self.seeds)

    @cached_property
    def evidence(self) -> Evidence:
        """What corrections are fitted from; it remembers this record's provenance."""
        p = self.provenance
        return Evidence(
            p.prediction,
            *p.levels,
            self.moments,
            self.histogram,
            source=p,
            residual=self.residual,
            gram=self.gram,
        )

    def corrections(self) -> tuple[dict[str, Correction], dict[str, str]]:
        """Every correction that this record allows, by name, and for the others the reason why not."""
        return available(self.evidence, self.closed_loop.corrections)

    def step_correlation(self) -> Tensor:
        """(T, T) correlation of the error between steps; variance-based methods assume identity."""
        return step_correlation(self.gram)

    def error_spectrum(self) -> Tensor | None:
        """(T, bins) mean power of the error per ring of frequencies, in output units squared."""
        if self.spectrum is None:
            return None
        scale = _spectrum_scale(self.frame)
        return self.spectrum.double() / UNIT * scale[:, None] / self.prompts

    def merge(self, other: Record) -> Record:
        """The record of both sets of prompts; exact under any split and order.

        What was measured in closed loop belongs to one set of prompts and is left out.

        Raises:
            Incompatible: different provenance, or a prompt and seed that both contain.

        """
        differing = differences(self.provenance, other.provenance)
        if differing:
            raise Incompatible("the records measure different things:\n" + "\n".join(differing))
        if not self.frame.same_as(other.frame):
            raise Incompatible(
                "the records were binned in different pilot frames; calibrate the later parts with "
                "pilot=<the first record>."
            )
        keys = torch.cat([self.prompt_keys, other.prompt_keys])
        seeds = torch.cat([self.seeds, other.seeds])
        order = canonical_order(keys, seeds)
        rows = [(bytes(keys[i].tolist()), int(seeds[i])) for i in order]
        if len(set(rows)) != len(rows):
            raise Incompatible(
                "the records share prompts (same text and same seed); merging would count them twice."
            )
        both = PairedMoments.joined([self.moments, other.moments], 0).map(lambda t: t[order])
        spectrum = None
        if self.spectrum is not None and other.spectrum is not None:
            spectrum = self.spectrum + other.spectrum
        histogram = None
        if self.histogram is not None and other.histogram is not None:
            histogram = self.histogram + other.histogram
        residual = None
        if self.residual is not None and other.residual is not None:
            residual = self.residual + other.residual
        return replace(
            self,
            prompt_keys=keys[order],
            seeds=seeds[order],
            moments=both,
            gram=torch.cat([self.gram, other.gram])[order],
            spectrum=spectrum,
            histogram=histogram,
            residual=residual,
            closed_loop=ClosedLoop(),
            noise_floor=torch.maximum(self.noise_floor, other.noise_floor),
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file atomically: a crash leaves the old file or none, never half of one.

        Raises:
            RecordError: it could not be read again.

        """
        with readable("record"):
            check_record(
                self.provenance,
                {n: t for n, t in self._tensors().items() if not n.startswith(PREFIX)},
            )
        header = {
            "provenance": asdict(self.provenance),
            "closed_loop": self.closed_loop.as_dict(),
        }
        return write_tensors(path, KIND, header, self._tensors())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Record:
        """Read a record, or say what is wrong with the file.

        Raises:
            RecordError: missing, truncated, tampered with, foreign, or of another schema version.

        """
        header, tensors = read_tensors(path, KIND)
        with KIND.valid(path):
            provenance = Provenance(**header["provenance"])
            own = {n: t for n, t in tensors.items() if not n.startswith(PREFIX)}
            check_record(provenance, own)
            closed_loop = ClosedLoop.from_dict(header["closed_loop"], tensors, provenance)
        return replace(cls._from_tensors(provenance, own), closed_loop=closed_loop)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"moments.{n}": getattr(self.moments, n) for n in MOMENTS}
        t = self.gram.shape[-1]
        upper = torch.triu_indices(t, t)
        tensors["gram"] = self.gram[:, upper[0], upper[1]]
        tensors["prompt_keys"], tensors["seeds"] = self.prompt_keys, self.seeds
        tensors["noise_floor"] = self.noise_floor
        tensors |= {f"frame.{n}": getattr(self.frame, n) for n in FRAME}
        if self.spectrum is not None:
            tensors["spectrum"] = self.spectrum
        if self.histogram is not None:
            tensors["histogram"] = self.histogram.sums
        if self.residual is not None:
            tensors["residual"] = self.residual.counts
        if self.law is not None:
            tensors |= {f"law.{n}": torch.from_numpy(getattr(self.law, n)) for n in LAW}
        return tensors | self.closed_loop.tensors()

    @classmethod
    def _from_tensors(cls, provenance: Provenance, tensors: dict[str, Tensor]) -> Record:
        shape = tensors["moments.mean_e"].shape
        count = torch.full(shape, provenance.elements, dtype=torch.int64)
        moments = PairedMoments(count=count, **{n: tensors[f"moments.{n}"] for n in MOMENTS})
        t = shape[1]
        upper = torch.triu_indices(t, t)
        gram = torch.zeros(shape[0], t, t)
        gram[:, upper[0], upper[1]] = tensors["gram"]
        gram[:, upper[1], upper[0]] = tensors["gram"]
        frame = Frame(**{n: tensors[f"frame.{n}"] for n in FRAME})
        sums, counts = tensors.get("histogram"), tensors.get("residual")
        law = None
        if "law.alpha" in tensors:
            arrays = {n: tensors[f"law.{n}"].numpy() for n in LAW}
            law = StepLaw(provenance.scheduler_class, provenance.prediction, **arrays)
        return cls(
            provenance=provenance,
            prompt_keys=tensors["prompt_keys"],
            seeds=tensors["seeds"],
            moments=moments,
            gram=gram,
            frame=frame,
            spectrum=tensors.get("spectrum"),
            histogram=None if sums is None else ErrorHistogram(frame, sums),
            noise_floor=tensors["noise_floor"],
            law=law,
            residual=None if counts is None else ResidualHistogram(frame, counts),
        )


def canonical_order(keys: Tensor, seeds: Tensor) -> Tensor:
    """Rows sorted by seed, then prompt: the order in which a single process meets them."""
    rows = sorted(range(len(seeds)), key=lambda i: (int(seeds[i]), bytes(keys[i].tolist())))
    return torch.tensor(rows, dtype=torch.int64)


def prompt_key(prompt: str) -> Tensor:
    """(8,) uint8: the first bytes of the prompt's SHA-256; the text itself is not stored."""
    return torch.tensor(list(hashlib.sha256(prompt.encode()).digest()[:8]), dtype=torch.uint8)


def fixed_point_spectrum(spectrum: Tensor, frame: Frame) -> Tensor:
    """(P, T, bins) powers to integers in units of 2^-20 pilot variances, summed over prompts."""
    scaled = spectrum / _spectrum_scale(frame)[None, :, None]
    return (scaled * UNIT).round().long().sum(0)


def _spectrum_scale(frame: Frame) -> Tensor:
    variance = (frame.std_d**2).mean(-1)
    return torch.where(variance == 0, torch.ones_like(variance), variance)
