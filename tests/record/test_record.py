"""A record survives the disk to the bit, merges exactly, and never lets a bad file through."""

from __future__ import annotations

import functools
import itertools
import json
import os
import pickle
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from evenkeel.corrections import TAC, StepbaQ
from evenkeel.corrections.base import digest_of
from evenkeel.corrections.reconstruction import Reconstruction
from evenkeel.errors import EvenkeelError, Incompatible, RecordError
from evenkeel.record import (
    Provenance,
    Record,
    canonical_order,
    differences,
    fixed_point_spectrum,
    prompt_key,
)
from evenkeel.record.closed_loop import ClosedLoop
from evenkeel.record.record import KIND
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.error_structure import step_gram
from evenkeel.statistics.histogram import BINS, ErrorHistogram, Frame
from evenkeel.statistics.moments import PairedMoments
from evenkeel.statistics.residual import RESIDUAL_BINS, ResidualHistogram
from evenkeel.storage import digest, write_tensors

STEPS, CHANNELS, ELEMENTS = 3, 2, 16
LAW = [f.name for f in fields(StepLaw) if f.name not in ("sampler", "prediction")]
FRAME = Frame(*(torch.full((STEPS, CHANNELS), v, dtype=torch.float64) for v in (0, 1, 0, 1, 0, 1)))


def provenance(steps: int = STEPS, elements: int = ELEMENTS, **changes: Any) -> Provenance:
    made = Provenance(
        pipeline_class="SomePipeline",
        denoiser="unet",
        reference="0" * 32,
        quantized="1" * 32,
        quantizer="w4a16",
        scheduler_class="EulerDiscreteScheduler",
        scheduler_config={"beta_start": 0.00085, "trained_betas": None, "steps_offset": 1},
        prediction="epsilon",
        num_inference_steps=steps,
        guidance_scale=5.0,
        timesteps=[1000.0 / (k + 1) for k in range(steps)],
        alpha=[1.0] * steps,
        sigma=[14.6 / (k + 1) for k in range(steps)],
        call={"height": 32},
        trajectory="full-precision",
        layout={"ndim": 4, "axis": 1, "channels": CHANNELS, "patch": 1},
        latent_shape=[CHANNELS, 4, 4],
        dtype="float32",
        elements=elements,
        versions={"torch": "2"},
    )
    return replace(made, **changes)


def part(index: int) -> Record:
    """What one batch of one prompt leaves; prompt and seed depend on the index."""
    generator = torch.Generator().manual_seed(index)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    e, d, x = (draw(1, STEPS, CHANNELS, ELEMENTS) for _ in range(3))
    return Record(
        provenance=provenance(),
        prompt_keys=prompt_key(f"prompt {index}")[None],
        seeds=torch.tensor([index]),
        moments=PairedMoments.of(e, d, x),
        gram=step_gram(d),
        frame=FRAME,
        spectrum=fixed_point_spectrum(draw(1, STEPS, 2).abs(), FRAME),
        histogram=ErrorHistogram.of(FRAME, e, d),
        noise_floor=draw(STEPS).abs(),
        law=law(),
        residual=ResidualHistogram.of(FRAME, e, d),
    )


def law(steps: int = STEPS) -> StepLaw:
    line, square = np.linspace(1, 2, steps + 1), np.tril(np.ones((steps, steps)))
    return StepLaw(
        "EulerDiscreteScheduler",
        "epsilon",
        timesteps=line[1:],
        sample_weights=square,
        output_weights=-square,
        noise_weights=line[:-1],
        alpha=line,
        sigma=line[::-1].copy(),
        sigma_down=line[1:],
    )


def merged(parts: list[Record]) -> Record:
    return functools.reduce(Record.merge, parts)


WHOLE = merged([part(i) for i in range(5)])


def tensors_of(record: Record) -> dict[str, Tensor]:
    assert record.spectrum is not None and record.histogram is not None
    assert record.residual is not None
    return {
        **{f.name: getattr(record.moments, f.name) for f in fields(PairedMoments)},
        **{f"frame.{f.name}": getattr(record.frame, f.name) for f in fields(Frame)},
        **{n: getattr(record, n) for n in ("prompt_keys", "seeds", "gram", "noise_floor")},
        "spectrum": record.spectrum,
        "histogram": record.histogram.sums,
        "residual": record.residual.counts,
        **{n: torch.from_numpy(getattr(record.law, n)) for n in LAW},
    }


