"""The file of a readout gives back every bit and refuses what was not written by us."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from readout_rigs import (
    Rig,
    sampled,
)
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

import evenkeel
from evenkeel.corrections import HeadFit, Readout
from evenkeel.corrections.head_table import HeadTable
from evenkeel.errors import RecordError
from evenkeel.record import load_correction, save
from evenkeel.storage import digest

pytestmark = pytest.mark.usefixtures("no_thread_survives")


# ---- the file


def tensors_and_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    metadata: dict[str, str] = json.loads(content[8 : 8 + size])["__metadata__"]
    return load_bytes(content), metadata


@pytest.mark.parametrize("rig", ["pixart_sigma", "wan", "cogvideox"], indirect=True)
def test_a_file_gives_back_every_bit(rig: Rig, tmp_path: Path) -> None:
    path = save(rig.readout, tmp_path / "r.safetensors")
    back = load_correction("readout", path)
    assert back.digest() == rig.readout.digest()
    assert (back.fits, back.head, back.form) == (
        rig.readout.fits,
        rig.readout.head,
        rig.readout.form,
    )
    assert back.provenance == rig.readout.provenance
    assert str(back) == str(rig.readout)
    assert back.evidence is not None and rig.readout.evidence is not None
    assert torch.equal(back.evidence.moments.central, rig.readout.evidence.moments.central)
    written, again = (tensors_and_header(p) for p in (path, save(back, tmp_path / "again")))
    assert written[1] == again[1]
    assert all(torch.equal(again[0][n], written[0][n]) for n in written[0])
    with evenkeel.applied(rig.pipe, back):
        assert torch.equal(sampled(rig.tiny), rig.corrected)


def test_any_two_tables_have_different_digests(pixart: Rig) -> None:
    table = pixart.readout.table
    moved = replace(table, sigma=table.sigma * 1.01)
    bent = replace(table, constant=table.constant + 1e-3)
    made = [replace(pixart.readout, table=t) for t in (table, moved, bent)]
    assert len({m.digest() for m in [*made, pixart.readout.with_drift()]}) == 4


def test_what_follows_is_not_dropped_silently(pixart: Rig, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="with_drift"):
        save(pixart.readout.with_drift(), tmp_path / "r")
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_refused(flux: Rig, tmp_path: Path) -> None:
    content = save(flux.readout, tmp_path / "r").read_bytes()
    place = tmp_path / "damaged"
    for size in (0, 4, 100, len(content) // 2, len(content) - 1):
        place.write_bytes(content[:size])
        with pytest.raises(RecordError, match="damaged or foreign"):
            load_correction("readout", place)
    changed = bytearray(content)
    changed[-3] ^= 1
    place.write_bytes(bytes(changed))
    with pytest.raises(RecordError, match="changed after it was written"):
        load_correction("readout", place)
    with pytest.raises(RecordError, match="is not a file"):
        load_correction("readout", tmp_path / "nothing")


class Bomb:
    """Unpickling this would create a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return Path.touch, (self.place,)


def test_foreign_files_are_refused_and_pickles_never_run(flux: Rig, tmp_path: Path) -> None:
    place = tmp_path / "foreign"
    for payload in (pickle.dumps(Bomb(tmp_path / "boom")), b"PK\x03\x04" * 50):
        place.write_bytes(payload)
        with pytest.raises(RecordError):
            load_correction("readout", place)
    assert not (tmp_path / "boom").exists()
    pickle.loads(pickle.dumps(Bomb(tmp_path / "boom")))
    assert (tmp_path / "boom").exists()  # the bomb works
    place.write_bytes(save_bytes({"x": torch.zeros(2)}, {"format": "other"}))
    with pytest.raises(RecordError, match="not an evenkeel readout"):
        load_correction("readout", place)
    tensors, metadata = tensors_and_header(save(flux.readout, tmp_path / "r"))
    place.write_bytes(save_bytes(tensors, {**metadata, "schema_version": "99"}))
    with pytest.raises(RecordError, match="schema version 99"):
        load_correction("readout", place)


Change = Callable[[dict[str, Tensor], dict[str, Any], dict[str, Any]], Any]


def put(name: str, make: Callable[[Tensor], Tensor]) -> Change:
    return lambda t, p, r: t.__setitem__(name, make(t[name]))


