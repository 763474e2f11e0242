"""A record survives the disk to the bit and merges exactly."""

from __future__ import annotations

import itertools
import random
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_record import (
    ELEMENTS,
    FRAME,
    STEPS,
    WHOLE,
    closed_loop,
    law,
    merged,
    part,
    provenance,
    same,
)

from evenkeel.corrections.base import digest_of
from evenkeel.errors import Incompatible, RecordError
from evenkeel.record import (
    Record,
    canonical_order,
    differences,
    prompt_key,
)
from evenkeel.record.closed_loop import ClosedLoop
from evenkeel.record.record import KIND
from evenkeel.statistics.error_structure import step_gram
from evenkeel.statistics.histogram import BINS, ErrorHistogram, Frame
from evenkeel.statistics.moments import PairedMoments
from evenkeel.statistics.residual import RESIDUAL_BINS, ResidualHistogram
from evenkeel.storage import write_tensors


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


def test_what_was_measured_in_closed_loop_travels_with_the_record(tmp_path: Path) -> None:
    record = replace(WHOLE, closed_loop=closed_loop())
    loaded = Record.load(record.save(tmp_path / "r"))
    for name, correction in closed_loop_names(record).items():
        found = closed_loop_names(loaded)[name]
        assert digest_of(found) == digest_of(correction)
        assert found.source == correction.source
    made, reasons = loaded.corrections()
    assert {"tac", "tac-ibc", "stepbaq", "q-drift"} <= set(made) and "tac" not in reasons


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