def same(a: Record, b: Record) -> bool:
    left, right = tensors_of(a), tensors_of(b)
    assert a.law is not None and b.law is not None
    names = a.law.sampler == b.law.sampler and a.law.prediction == b.law.prediction
    equal = names and all(
        torch.equal(left[n], right[n]) and left[n].dtype == right[n].dtype for n in left
    )
    return equal and a.provenance == b.provenance


# ---- round trip


def test_save_and_load_give_the_record_back_to_the_bit(tmp_path: Path) -> None:
    path = WHOLE.save(tmp_path / "new" / "folder" / "record.safetensors")
    assert same(Record.load(path), WHOLE)
    assert Record.load(str(path)).prompts == 5
    assert not same(Record.load(path), merged([part(i) for i in range(4)]))
    again = Record.load(path).save(tmp_path / "again.safetensors")
    assert same(Record.load(again), WHOLE)


def test_spectrum_histograms_and_law_are_optional(tmp_path: Path) -> None:
    bare = replace(WHOLE, spectrum=None, histogram=None, residual=None, law=None)
    loaded = Record.load(bare.save(tmp_path / "bare"))
    assert loaded.spectrum is None and loaded.histogram is None and loaded.law is None
    assert loaded.residual is None and loaded.evidence.residual is None
    assert loaded.error_spectrum() is None
    assert torch.equal(loaded.gram, WHOLE.gram)


def test_the_smallest_record_can_be_saved(tmp_path: Path) -> None:
    """One prompt, one step, one channel: views of one matrix are contiguous and share memory."""
    e, d, x = (torch.randn(1, 1, 1, 4) for _ in range(3))
    moments = PairedMoments.of(e, d, x)
    one = torch.ones(1, 1, dtype=torch.float64)
    record = Record(
        provenance=provenance(steps=1, elements=4),
        prompt_keys=prompt_key("a")[None],
        seeds=torch.tensor([0]),
        moments=moments,
        gram=step_gram(d),
        frame=Frame(one, one, one, one, one, one),
        spectrum=None,
        histogram=None,
        noise_floor=torch.zeros(1, dtype=torch.float64),
    )
    assert torch.equal(Record.load(record.save(tmp_path / "r")).moments.s_xd, moments.s_xd)


def test_derived_quantities_survive_the_disk(tmp_path: Path) -> None:
    loaded = Record.load(WHOLE.save(tmp_path / "r"))
    assert torch.equal(loaded.evidence.by_channel.dd, WHOLE.evidence.by_channel.dd)
    assert torch.equal(loaded.step_correlation(), WHOLE.step_correlation())
    assert loaded.evidence.source == WHOLE.provenance
    residual, gram = loaded.evidence.residual, loaded.evidence.gram
    assert residual is not None and gram is not None and WHOLE.residual is not None
    assert torch.equal(residual.quantile(0.25), WHOLE.residual.quantile(0.25))
    assert torch.equal(gram, WHOLE.gram)
    spectrum = loaded.error_spectrum()
    assert spectrum is not None and spectrum.shape == (STEPS, 2) and (spectrum > 0).all()


def test_prompts_are_stored_as_keys_and_not_as_text(tmp_path: Path) -> None:
    content = WHOLE.save(tmp_path / "r").read_bytes()
    assert b"prompt 1" not in content
    assert bytes(prompt_key("prompt 1").tolist()) in content


def test_a_thousand_prompts_at_thirty_steps_stay_below_twenty_mebibytes(tmp_path: Path) -> None:
    prompts, steps, channels = 1000, 30, 4
    shape = (prompts, steps, channels)
    moments = PairedMoments.of(*(torch.randn(*shape, 3) for _ in range(3)))
    frame = Frame(*(torch.ones(steps, channels, dtype=torch.float64) for _ in range(6)))
    layout = {"ndim": 4, "axis": 1, "channels": channels, "patch": 1}
    record = Record(
        provenance=provenance(steps=steps, elements=3, layout=layout),
        prompt_keys=torch.randint(0, 256, (prompts, 8), dtype=torch.uint8),
        seeds=torch.arange(prompts),
        moments=moments,
        gram=torch.ones(prompts, steps, steps),
        frame=frame,
        spectrum=torch.ones(steps, 8, dtype=torch.int64),
        histogram=ErrorHistogram(
            frame, torch.ones(steps, channels, BINS + 2, 6, dtype=torch.int64)
        ),
        noise_floor=torch.zeros(steps, dtype=torch.float64),
        law=law(steps),
        residual=ResidualHistogram(
            frame, torch.ones(steps, channels, RESIDUAL_BINS + 2, dtype=torch.int64)
        ),
    )
    path = record.save(tmp_path / "large.safetensors")
    assert 17e6 < path.stat().st_size <= 20 * 2**20
    assert same(Record.load(path), record)


