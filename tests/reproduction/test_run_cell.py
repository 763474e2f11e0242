"""A cell from quantizing to its verdict, on the embedded pipeline."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from evenkeel.cli import main
from evenkeel.errors import EvenkeelError, MissingExtra, StorageError
from evenkeel.reproduction import Cell, Row, Verdict, judged, paper
from evenkeel.reproduction.page import page
from evenkeel.reproduction.run_cell import KIND, claim_cell, is_kept, run_cell, variant
from evenkeel.storage import json_safe, write_json

ROW = Row(
    "1-tiny",
    "1",
    "a model",
    {
        "full precision": {"FID": 10.0},
        "quantized": {"FID": 12.0},
        "Q-Drift": {"FID": 11.0},
        "both": {"FID": 11.5},
    },
    ("Q-Drift", "FID"),
    Cell(
        "pixart-sigma",
        {"method": "rtn", "weight_bits": 3, "activation_bits": 4, "group": 32},
        3,
        4,
        {
            "Q-Drift": "q-drift:published",
            "both": ["d2-dpm:published", {"name": "q-drift:released", "strength": 0.5}],
            "first": {"name": "tac-ibc", "steps": 1},
        },
        also=("exact-drift", "nothing such"),
    ),
)


def test_a_cell_is_run_judged_and_gone_on_with(tmp_path: Path) -> None:
    said: list[str] = []
    found = run_cell(ROW, tmp_path / "1-tiny-bits", images=8, said=said.append)
    assert len(list((tmp_path / "quantized").glob("*/quantized.json"))) == 1
    arms = {arm["name"]: arm for arm in found["arms"]}
    assert list(arms) == ["full-precision", "quantized", "Q-Drift", "both", "first", "exact-drift"]
    assert list(found["refused"]) == ["nothing such"] and found["images"] == 8
    quantized, claimed = arms["quantized"], arms["Q-Drift"]
    before = quantized["frechet_reference"]["value"]
    change = claimed["frechet_reference"]["value"] - before
    verdict = Verdict(**found["verdict"])
    assert verdict.value == pytest.approx(change / before) and verdict.published == pytest.approx(
        -1 / 12
    )
    assert claimed["psnr"]["value"] != quantized["psnr"]["value"] != arms["first"]["psnr"]["value"]
    assert said == ["quantize", "calibrate and fit", "4 arms, 8 images each"]
    assert json.loads(json.dumps(found)) == found
    assert judged(-1 / 12, _estimate(claimed), before) == verdict
    text = page(replace(paper("q-drift"), rows=(ROW,)), {("1-tiny", "bits"): found})
    assert verdict.word in text and "nothing such was not made" in text
    line = next(line for line in text.splitlines() if line.startswith("| both |"))
    gain = arms["both"]["difference_to_quantized"]["psnr"]
    assert "(paper -4.2)" in line and f"{gain['value']:+.2f} dB" in line


def test_what_is_not_installed_is_said_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(held_out: bool) -> None:
        raise MissingExtra("pip install 'evenkeel[zoo]'")

    said: list[str] = []
    monkeypatch.setattr("evenkeel.zoo.evaluation.load_scans", missing)
    with pytest.raises(MissingExtra, match="zoo"):
        run_cell(ROW, tmp_path / "1-tiny-bits", images=8, said=said.append)
    assert not said


def test_another_calibration_moves_the_correction_and_not_the_rest(tmp_path: Path) -> None:
    first, second = (
        run_cell(
            ROW, tmp_path / variant("bits", seed), images=8, only=["Q-Drift"], calibration_seed=seed
        )
        for seed in (0, 1)
    )
    of_arm = [{arm["name"]: arm["psnr"] for arm in found["arms"]} for found in (first, second)]
    assert of_arm[0]["quantized"] == of_arm[1]["quantized"]
    assert of_arm[0]["Q-Drift"] != of_arm[1]["Q-Drift"]
    assert [found["calibration_seed"] for found in (first, second)] == [0, 1]
    text = page(
        replace(paper("q-drift"), rows=(ROW,)),
        {("1-tiny", "bits"): first, ("1-tiny", "bits-seed-1"): second},
    )
    assert "| bits-seed-1 |" in text and "## 1-tiny, bits-seed-1: a model" in text


def test_damage_is_looked_for_between_its_neighbours(tmp_path: Path) -> None:
    said: list[str] = []
    found = run_cell(
        ROW, tmp_path / "damaged", severity="damage", images=8, only=["Q-Drift"], said=said.append
    )
    ratios = {t.split(":")[0]: float(t.split()[1]) for t in said if "in the paper" in t}
    assert 2 <= len(ratios) <= 4 and found["quantizer"] in ratios  # of nine
    best = min(ratios.values(), key=lambda r: abs(math.log(r / 1.2)))
    assert ratios[found["quantizer"]] == best
    arms = {arm["name"]: arm["frechet_reference"]["value"] for arm in found["arms"]}
    assert arms["quantized"] / arms["full-precision"] == pytest.approx(best, abs=0.01)


def _estimate(arm: dict[str, object]) -> object:
    from evenkeel.estimate import Estimate

    return Estimate(**arm["difference_to_quantized"]["frechet_reference"])  # type: ignore[index]


def test_a_row_without_a_cell_says_why() -> None:
    with pytest.raises(EvenkeelError, match="TFMQ-DM"):
        run_cell(paper("tac").row("6-w8a8"), Path())
    with pytest.raises(EvenkeelError, match="has the arms Q-Drift, both"):
        run_cell(ROW, Path(), only=["bothh"])
    with pytest.raises(EvenkeelError, match="bits, damage"):
        run_cell(ROW, Path(), severity="harsh")


def test_what_is_kept_counts_for_what_it_was_made_for(tmp_path: Path) -> None:
    claim_cell(ROW, tmp_path / "cell")
    claim_cell(ROW, tmp_path / "cell")
    assert ROW.cell is not None
    with pytest.raises(StorageError, match="differs in steps"):
        claim_cell(replace(ROW, cell=replace(ROW.cell, steps=4)), tmp_path / "cell")
    place, names = tmp_path / "cell.json", ["Q-Drift", "both", "first", "exact-drift"]
    arms = [{"name": name} for name in ("full-precision", "quantized", *names)]
    said = dict.fromkeys(KIND.keys, "") | {
        "cell": json_safe(asdict(ROW.cell)),
        "arms": arms,
        "refused": {"nothing such": "unknown"},
    }
    assert not is_kept(place, ROW, 8)
    write_json(place, KIND, {**said, "images": 8})
    assert is_kept(place, ROW, 8) and is_kept(place, ROW, 8, ["both"])
    assert not is_kept(place, ROW, 6) and not is_kept(place, ROW, None)
    assert not is_kept(place, replace(ROW, cell=replace(ROW.cell, steps=4)), 8)
    write_json(place, KIND, {**said, "images": 100, "arms": arms[:3]})
    assert is_kept(place, ROW, None, ["Q-Drift"]) and not is_kept(place, ROW, None)


def test_rows_without_damage_are_told_and_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    numbers = {**ROW.numbers, "full precision": {"FID": 12.0}}
    harmless = replace(ROW, id="1-harmless", numbers=numbers)
    numbers = {k: v for k, v in ROW.numbers.items() if k != "full precision"}
    unknown = replace(ROW, id="1-unknown", numbers=numbers)
    found = replace(paper("q-drift"), rows=(harmless, unknown))
    monkeypatch.setattr("evenkeel.reproduction.paper", lambda name: found)
    asked = ["reproduce", "q-drift", "--severity", "damage", "--images", "8"]
    assert main(asked) == 0
    told = capsys.readouterr().out
    assert "1-harmless: the paper's quantized arm is not worse" in told
    assert "1-unknown: the paper does not print" in told
    assert main([*asked, "--cell", "1-unknown"]) == 1
    assert "no damage to match" in capsys.readouterr().err


def test_the_command_lists_and_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "tac", "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert len(listed) == len(paper("tac").rows)
    assert main(["reproduce", "magic"]) == 1 and "no paper called" in capsys.readouterr().err
    place = tmp_path / "reproduced" / "q-drift" / "tables.md"
    place.parent.mkdir(parents=True)
    place.write_text("mine")
    assert main(["reproduce", "q-drift", "--cell", "1-pixart"]) == 1
    assert "--force" in capsys.readouterr().err and place.read_text() == "mine"
    assert main(["reproduce", "tac", "--table"]) == 0
    assert "1-w3a8" in (tmp_path / "reproduced" / "tac" / "tables.md").read_text()
    place.unlink()
    (place.parent / "1-pixart-bits.json").write_text("mine")
    assert main(["reproduce", "q-drift", "--cell", "1-pixart"]) == 1
    assert "no evenkeel reproduced cell" in capsys.readouterr().err
    assert main(["reproduce", "q-drift", "--images", "2"]) == 1
    assert "too few" in capsys.readouterr().err
