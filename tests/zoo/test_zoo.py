"""The embedded pipeline: its data, its grammar, its training loop, and how good its samples are."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from evenkeel import zoo
from evenkeel.cli.demo import demo
from evenkeel.comparing.generation import Arm, generate
from evenkeel.errors import EvenkeelError, MissingExtra, StorageError
from evenkeel.hosts.run import Run
from evenkeel.zoo.captions import read_caption, sample_mentions, vocabulary, write_caption
from evenkeel.zoo.evaluation import HandwritingEvaluator, reference_images, sample_prompts
from evenkeel.zoo.handwriting import ATTRIBUTES, load_scans, sample_attributes, sample_pictures
from evenkeel.zoo.making import train
from evenkeel.zoo.making.loop import Recipe, fit


def test_scans_are_split_once_and_disjoint():
    training, held_out = load_scans(False), load_scans(True)
    assert len(training.images) + len(held_out.images) == 1797
    seen = {i.numpy().tobytes() for i in training.images}
    shared = sum(i.numpy().tobytes() in seen for i in held_out.images)
    assert shared == 0
    assert set(held_out.labels.tolist()) == set(range(10))


def test_pictures_are_deterministic_and_in_range():
    a, attributes = sample_pictures(16, np.random.default_rng(3))
    b, _ = sample_pictures(16, np.random.default_rng(3))
    c, _ = sample_pictures(16, np.random.default_rng(4))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.shape == (16, 3, 32, 32)
    assert a.min() >= 0
    assert a.max() <= 1
    assert (attributes["colour"] != attributes["background"]).all()


@pytest.mark.parametrize("seed", range(5))
def test_captions_are_read_back(seed):
    rng = np.random.default_rng(seed)
    attributes = sample_attributes(200, rng)
    for i in range(200):
        mentioned = sample_mentions({k: int(v[i]) for k, v in attributes.items()}, rng, keep=0.6)
        caption = write_caption(mentioned, rng)
        assert read_caption(caption) == mentioned, caption
        assert set(caption.split()) <= set(vocabulary())


def test_reference_images_show_the_prompts():
    prompts = sample_prompts(400, seed=11)
    evaluator = HandwritingEvaluator(zoo.path_of("pixart-sigma"))
    matches = evaluator.matches(reference_images(prompts, 11).float() / 255, prompts)
    # The evaluator never saw these scans; its held-out accuracy bounds what can be reached.
    assert matches[:, 0].nanmean() > 0.95
    assert matches[:, 1].nanmean() > 0.98


def test_embedded_pipeline_is_a_plain_small_diffusers_folder():
    folder = zoo.path_of("pixart-sigma")
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert size <= 16e6
    assert (
        json.loads((folder / "model_index.json").read_text())["_class_name"]
        == "PixArtSigmaPipeline"
    )
    assert not list(folder.rglob("*.bin"))
    parameters = sum(p.numel() for p in zoo.load("pixart-sigma").transformer.parameters())
    assert 1e6 <= parameters <= 3e6


def test_full_precision_samples_are_recognisable():
    pipe = zoo.load("pixart-sigma")
    twin = zoo.twin("pixart-sigma")
    prompts = sample_prompts(200, seed=21)
    run = Run(
        pipe,
        prompts,
        twin.num_inference_steps,
        guidance_scale=twin.guidance_scale,
        seed=21,
        batch_size=50,
    )
    arm = Arm("full-precision", pipe.transformer)
    images, _ = generate(run, arm)
    evaluator = HandwritingEvaluator(zoo.path_of("pixart-sigma"))
    matches = evaluator.matches(images.float() / 255, prompts)
    shown = dict(zip(ATTRIBUTES, matches.nanmean(0).tolist(), strict=True))
    # 90 % and 95 % are the goals; n = 200, so five standard errors below them can never pass by luck.
    assert shown["digit"] > 0.90 - 5 * (0.9 * 0.1 / 200) ** 0.5, shown
    assert shown["colour"] > 0.95 - 5 * (0.95 * 0.05 / 200) ** 0.5, shown


def test_who_uses_a_twin_imports_nothing_that_makes_one():
    house = Path(zoo.__file__).parent.parent
    users = [p for p in house.rglob("*.py") if house / "zoo" / "making" not in p.parents]
    found = [p for p in users if re.search(r"(from|import) evenkeel\.zoo\.making", p.read_text())]
    assert users and found == []


def test_scans_need_the_extra_and_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # importing it raises
    load_scans.cache_clear()
    try:
        assert sample_prompts(3, 0) and HandwritingEvaluator(zoo.path_of("pixart-sigma"))
        with pytest.raises(MissingExtra, match=r"pip install 'evenkeel\[zoo\]'"):
            reference_images(sample_prompts(3, 0), 0)
    finally:
        load_scans.cache_clear()


def test_the_demo_says_before_anything_else_that_scans_are_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setattr("evenkeel.cli.demo.zoo.load", lambda name: pytest.fail("too late"))
    load_scans.cache_clear()
    try:
        with pytest.raises(MissingExtra, match=r"pip install 'evenkeel\[zoo\]'"):
            demo(images=2, calibration_prompts=2, quantizer="w4a4", out=tmp_path, progress=False)
    finally:
        load_scans.cache_clear()
    assert not list(tmp_path.iterdir())


WITHOUT_EXTRAS = """
import sys
sys.modules["sklearn"] = sys.modules["matplotlib"] = None  # importing either raises
import evenkeel
from diffusers import DiffusionPipeline
from evenkeel.comparing.comparison import Arm
from evenkeel.corrections import QDrift
from evenkeel.quantizers import QuantizerSpec, quantize_module
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], local_files_only=True)
quantized, _ = quantize_module(pipeline.transformer, QuantizerSpec.parse("w4a4"))
asked = {"prompts": ["a red seven", "a blue two"], "num_inference_steps": 3, "guidance_scale": 4.5}
record = evenkeel.calibrate(pipeline, quantized=quantized, progress=False, **asked)
evenkeel.fit_readout(pipeline, quantized=quantized, progress=False, **asked)
arms = [Arm("full-precision", pipeline.transformer), Arm("quantized", quantized)]
found = evenkeel.compare(pipeline, arms, progress=False, **asked)
pipeline.transformer = quantized
evenkeel.apply(pipeline, QDrift(record.evidence), guidance_scale=4.5)
loaded = {"sklearn", "matplotlib"} & {n.split(".")[0] for n, m in sys.modules.items() if m}
print(len(found.arms), sorted(loaded))
"""


def test_other_peoples_pipelines_need_no_extra():
    command = [sys.executable, "-c", WITHOUT_EXTRAS, str(zoo.path_of("pixart-sigma"))]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert out.stdout.split("\n")[-2] == "2 []"


def test_unknown_twin():
    with pytest.raises(EvenkeelError, match="pixart-sigma"):
        zoo.twin("nonsense")


def loss_of(network, rng):
    x = torch.from_numpy(rng.standard_normal((8, 4)).astype(np.float32))
    return (network(x) - x.sum(1, keepdim=True)).pow(2).mean()


def linear():
    torch.manual_seed(0)
    return nn.Linear(4, 1)


def _losses(path):
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


class Killed(Exception):
    pass


def test_training_resumes_where_it_was_killed(tmp_path):
    recipe = Recipe(steps=60, learning_rate=1e-2, seed=1, warmup=5, save_every=20)
    whole = fit(linear(), loss_of, recipe, tmp_path / "whole")

    calls = []

    def dies(network, rng):
        calls.append(1)
        if len(calls) == 57:  # after step 50 was logged, before it was saved
            raise Killed
        return loss_of(network, rng)

    with pytest.raises(Killed):
        fit(linear(), dies, recipe, tmp_path / "killed")
    resumed = fit(linear(), loss_of, recipe, tmp_path / "killed")
    assert torch.equal(resumed.weight, whole.weight)
    assert torch.equal(resumed.bias, whole.bias)
    for folder in ("whole", "killed"):
        lines = (tmp_path / folder / "loss.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [50, 60]
    assert not list(tmp_path.rglob("step-*"))
    fit(linear(), loss_of, recipe, tmp_path / "kept", keep=(20, 60))
    kept = {p.name: load_file(p) for p in (tmp_path / "kept").glob("step-*")}
    assert set(kept) == {"step-20.safetensors", "step-60.safetensors"}
    assert torch.equal(kept["step-60.safetensors"]["weight"], whole.weight)
    assert not torch.equal(kept["step-20.safetensors"]["weight"], whole.weight)
    curves = [_losses(tmp_path / folder / "loss.jsonl") for folder in ("whole", "killed")]
    assert curves[0] == curves[1]
    with pytest.raises(StorageError, match="another recipe, which differs in learning_rate"):
        fit(linear(), loss_of, Recipe(steps=10, learning_rate=1.0, seed=1), tmp_path / "killed")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "is kept in work; the same command continues"),
        (StorageError("work/state is damaged"), 1, "work/state is damaged"),
    ],
)
def test_training_ends_with_a_line_and_a_code(error, code, said, monkeypatch, capsys):
    def stops(name, work):
        raise error

    monkeypatch.setattr(train, "train", stops)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert train.main(["ldm-8", "--work", "work"]) == code
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert said in capsys.readouterr().err
