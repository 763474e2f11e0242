"""The record: one small, safe file that holds what a calibration measured and what it was made for.

A safetensors file: float64 moments per prompt, step and channel, and a JSON header with the
provenance. Nothing in it can execute. A digest over header and tensors makes every change evident.
The format is specified in docs/record-format.md.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from evenkeel.errors import Incompatible, RecordError
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.error_structure import step_correlation
from evenkeel.statistics.evidence import Evidence
from evenkeel.statistics.histogram import BINS, UNIT, ErrorHistogram, Frame
from evenkeel.statistics.moments import ORDERS, PairedMoments

SCHEMA_VERSION = 1
_MOMENTS = tuple(f.name for f in fields(PairedMoments) if f.name != "count")
_FRAME = tuple(f.name for f in fields(Frame))
_LAW = tuple(f.name for f in fields(StepLaw) if f.name not in ("sampler", "prediction"))


@dataclass(frozen=True)
class Provenance:
    """What a record was made for. Two records with equal provenance measure the same thing.

    Attributes:
        pipeline_class: diffusers class name.
        denoiser: name of the component, ``transformer`` or ``unet``.
        reference, quantized: fingerprints of the two denoisers.
        quantizer: what quantized it, as text ("unknown" if it does not say).
        scheduler_class, scheduler_config: as configured.
        prediction: what the raw outputs are.
        num_inference_steps, guidance_scale: as passed to the pipeline.
        timesteps, alpha, sigma: of the sampler's calls.
        call: further JSON-safe arguments of the pipeline call.
        trajectory: whose outputs advanced the sample: full-precision, quantized or corrected.
        layout: LatentLayout fields.
        latent_shape: of one prompt.
        dtype: of the samples that entered the scheduler.
        elements: latent elements per channel of one prompt.
        versions: of the libraries; informative, not compared.
        correction: name and options of what was applied along a corrected trajectory, else "".

    """

    pipeline_class: str
    denoiser: str
    reference: str
    quantized: str
    quantizer: str
    scheduler_class: str
    scheduler_config: dict[str, Any]
    prediction: str
    num_inference_steps: int
    guidance_scale: float | None
    timesteps: list[float]
    alpha: list[float]
    sigma: list[float]
    call: dict[str, Any]
    trajectory: str
    layout: dict[str, int]
    latent_shape: list[int]
    dtype: str
    elements: int
    versions: dict[str, str]
    correction: str = ""


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

    @property
    def prompts(self) -> int:
        """Number of prompts P."""
        return len(self.seeds)

    @cached_property
    def evidence(self) -> Evidence:
        """What corrections are fitted from; it remembers this record's provenance."""
        p = self.provenance
        levels = np.array(p.alpha), np.array(p.sigma)
        return Evidence(p.prediction, *levels, self.moments, self.histogram, source=p)

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

        Raises:
            Incompatible: different provenance, or a prompt and seed that both contain.

        """
        differing = differences(self.provenance, other.provenance)
        if differing:
            raise Incompatible("the records measure different things:\n" + "\n".join(differing))
        same_frame = all(
            torch.equal(getattr(self.frame, n), getattr(other.frame, n)) for n in _FRAME
        )
        if not same_frame:
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
        both = _joined(self.moments, other.moments, order)
        spectrum = None
        if self.spectrum is not None and other.spectrum is not None:
            spectrum = self.spectrum + other.spectrum
        histogram = None
        if self.histogram is not None and other.histogram is not None:
            histogram = self.histogram + other.histogram
        return replace(
            self,
            prompt_keys=keys[order],
            seeds=seeds[order],
            moments=both,
            gram=torch.cat([self.gram, other.gram])[order],
            spectrum=spectrum,
            histogram=histogram,
            noise_floor=torch.maximum(self.noise_floor, other.noise_floor),
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file atomically: a crash leaves the old file or none, never half of one."""
        path = Path(path)
        tensors = self._tensors()
        header = json.dumps(asdict(self.provenance), sort_keys=True)
        metadata = {
            "format": "evenkeel-record",
            "schema_version": str(SCHEMA_VERSION),
            "provenance": header,
            "digest": _digest(header, tensors),
        }
        partial = path.with_name(path.name + ".partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(save_bytes(tensors, metadata))
        os.replace(partial, path)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Record:
        """Read a record, or say what is wrong with the file.

        Raises:
            RecordError: missing, truncated, tampered with, foreign, or of another schema version.

        """
        path = Path(path)
        if not path.is_file():
            raise RecordError(
                f"{path} is not a file; expected a record made by evenkeel calibrate."
            )
        try:
            content = path.read_bytes()
            metadata = _metadata(content)
            tensors = load_bytes(content)
        except Exception as e:  # whatever a hostile file provokes in the parsers
            raise RecordError(
                f"{path} is not a readable safetensors file ({e}); it is damaged or foreign. "
                f"Restore it, or calibrate again."
            ) from e
        if metadata.get("format") != "evenkeel-record":
            raise RecordError(f"{path} is a safetensors file but not an evenkeel record.")
        if metadata.get("schema_version") != str(SCHEMA_VERSION):
            raise RecordError(
                f"{path} has schema version {metadata.get('schema_version')}, this library reads "
                f"{SCHEMA_VERSION}: calibrate again, or use the version that wrote it."
            )
        try:
            genuine = metadata.get("digest") == _digest(metadata.get("provenance", ""), tensors)
        except TypeError:  # a dtype that numpy does not have
            genuine = False
        if not genuine:
            raise RecordError(
                f"{path} was changed after it was written (its digest does not match). Restore it, "
                f"or calibrate again."
            )
        try:
            provenance = Provenance(**json.loads(metadata["provenance"]))
            _refuse_malformed(provenance, tensors)
        except Exception as e:  # anyone can compute a digest
            raise RecordError(
                f"{path} carries a matching digest but is not a valid record: {e}. Calibrate again."
            ) from e
        return cls._from_tensors(provenance, tensors)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"moments.{n}": getattr(self.moments, n) for n in _MOMENTS}
        t = self.gram.shape[-1]
        upper = torch.triu_indices(t, t)
        tensors["gram"] = self.gram[:, upper[0], upper[1]]
        tensors["prompt_keys"], tensors["seeds"] = self.prompt_keys, self.seeds
        tensors["noise_floor"] = self.noise_floor
        tensors |= {f"frame.{n}": getattr(self.frame, n) for n in _FRAME}
        if self.spectrum is not None:
            tensors["spectrum"] = self.spectrum
        if self.histogram is not None:
            tensors["histogram"] = self.histogram.sums
        if self.law is not None:
            tensors |= {f"law.{n}": torch.from_numpy(getattr(self.law, n)) for n in _LAW}
        # Cloned: safetensors refuses tensors that are views of one another.
        return {n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}

    @classmethod
    def _from_tensors(cls, provenance: Provenance, tensors: dict[str, Tensor]) -> Record:
        shape = tensors["moments.mean_e"].shape
        count = torch.full(shape, provenance.elements, dtype=torch.int64)
        moments = PairedMoments(count=count, **{n: tensors[f"moments.{n}"] for n in _MOMENTS})
        t = shape[1]
        upper = torch.triu_indices(t, t)
        gram = torch.zeros(shape[0], t, t)
        gram[:, upper[0], upper[1]] = tensors["gram"]
        gram[:, upper[1], upper[0]] = tensors["gram"]
        frame = Frame(**{n: tensors[f"frame.{n}"] for n in _FRAME})
        sums = tensors.get("histogram")
        law = None
        if "law.alpha" in tensors:
            arrays = {n: tensors[f"law.{n}"].numpy() for n in _LAW}
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
        )


