"""The command line: light help, JSON for programs, plain messages and exit codes for mistakes."""

import json
import subprocess
import sys

import pytest

from evenkeel.cli import main

SAMPLING = ["zoo:pixart-sigma", "--quantized", "w3a4-g32-r16", "--steps", "3", "--batch-size", "4"]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    path = tmp_path_factory.mktemp("record") / "r.safetensors"
    code = main(["calibrate", *SAMPLING, "--count", "4", "--out", str(path), "--json"])
    assert code == 0
    return path


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    "command",
    [
        [],
        *(
            [n]
            for n in (
                "demo",
                "calibrate",
                "readout",
                "refit",
                "fold",
                "inspect",
                "sample",
                "compare",
            )
        ),
    ],
)
def test_help_imports_nothing_heavy(command):
    code = (
        "import sys; from evenkeel.cli import main\n"
        f"try: main({[*command, '--help']!r})\n"
        "except SystemExit as e: print('exit', e.code)\n"
        "print(sorted({'torch', 'diffusers', 'numpy'} & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert "exit 0" in out
    assert out.strip().endswith("[]")


def test_inspect_says_what_was_measured(capsys, record):
    code, out, _ = run(capsys, "inspect", record)
    assert code == 0
    assert "PixArtSigmaPipeline" in out
    assert "w3a4-g32-r16" in out
    code, out, _ = run(capsys, "inspect", record, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["prompts"] == 4
    assert len(found["steps"]) == 3


def test_sample_writes_png(capsys, record, tmp_path):
    arguments = [
        "sample",
        *SAMPLING,
        "--record",
        record,
        "--correction",
        "q-drift",
        "--images",
        "2",
    ]
    code, out, _ = run(capsys, *arguments, "--out", tmp_path, "--json")
    found = json.loads(out)
    assert code == 0
    assert len(found["images"]) == 2
    assert len(list(tmp_path.glob("*.png"))) == 2
    assert len((tmp_path / "prompts.txt").read_text().splitlines()) == 2


def test_compare_gives_the_promised_keys(capsys, record, tmp_path):
    arguments = ["compare", *SAMPLING, "--record", record, "--corrections", "all", "--images", "8"]
    code, out, _ = run(capsys, *arguments, "--out", tmp_path, "--json")
    found = json.loads(out)
    assert code == 0
    assert [a["name"] for a in found["arms"]] == [
        "full-precision",
        "quantized",
        "q-drift",
        "exact-drift",
    ]
    for arm in found["arms"]:
        for measure in (
            "frechet_full_precision",
            "frechet_reference",
            "alignment",
            "psnr",
            "ssim",
            "seconds_per_image",
        ):
            assert set(arm[measure]) == {"value", "stderr", "low", "high", "n"}
    assert json.loads((tmp_path / "results.json").read_text()) == found
    assert "<html" in (tmp_path / "report.html").read_text()
    # Again: the images are there, so it only measures, and finds the same.
    code, again, _ = run(capsys, *arguments, "--out", tmp_path, "--json")
    assert json.loads(again)["arms"] == found["arms"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "missing.safetensors"], "is not a file"),
        (
            ["calibrate", "no/such/pipeline", "--quantized", "w4a8", "--steps", "2"],
            "not a pipeline",
        ),
        (["calibrate", "zoo:nonsense", "--quantized", "w4a8"], "no twin called"),
        (["calibrate", "zoo:pixart-sigma", "--quantized", "w99"], "w99"),
        (["calibrate", *SAMPLING, "--prompts", "no-such-file.txt"], "cannot be read"),
        (["calibrate", *SAMPLING, "--call", "colour=red"], "colour"),
        (["sample", *SAMPLING, "--correction", "q-drift", "--out", "x"], "belong together"),
        (["compare", *SAMPLING], "needs --record"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_mistakes_get_a_message_and_exit_code_1(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert code == 1
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_a_foreign_file_is_not_a_record(capsys, tmp_path):
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(b"not a record at all")
    code, _, err = run(capsys, "inspect", path)
    assert code == 1
    assert "foreign.safetensors" in err


def test_unknown_correction(capsys, record):
    code, _, err = run(capsys, "compare", *SAMPLING, "--record", record, "--corrections", "magic")
    assert code == 1
    assert "q-drift" in err


def test_record_of_other_steps_is_interpolated_or_refused(capsys, record, tmp_path):
    other = [*SAMPLING[:3], "--steps", "12"]
    arguments = ["sample", *other, "--record", record, "--correction", "q-drift", "--images", "1"]
    code, _, err = run(capsys, *arguments, "--out", tmp_path)
    assert code == 1
    assert "outside the calibrated noise levels" in err
    code, _, _ = run(capsys, *arguments, "--out", tmp_path, "--allow", "range")
    assert code == 0