def poisoned(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[0] = float("nan")
    return tensor


HOSTILE: dict[str, Change] = {
    "weights in float32": put("table.weight", lambda t: t.float()),
    "scale in float64": put("table.scale", lambda t: t.double()),
    "active as numbers": put("table.active", lambda t: t.to(torch.uint8)),
    "a step less": put("table.weight", lambda t: t[1:].clone()),
    "a constant of another width": put("table.constant", lambda t: t[..., 1:].clone()),
    "no features": put("table.weight", lambda t: t[:, :, :0].clone()),
    "three axes": put("table.weight", lambda t: t[0].clone()),
    "NaN in the weights": put("table.weight", poisoned),
    "NaN in the scale": put("table.scale", poisoned),
    "NaN in the moments": put("moments.mean_d", poisoned),
    "moments in float32": put("moments.mean_d", lambda t: t.float()),
    "an unknown tensor": lambda t, p, r: t.update(extra=torch.zeros(1)),
    "a missing tensor": lambda t, p, r: t.pop("table.active"),
    "half of the moments": lambda t, p, r: t.pop("moments.mean_e"),
    "a level less": lambda t, p, r: p["alpha"].pop(),
    "a level that is not a number": lambda t, p, r: p["sigma"].__setitem__(0, float("nan")),
    "a negative level": lambda t, p, r: p["sigma"].__setitem__(0, -1.0),
    "a level in words": lambda t, p, r: p["alpha"].__setitem__(0, "high"),
    "an unknown field": lambda t, p, r: p.update(author="me"),
    "a missing field": lambda t, p, r: p.pop("quantized"),
    "an incomplete layout": lambda t, p, r: p["layout"].pop("axis"),
    "no elements": lambda t, p, r: p.update(elements=0),
    "an unknown form": lambda t, p, r: r.update(form="magic"),
    "no head": lambda t, p, r: r.update(head=None),
    "a fit of a step that is not there": lambda t, p, r: r["fits"][0].update(step=99),
    "two fits of one call": lambda t, p, r: r["fits"].append(r["fits"][0]),
    "a fit that is not finite": lambda t, p, r: r["fits"][0].update(bound=float("inf")),
    "a fit in words": lambda t, p, r: r["fits"][0].update(held_out="low"),
    "an explanation that is none": lambda t, p, r: r["fits"][0].update(explanation=3),
}


def forged(path: Path, readout: Readout, change: Change) -> Path:
    """A changed file whose digest matches."""
    tensors, metadata = tensors_and_header(save(readout, path))
    tensors = {n: t.clone() for n, t in tensors.items()}
    provenance, described = (json.loads(metadata[n]) for n in ("provenance", "readout"))
    change(tensors, provenance, described)
    texts = {"provenance": json.dumps(provenance), "readout": json.dumps(described)}
    texts["digest"] = digest(texts["provenance"] + texts["readout"], tensors)
    path.write_bytes(save_bytes(tensors, {**metadata, **texts}))
    return path


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files_with_a_matching_digest_are_refused(
    flux: Rig, tmp_path: Path, change: Change
) -> None:
    with pytest.raises(RecordError, match="is not a valid readout"):
        load_correction("readout", forged(tmp_path / "r", flux.readout, change))


def test_a_forged_file_without_a_change_is_read(flux: Rig, tmp_path: Path) -> None:
    back = load_correction("readout", forged(tmp_path / "r", flux.readout, lambda t, p, r: None))
    assert back.digest() == flux.readout.digest()


@pytest.mark.parametrize(
    ("features", "targets", "steps", "limit"), [(3072, 64, 20, 10e6), (2880, 4, 30, 2e6)]
)
def test_files_are_small(
    flux: Rig, tmp_path: Path, features: int, targets: int, steps: int, limit: float
) -> None:
    weight = torch.randn(steps, 1, features, targets, generator=torch.Generator().manual_seed(0))
    levels = [float(s) for s in np.geomspace(10, 0.1, steps)]
    active = torch.ones(steps, 1, dtype=torch.bool)
    table = HeadTable.of(np.ones(steps), np.array(levels), weight, weight[:, :, 0], active)
    provenance = replace(
        flux.readout.provenance, alpha=[1.0] * steps, sigma=levels, timesteps=levels
    )
    fits = tuple(HeadFit(k, 0, 0.01, 0.123456789012345, 0.5, "") for k in range(steps))
    readout = replace(flux.readout, table=table, provenance=provenance, fits=fits, evidence=None)
    path = save(readout, tmp_path / "r")
    assert weight.numel() * 2 < path.stat().st_size <= limit
    assert load_correction("readout", path).digest() == readout.digest()