def differences(a: Provenance, b: Provenance, ignore: tuple[str, ...] = ("versions",)) -> list[str]:
    """One line per field in which two provenances differ."""
    return [
        f"  {f.name}: {getattr(a, f.name)!r} against {getattr(b, f.name)!r}"
        for f in fields(Provenance)
        if f.name not in ignore and getattr(a, f.name) != getattr(b, f.name)
    ]


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


def _joined(a: PairedMoments, b: PairedMoments, order: Tensor) -> PairedMoments:
    names = ("count", *_MOMENTS)
    return PairedMoments(**{n: torch.cat([getattr(a, n), getattr(b, n)])[order] for n in names})


def _digest(header: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


_KINDS: dict[str, Any] = {
    "str": str,
    "int": int,
    "float | None": (float, int, type(None)),
    "list[float]": list,
    "list[int]": list,
    "dict[str, Any]": dict,
    "dict[str, int]": dict,
    "dict[str, str]": dict,
}


def _refuse_malformed(p: Provenance, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless fields, names, dtypes, shapes and numbers are those of a record."""
    for f in fields(Provenance):
        if not isinstance(getattr(p, f.name), _KINDS[str(f.type)]):
            raise ValueError(f"{f.name} is {getattr(p, f.name)!r}, expected {f.type}")
    if set(p.layout) != {"ndim", "axis", "channels", "patch"} or p.elements < 1:
        raise ValueError(f"layout {p.layout} of {p.elements} elements is incomplete")
    prompts, steps, channels = tensors["moments.mean_e"].shape
    wanted = _expected(prompts, steps, channels)
    missing, foreign = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    optional = {"histogram", "spectrum"}
    if not any(n in tensors for n in wanted if n.startswith("law.")):
        optional |= {n for n in wanted if n.startswith("law.")}
    if missing - optional or foreign:
        raise ValueError(f"missing tensors {sorted(missing)}, unknown tensors {sorted(foreign)}")
    for name, tensor in tensors.items():
        dtype, shape = wanted[name]
        shape = (steps, tensor.shape[-1]) if name == "spectrum" and tensor.dim() else shape
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or 0 in shape:
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{name} is {found}, expected {dtype} {shape}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has a value that is not finite")
    for values in (p.timesteps, p.alpha, p.sigma):
        if len(values) != steps or not np.isfinite(np.array(values, dtype=np.float64)).all():
            raise ValueError(f"expected {steps} finite timesteps and levels, found {values}")


def _expected(p: int, t: int, c: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    double, whole = torch.float64, torch.int64
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    wanted = {f"moments.{n}": (double, (p, t, c)) for n in _MOMENTS}
    wanted["moments.central"] = (double, (p, t, c, len(ORDERS)))
    wanted |= {f"frame.{n}": (double, (t, c)) for n in _FRAME}
    return {
        **wanted,
        "gram": (torch.float32, (p, t * (t + 1) // 2)),
        "prompt_keys": (torch.uint8, (p, 8)),
        "seeds": (whole, (p,)),
        "noise_floor": (double, (t,)),
        **{f"law.{n}": (double, (t,)) for n in ("timesteps", "noise_weights", "sigma_down")},
        **{f"law.{n}": (double, (t, t)) for n in ("sample_weights", "output_weights")},
        **{f"law.{n}": (double, (t + 1,)) for n in ("alpha", "sigma")},
        "spectrum": (whole, (t, 1)),  # any number of rings
        "histogram": (whole, (t, c, BINS + 2, 6)),
    }


def _metadata(content: bytes) -> dict[str, str]:
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or size > len(content) - 8:
        raise ValueError("the header is longer than the file")
    header = json.loads(content[8 : 8 + size])
    found = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    return dict(found)