def test_a_crash_while_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = part(0).save(tmp_path / "r")
    before = path.read_bytes()

    def crash(self: Path, data: bytes) -> int:
        with self.open("wb") as f:
            f.write(data[: len(data) // 2])
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", crash)
        with pytest.raises(OSError, match="disk full"):
            WHOLE.save(path)
        with pytest.raises(OSError, match="disk full"):
            WHOLE.save(tmp_path / "new")
    assert path.read_bytes() == before
    assert not (tmp_path / "new").exists()
    assert same(Record.load(WHOLE.save(path)), WHOLE)  # the leftovers are not in the way
    assert [p.name for p in tmp_path.glob("r*")] == ["r"]


# ---- damage


def flip_bit(content: bytearray, rng: random.Random) -> bytes:
    position = rng.randrange(len(content))
    content[position] ^= 1 << rng.randrange(8)
    return bytes(content)


def truncate(content: bytearray, rng: random.Random) -> bytes:
    return bytes(content[: rng.randrange(len(content))])


def edit_header(content: bytearray, rng: random.Random) -> bytes:
    """Change one character of the JSON header, keeping its length."""
    size = int.from_bytes(content[:8], "little")
    position = 8 + rng.randrange(size)
    content[position] = rng.choice(b'0123456789"{}[],:x')
    return bytes(content)


def swap_tensors(content: bytearray, rng: random.Random) -> bytes:
    """Exchange two tensors of the same shape; the file stays a valid safetensors file."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    names = [n for n in header if n.startswith("moments.") and n != "moments.central"]
    a, b = rng.sample(names, 2)
    header[a], header[b] = header[b], header[a]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(content[8 + size :])


def splice(content: bytearray, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    return bytes(content[:start] + rng.randbytes(rng.randrange(1, 40)) + content[start:])


DAMAGE = (flip_bit, truncate, edit_header, swap_tensors, splice)


def outcome(path: Path, original: Record) -> str:
    try:
        loaded = Record.load(path)
    except RecordError as e:
        return "refused" if str(path) in str(e) else f"refused without naming the file: {e}"
    return "identical" if same(loaded, original) else "DIFFERENT CONTENT ACCEPTED"


def test_two_hundred_damaged_files_are_refused_or_harmless(tmp_path: Path) -> None:
    content = WHOLE.save(tmp_path / "good").read_bytes()
    path = tmp_path / "bad"
    seen: Counter[tuple[str, str]] = Counter()
    for seed in range(200):
        damage = DAMAGE[seed % len(DAMAGE)]
        path.write_bytes(damage(bytearray(content), random.Random(seed)))
        seen[damage.__name__, outcome(path, WHOLE)] += 1
    assert {result for _, result in seen} <= {"refused", "identical"}, seen
    for damage in DAMAGE:
        assert seen[damage.__name__, "refused"] >= 30, seen


def test_every_bit_of_the_first_kilobyte_matters_or_is_harmless(tmp_path: Path) -> None:
    content = WHOLE.save(tmp_path / "good").read_bytes()
    path, seen = tmp_path / "bad", Counter[str]()
    for position in range(0, 1024, 3):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(bytes(damaged))
        seen[outcome(path, WHOLE)] += 1
    assert set(seen) <= {"refused", "identical"}, seen


class _Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", ["pickle", "torch"])
def test_a_pickle_is_refused_and_not_executed(tmp_path: Path, write: str) -> None:
    path, proof = tmp_path / "record.safetensors", tmp_path / "executed"
    trap = {"provenance": _Trap(proof)}
    {
        "pickle": lambda: path.write_bytes(pickle.dumps(trap)),
        "torch": lambda: torch.save(trap, path),
    }[write]()
    with pytest.raises(RecordError, match="not a readable safetensors file"):
        Record.load(path)
    assert not proof.exists()
    pickle.loads(pickle.dumps(trap))  # the trap works
    assert proof.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        b"\xff" * 64,
        b"PK\x03\x04 a zip file",
        (4).to_bytes(8, "little") + b"null",
        (2).to_bytes(8, "little") + b"{}",
        (26).to_bytes(8, "little") + b'{"__metadata__":{"a":1.5}}',
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
    ],
    ids=["empty", "zeros", "ones", "zip", "null", "no tensors", "number as text", "deep nesting"],
)
def test_files_that_are_something_else_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=r"readable safetensors|not an evenkeel record"):
        Record.load(path)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(RecordError, match="is not a file"):
            Record.load(path)


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(save_bytes({"weight": torch.ones(2)}, {"format": "pt"}))
    with pytest.raises(RecordError, match="not an evenkeel record"):
        Record.load(path)


def forged(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    """A changed record with a digest that matches: only its meaning is wrong."""
    content = WHOLE.save(path).read_bytes()
    tensors = load_bytes(content)
    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + size])["__metadata__"]
    header = json.loads(metadata["provenance"])
    change(tensors, header)
    text = json.dumps(header, sort_keys=True)
    whole = text + metadata["closed_loop"]
    metadata |= {"provenance": text, "digest": digest(whole, tensors)}
    path.write_bytes(save_bytes(tensors, metadata))
    return path


def test_forging_without_a_change_gives_a_valid_record(tmp_path: Path) -> None:
    assert same(Record.load(forged(tmp_path / "r", lambda t, h: None)), WHOLE)


FORGERIES: dict[str, Callable[[dict[str, Tensor], dict[str, Any]], object]] = {
    "missing tensor": lambda t, h: t.pop("moments.s_xe"),
    "missing means": lambda t, h: t.pop("moments.mean_e"),
    "unknown tensor": lambda t, h: t.update(extra=torch.ones(1)),
    "renamed tensor": lambda t, h: t.update({"moment.gram": t.pop("gram")}),
    "another dtype": lambda t, h: t.update(gram=t["gram"].double()),
    "float seeds": lambda t, h: t.update(seeds=t["seeds"].double()),
    "another shape": lambda t, h: t.update({"moments.s_xx": t["moments.s_xx"][:, :2].clone()}),
    "flat moments": lambda t, h: t.update({"moments.mean_e": torch.ones(3).double()}),
    "scalar means": lambda t, h: t.update({"moments.mean_e": torch.ones(()).double()}),
    "scalar spectrum": lambda t, h: t.update(spectrum=torch.ones((), dtype=torch.int64)),
    "too few orders": lambda t, h: t.update(
        {"moments.central": t["moments.central"][..., :5].clone()}
    ),
    "short gram": lambda t, h: t.update(gram=t["gram"][:, :4].clone()),
    "fewer prompts": lambda t, h: t.update(seeds=t["seeds"][:2].clone()),
    "coarser histogram": lambda t, h: t.update(histogram=t["histogram"][:, :, :7].clone()),
    "coarser residual": lambda t, h: t.update(residual=t["residual"][:, :, :7].clone()),
    "float residual": lambda t, h: t.update(residual=t["residual"].double()),
    "half a law": lambda t, h: t.pop("law.alpha"),
    "law of other length": lambda t, h: t.update({"law.sigma": t["law.sigma"][:-1].clone()}),
    "not finite": lambda t, h: t["moments.s_xx"].fill_(float("nan")),
    "no prompts": lambda t, h: t.update({n: v[:0].clone() for n, v in t.items()}),
    "missing field": lambda t, h: h.pop("prediction"),
    "unknown field": lambda t, h: h.update(command="rm"),
    "text for a number": lambda t, h: h.update(elements="16"),
    "no elements": lambda t, h: h.update(elements=0),
    "number for a list": lambda t, h: h.update(sigma=3.0),
    "list of text": lambda t, h: h.update(sigma=["a", "b", "c"]),
    "too many levels": lambda t, h: h.update(alpha=[1.0] * 9),
    "levels not finite": lambda t, h: h.update(alpha=[float("nan")] * STEPS),
    "list for a layout": lambda t, h: h.update(layout=[4, 1, 2, 1]),
    "half a layout": lambda t, h: h.update(layout={"ndim": 4}),
    "text for a scale": lambda t, h: h.update(guidance_scale="high"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_malformed_record_with_a_matching_digest_is_refused(tmp_path: Path, forgery: str) -> None:
    def change(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        FORGERIES[forgery](tensors, header)

    path = forged(tmp_path / "r", change)
    with pytest.raises(RecordError, match="not a valid record"):
        Record.load(path)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"x"', "{", "[" * 100_000])
def test_a_header_that_is_no_provenance_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r"
    tensors = load_bytes(WHOLE.save(path).read_bytes())
    metadata = {"format": "evenkeel-record", "schema_version": "2", "provenance": text}
    metadata["closed_loop"] = "{}"
    metadata["digest"] = digest(text + "{}", tensors)
    path.write_bytes(save_bytes(tensors, metadata))
    with pytest.raises(RecordError, match="not a valid record"):
        Record.load(path)


def test_a_dtype_that_numpy_lacks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r"
    metadata = {"format": "evenkeel-record", "schema_version": "2", "provenance": "{}"}
    path.write_bytes(save_bytes({"gram": torch.ones(2, dtype=torch.bfloat16)}, metadata))
    with pytest.raises(RecordError, match="digest"):
        Record.load(path)


@pytest.mark.parametrize("version", ["0", "1", "one"])
def test_another_schema_version_is_named(tmp_path: Path, version: str) -> None:
    path = tmp_path / "r"
    content = WHOLE.save(path).read_bytes()
    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + size])["__metadata__"] | {"schema_version": version}
    path.write_bytes(save_bytes(load_bytes(content), metadata))
    with pytest.raises(RecordError, match=f"schema version {version}, this library reads 2"):
        Record.load(path)


def test_record_errors_are_caught_as_evenkeel_errors_and_value_errors(tmp_path: Path) -> None:
    assert issubclass(RecordError, EvenkeelError) and issubclass(RecordError, ValueError)


# ---- merging


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    order=st.permutations(range(5)),
    cuts=st.sets(st.integers(1, 4), max_size=4),
    group_order=st.randoms(use_true_random=False),
)
def test_merging_any_split_in_any_order_gives_the_same_record_to_the_bit(
    order: list[int], cuts: set[int], group_order: random.Random
) -> None:
    edges = [0, *sorted(cuts), 5]
    parts = [part(i) for i in order]
    groups = [merged(parts[a:b]) for a, b in itertools.pairwise(edges)]
    group_order.shuffle(groups)
    assert same(merged(groups), WHOLE)


def test_rows_are_in_order_of_seed_and_prompt() -> None:
    both = part(3).merge(part(1))
    assert both.seeds.tolist() == [1, 3]
    assert torch.equal(both.prompt_keys[0], prompt_key("prompt 1"))
    assert torch.equal(both.gram[1], part(3).gram[0])
    keys = torch.tensor([[2] * 8, [1] * 8, [0] * 8], dtype=torch.uint8)
    assert canonical_order(keys, torch.tensor([5, 5, 9])).tolist() == [1, 0, 2]


def test_merging_keeps_the_larger_noise_floor_and_adds_spectra() -> None:
    both = part(0).merge(part(1))
    floors = torch.stack([part(0).noise_floor, part(1).noise_floor])
    assert torch.equal(both.noise_floor, floors.max(0).values)
    spectra = [p.spectrum for p in (part(0), part(1))]
    assert spectra[0] is not None and spectra[1] is not None
    assert torch.equal(torch.as_tensor(both.spectrum), spectra[0] + spectra[1])


def test_merging_adds_residual_counts() -> None:
    both = part(0).merge(part(1)).residual
    parts = [p.residual for p in (part(0), part(1))]
    assert both is not None and parts[0] is not None and parts[1] is not None
    assert torch.equal(both.counts, parts[0].counts + parts[1].counts)
    assert both.counts.sum(-1).unique().tolist() == [2 * ELEMENTS]


def test_a_prompt_is_not_counted_twice() -> None:
    with pytest.raises(Incompatible, match="share prompts"):
        WHOLE.merge(part(2))
    other_seed = replace(part(2), seeds=torch.tensor([77]))
    assert WHOLE.merge(other_seed).prompts == 6  # same text from other noise is new evidence


@pytest.mark.parametrize(
    "change",
    [
        {"guidance_scale": 7.5},
        {"quantized": "2" * 32},
        {"scheduler_config": {"beta_start": 0.1}},
        {"trajectory": "quantized"},
        {"call": {}},
        {"dtype": "bfloat16"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_records_of_different_things_are_not_merged(change: dict[str, Any]) -> None:
    other = replace(part(7), provenance=provenance(**change))
    with pytest.raises(Incompatible, match=next(iter(change))):
        WHOLE.merge(other)


def test_library_versions_may_differ() -> None:
    other = replace(part(7), provenance=provenance(versions={"torch": "3"}))
    assert WHOLE.merge(other).prompts == 6
    assert differences(other.provenance, WHOLE.provenance) == []
    assert len(differences(other.provenance, WHOLE.provenance, ignore=())) == 1


@pytest.mark.parametrize("name", [f.name for f in fields(Frame)])
def test_another_pilot_frame_is_refused(name: str) -> None:
    frame = replace(FRAME, **{name: 2 + getattr(FRAME, name)})
    with pytest.raises(Incompatible, match="pilot"):
        WHOLE.merge(replace(part(7), frame=frame))


@pytest.mark.parametrize("field", ["histogram", "residual", "spectrum"])
def test_a_part_without_histogram_leaves_the_whole_without_one(field: str) -> None:
    """The rest cannot stand for the missing prompts."""
    whole = WHOLE.merge(replace(part(7), **{field: None}))
    assert getattr(whole, field) is None
    assert whole.prompts == 6


def closed_loop() -> ClosedLoop:
    levels = WHOLE.provenance.levels
    source = replace(WHOLE.provenance, trajectory="corrected")
    tac = TAC(
        *levels,
        torch.full((STEPS, CHANNELS), 1.1, dtype=torch.float64),
        torch.randn(STEPS, CHANNELS, 2, 2),
        reconstruction=Reconstruction(),
        source=source,
    )
    stepbaq = StepbaQ(
        *levels,
        torch.randn(STEPS, CHANNELS, 1, 1),
        torch.rand(STEPS),
        np.linspace(0.01, 9.0, 20),
        relabel_time=False,
        source=source,
    )
    return ClosedLoop({"tac": tac, "stepbaq": stepbaq})


def test_what_was_measured_in_closed_loop_travels_with_the_record(tmp_path: Path) -> None:
    record = replace(WHOLE, closed_loop=closed_loop())
    loaded = Record.load(record.save(tmp_path / "r"))
    for name, correction in closed_loop_names(record).items():
        found = closed_loop_names(loaded)[name]
        assert digest_of(found) == digest_of(correction)
        assert found.source == correction.source
    made, reasons = loaded.corrections()
    assert {"tac", "stepbaq", "q-drift"} <= set(made) and "tac" not in reasons


def closed_loop_names(record: Record) -> dict[str, Any]:
    return dict(record.closed_loop.corrections)


def test_without_it_the_reason_says_how_to_get_it() -> None:
    made, reasons = WHOLE.corrections()
    assert "tac" not in made and "--closed-loop" in reasons["tac"]


@pytest.mark.parametrize("name", ["closed_loop.tac.other", "closed_loop.stepbaq.mean"])
def test_foreign_or_missing_tables_are_refused(tmp_path: Path, name: str) -> None:
    record = replace(WHOLE, closed_loop=closed_loop())
    tensors = record._tensors()
    changed = {n: t for n, t in tensors.items() if n != name}
    changed |= {name: torch.ones(2)} if name not in tensors else {}
    header = {
        "provenance": asdict(record.provenance),
        "closed_loop": record.closed_loop.as_dict(),
    }
    path = write_tensors(tmp_path / "r", KIND, header, changed)
    with pytest.raises(RecordError, match="not a valid record"):
        Record.load(path)


def test_merging_leaves_it_out() -> None:
    record = replace(WHOLE, closed_loop=closed_loop())
    other = replace(WHOLE, seeds=WHOLE.seeds + 1000)
    assert record.merge(other).closed_loop == ClosedLoop()
