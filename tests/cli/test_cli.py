"""The command line: light help, JSON for programs, plain messages and exit codes for mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from evenkeel.cli import main
from evenkeel.corrections.catalogue import ALL, FILE, root_of
from evenkeel.zoo import TWINS
from evenkeel.zoo.folders import described
from evenkeel.zoo.parts import sign

SAMPLING = ["zoo:pixart-sigma", "--quantized", "w3a4-g32-r16", "--steps", "3", "--batch-size", "4"]

OF_A_RECORD = {name for name in ALL if root_of(name) != FILE}


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    path = tmp_path_factory.mktemp("record") / "r.safetensors"
    arguments = ["calibrate", *SAMPLING, "--count", "4", "--check", "0", "--out", str(path)]
    assert main([*arguments, "--json"]) == 0
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
                "plan",
                "quantize",
                "calibrate",
                "readout",
                "refit",
                "fold",
                "inspect",
                "recommend",
                "reproduce",
                "sample",
                "compare",
                "zoo",
            )
        ),
        *(["zoo", n] for n in ("list", "card", "path")),
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


@pytest.mark.parametrize("action", [["list"], ["card", "pixart-sigma"], ["path", "pixart-sigma"]])
def test_what_only_reads_the_zoo_waits_for_nothing_heavy(action):
    for twin in TWINS.values():  # parts that are made from others are there from the first call on
        described(twin)
    code = f"import sys; from evenkeel.cli import main; main(['zoo', *{action}])"
    modules = "print(sorted({'torch', 'diffusers', 'numpy'} & set(sys.modules)))"
    command = [sys.executable, "-c", f"{code}; {modules}"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "pixart-sigma" in out and out.endswith("\n[]\n")


def test_demo_begins_with_how_long_it_takes():
    code = "import sys; sys.modules['torch'] = None; from evenkeel.cli import main; main(['demo'])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "torch" in ran.stderr  # the line came before anything was imported
    assert ran.stdout.splitlines() == [
        "This takes about 3 minutes and a processor core. Nothing is downloaded."
    ]


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
    code, out, _ = run(capsys, "recommend", record, "--json")
    assert code == 0
    assert {"features", "nearest", "recommended", "expected"} == set(json.loads(out))


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
    names = [a["name"] for a in found["arms"]]
    # Every correction is an arm, or says why it is not; two are measured in closed loop.
    assert names[:2] == ["full-precision", "quantized"]
    assert {*names[2:], *found["not_applicable"]} == OF_A_RECORD
    assert {"q-drift", "ptqd", "dcnc+dns", "covariance-drift"} <= set(names)
    assert {"tac", "tac-ibc", "stepbaq", "qncd", "tcec-window-1"} == set(found["not_applicable"])
    assert "--closed-loop" in found["not_applicable"]["tac"]
    for arm in found["arms"]:
        for measure in (
            "frechet_full_precision",
            "frechet_reference",
            "alignment",
            "psnr",
            "ssim",
            "seconds_per_image",
        ):
            assert set(arm[measure]) - {"not_finite"} == {"value", "stderr", "low", "high", "n"}
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
        (["sample", *SAMPLING, "--scheduler", "nope", "--out", "x"], "expected dpm-solver++, ddim"),
        (
            ["sample", *SAMPLING, "--scheduler", "FlowMatchEulerDiscreteScheduler", "--out", "x"],
            "is for flow matching",
        ),
        (["zoo", "card", "nonsense"], "no twin called"),
        (["zoo", "path", "nonsense"], "no twin called"),
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


@pytest.fixture(scope="module")
def readout(tmp_path_factory):
    path = tmp_path_factory.mktemp("readout") / "ro.safetensors"
    assert main(["readout", *SAMPLING, "--count", "4", "--out", str(path), "--json"]) == 0
    return path


def test_readout_says_what_it_found(capsys, readout):
    code, out, _ = run(capsys, "inspect", readout)
    assert code == 0 and "per-step readout of proj_out" in out
    code, out, _ = run(capsys, "inspect", readout, "--json")
    found = json.loads(out)
    assert code == 0
    assert [s["step"] for s in found["steps"]] == [0, 1, 2]
    assert found["head"] == "proj_out" and found["form"] == "per-step"


def test_compare_takes_a_record_and_a_readout(capsys, record, readout, tmp_path):
    asked = ["q-drift", "exact-drift", "readout", "readout+drift"]
    arguments = ["compare", *SAMPLING, "--record", record, "--record", readout, "--images", "8"]
    arguments += ["--corrections", ",".join(asked)]
    code, out, _ = run(capsys, *arguments, "--out", tmp_path, "--json")
    names = [arm["name"] for arm in json.loads(out)["arms"]]
    assert code == 0
    assert names[2:] == asked


def test_a_shared_readout_is_folded_and_the_folder_is_a_denoiser(capsys, tmp_path):
    file, folder = tmp_path / "shared.safetensors", tmp_path / "folded"
    fit = ["readout", *SAMPLING, "--count", "4", "--form", "shared", "--out", file, "--json"]
    assert run(capsys, *fit)[0] == 0
    fold = ["fold", "zoo:pixart-sigma", "--quantized", "w3a4-g32-r16", "--record", file]
    assert run(capsys, *fold, "--out", folder)[0] == 0
    sample = ["sample", "zoo:pixart-sigma", "--quantized", folder, "--steps", "2", "--images", "1"]
    assert run(capsys, *sample, "--out", tmp_path / "images")[0] == 0
    code, _, err = run(capsys, *fold[:3], "w4a4-g32-r16", *fold[4:], "--out", tmp_path / "other")
    assert code == 1 and "another quantized denoiser" in err


def test_a_readout_per_step_cannot_be_folded(capsys, readout, tmp_path):
    fold = ["fold", "zoo:pixart-sigma", "--quantized", "w3a4-g32-r16", "--record", readout]
    code, _, err = run(capsys, *fold, "--out", tmp_path / "folded")
    assert code == 1 and "form='shared'" in err and not (tmp_path / "folded").exists()


def test_refit_writes_a_denoiser_that_the_other_commands_take(capsys, record, tmp_path):
    folder = tmp_path / "refitted"
    code, out, _ = run(capsys, "refit", *SAMPLING, "--count", "4", "--out", folder, "--json")
    found = json.loads(out)
    assert code == 0 and found["prompts"] == 4 and any(x["changed"] for x in found["layers"])
    again = ["readout", "zoo:pixart-sigma", "--quantized", folder, "--steps", "2", "--count", "4"]
    assert run(capsys, *again, "--out", tmp_path / "ro.safetensors", "--json")[0] == 0
    sample = ["sample", "zoo:pixart-sigma", "--quantized", folder, "--steps", "3", "--images", "1"]
    use = ["--record", record, "--correction", "q-drift", "--out", tmp_path / "images"]
    code, _, err = run(capsys, *sample, *use)
    assert code == 1 and "is not the one the record was made for" in err


def test_corrections_need_their_files(capsys, record, readout, tmp_path):
    sample = ["sample", *SAMPLING, "--images", "1", "--out", tmp_path]
    code, _, err = run(capsys, *sample, "--record", record, "--correction", "readout")
    assert code == 1 and "made by evenkeel readout" in err
    code, _, err = run(capsys, *sample, "--record", readout, "--correction", "q-drift")
    assert code == 1 and "made by evenkeel calibrate" in err
    both = ["--record", record, "--record", record]
    code, _, err = run(capsys, *sample, *both, "--correction", "q-drift")
    assert code == 1 and "once per kind" in err


def test_calibrate_ends_with_verdicts_and_keeps_what_was_fitted_in_closed_loop(capsys, tmp_path):
    path = tmp_path / "r.safetensors"
    arguments = ["calibrate", *SAMPLING, "--count", "4", "--closed-loop", "--check", "4"]
    code, out, _ = run(capsys, *arguments, "--out", path, "--json")
    check = json.loads(out)["check"]
    assert code == 0
    assert {a["name"] for a in check["arms"]} | set(check["not_applicable"]) == OF_A_RECORD
    assert {"tac", "tac-ibc", "stepbaq"} <= {a["name"] for a in check["arms"]}
    verdicts = {"expected to help", "neutral", "expected to hurt"}
    assert {a["verdict"] for a in check["arms"]} <= verdicts
    sample = ["sample", *SAMPLING, "--record", path, "--correction", "tac", "--images", "2"]
    assert run(capsys, *sample, "--out", tmp_path / "images")[0] == 0
    code, out, _ = run(capsys, *arguments[:-2], "--check", "4", "--out", path)
    assert code == 0 and "Prediction from 4 prompts" in out and "qncd: no refresh" in out


def test_quantize_writes_a_folder_that_the_other_commands_take(tmp_path, capsys):
    folder = tmp_path / "quantized"
    asked = ["zoo:pixart-sigma", "--method", "rtn", "--bits", "w4a8", "--set", "rounding=gptq"]
    few = ["--count", "2", "--steps", "3", "--calibration-steps", "2"]
    code, out, _ = run(capsys, "quantize", *asked, *few, "--out", folder, "--json")
    found = json.loads(out)
    assert (code, found["quantized"]) == (0, str(folder))
    assert found["spec"]["rounding"] == "gptq"
    kept = {layer["name"]: layer["reason"] for layer in found["layers"] if layer["reason"]}
    assert kept["proj_out"] == "skip pattern 'proj_out'"
    record = tmp_path / "r.safetensors"
    code, out, _ = run(
        capsys,
        *("calibrate", "zoo:pixart-sigma", "--quantized", folder, "--steps", "3", "--count", "2"),
        *("--check", "0", "--out", record, "--json"),
    )
    assert code == 0
    assert json.loads(out)["quantizer"] == "rtn-w4a8-rounding=gptq"


def test_quantize_to_a_budget_writes_a_folder_that_the_other_commands_take(tmp_path, capsys):
    folder, few = tmp_path / "quantized", ["--count", "2", "--steps", "2"]
    asked = ["zoo:pixart-sigma", "--budget", "4.5bits", "--set", 'only=["transformer_blocks.7*"]']
    code, out, _ = run(capsys, "quantize", *asked, *few, "--out", folder, "--json")
    found = json.loads(out)
    assert (code, found["quantized"], found["bits"]) == (0, str(folder), 4.5)
    assert sum(layer["bytes"] for layer in found["layers"]) <= found["budget"]
    assert (folder / "bits.json").exists()
    assert 0 < found["bit_operations"]["quantized"] < found["bit_operations"]["full_precision"]
    sample = ["sample", "zoo:pixart-sigma", "--quantized", folder, "--steps", "2", "--images", "1"]
    assert run(capsys, *sample, "--out", tmp_path / "images")[0] == 0


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (["--budget", "4.5bits", "--bits", "w4a8"], "leave --bits out"),
        (["--budget", "4.5bits", "--layout", "magic"], "no layout called 'magic'"),
        (["--method", "rtn", "--layout", "gguf"], "goes with --budget"),
        (["--method", "magic"], "no method called 'magic'"),
        (["--method", "rtn", "--bits", "4"], "for example w4a8"),
        (["--method", "rtn", "--set", "rank"], "expected NAME=VALUE"),
        (["--method", "rtn", "--set", "ranks=3"], "rtn has no option ranks"),
    ],
)
def test_mistakes_in_quantize_get_one_line(asked, says, tmp_path, capsys):
    code, _, err = run(capsys, "quantize", "zoo:pixart-sigma", *asked, "--out", tmp_path)
    assert code == 1
    assert says in err and "Traceback" not in err


def test_zoo_lists_all_twins_here_or_not(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("EVENKEEL_ZOO", str(tmp_path))
    code, out, _ = run(capsys, "zoo", "list", "--json")
    found = {t["name"]: t for t in json.loads(out)["twins"]}
    assert code == 0 and list(found) == list(TWINS)
    embedded = found["pixart-sigma"]
    assert (
        embedded["class"] == "PixArtSigmaPipeline" and embedded["schedulers"][0] == "dpm-solver++"
    )
    assert 1e6 < embedded["denoiser_weights"] < 3e6 and 1e6 < embedded["bytes"] < 16e6
    code, out, _ = run(capsys, "zoo", "list")
    assert code == 0 and all(name in out for name in TWINS)


def test_zoo_path_and_card(capsys, monkeypatch, tmp_path):
    code, out, _ = run(capsys, "zoo", "path", "pixart-sigma")
    assert code == 0 and (Path(out.strip()) / "model_index.json").is_file()
    code, out, _ = run(capsys, "zoo", "card", "pixart-sigma")
    assert code == 0 and out.startswith("# pixart-sigma")
    code, out, _ = run(capsys, "zoo", "card", "pixart-sigma", "--json")
    assert json.loads(out)["quality"]["images"] == 1000
    # The folder that the variable names comes first; one without a card says what writes it.
    (tmp_path / "sana").mkdir()
    (tmp_path / "sana" / "model_index.json").write_text("{}")
    sign(tmp_path / "sana", "sana", "scenes")
    monkeypatch.setenv("EVENKEEL_ZOO", str(tmp_path))
    assert run(capsys, "zoo", "path", "sana")[1].strip() == str(tmp_path / "sana")
    code, _, err = run(capsys, "zoo", "card", "sana")
    assert code == 1 and "evenkeel.zoo.making.card sana" in err


def test_another_scheduler_makes_other_pictures_and_needs_its_own_record(capsys, record, tmp_path):
    sample = ["sample", *SAMPLING, "--images", "1", "--json"]
    for name in ("dpm-solver++", "ddim"):
        assert run(capsys, *sample, "--scheduler", name, "--out", tmp_path / name)[0] == 0
    assert run(capsys, *sample, "--out", tmp_path / "own")[0] == 0
    own, same, other = (
        (tmp_path / name / "00000.png").read_bytes() for name in ("own", "dpm-solver++", "ddim")
    )
    assert own == same != other
    use = ["--record", record, "--correction", "q-drift", "--scheduler", "DDIMScheduler"]
    code, _, err = run(capsys, *sample, *use, "--out", tmp_path / "refused")
    assert code == 1 and "DDIMScheduler" in err
