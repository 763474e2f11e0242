"""Model cards: measured, complete, and refused where something is missing."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

from evenkeel import zoo
from evenkeel.errors import EvenkeelError
from evenkeel.zoo.folders import saved_dtypes
from evenkeel.zoo.making.card import card, fewer_shades, parameters, training_of, write_card
from evenkeel.zoo.making.quality import Judge, measure
from evenkeel.zoo.pictures import KINDS


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The embedded twin in a folder of its own, where its card may be written again."""
    folder = tmp_path / "pixart-sigma"
    shutil.copytree(zoo.path_of("pixart-sigma"), folder)
    for name in ("README.md", "quality.json", "samples.png"):
        (folder / name).unlink()
    monkeypatch.setenv("EVENKEEL_ZOO", str(tmp_path))
    return folder


def test_fewer_shades_are_never_far_away():
    shades = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    picture = Image.fromarray(torch.stack([shades] * 3, -1).numpy())
    found = torch.frombuffer(bytearray(fewer_shades(picture).tobytes()), dtype=torch.uint8)
    assert int((found.reshape(16, 16, 3)[..., 0].int() - shades.int()).abs().max()) <= 3
    assert len(found.unique()) <= 64


def test_every_twin_says_how_it_differs():
    assert all(twin.differences for twin in zoo.TWINS.values())


@pytest.mark.parametrize("name", list(zoo.TWINS))
def test_the_card_in_the_zoo_is_what_its_measurements_say(name):
    twin, folder = zoo.twin(name), zoo.path_of(name)
    quality = json.loads((folder / "quality.json").read_text())
    text = card(
        twin, parameters(zoo.load(name)), saved_dtypes(folder), training_of(folder), quality
    )
    assert (folder / "README.md").read_text() == text
    assert quality["images"] >= 400
    assert list(quality["samplers"]) == list(twin.schedulers)[1:]


@pytest.mark.parametrize("name", list(zoo.TWINS))
def test_a_twin_draws_what_can_be_recognised(name):
    quality = json.loads((zoo.path_of(name) / "quality.json").read_text())
    if KINDS[zoo.twin(name).pictures].attributes:
        shown = quality["shown_by_samples"]
        things = [v["value"] for k, v in shown.items() if k.endswith(("digit", "object"))]
        assert things and min(things) > 0.9
    else:
        assert quality["recognisable_samples"]["value"] > 0.8


@pytest.mark.slow
def test_a_card_says_what_was_measured(copied):
    training = {"recipe": {"steps": 10, "learning_rate": 1e-3, "seed": 5}, "last": {"seconds": 90}}
    told = {
        "command": "train it",
        "machine": "a machine",
        "torch": "2",
        "networks": {"n": training},
    }
    (copied / "training.json").write_text(json.dumps(told))
    text = write_card("pixart-sigma", 100).read_text()
    quality = json.loads((copied / "quality.json").read_text())
    assert quality["shown_by_samples"]["digit"]["value"] > 0.8
    assert quality["shown_by_held_out_scans"]["digit"]["value"] > 0.95
    nearest = quality["frechet_held_out_to_held_out"]["value"]
    assert 0 < nearest < quality["frechet_samples_to_held_out"]["value"]
    assert quality["first_prompts"] == KINDS["captions"].prompts(100, 31)[:60]
    with Image.open(copied / "samples.png") as picture:
        assert picture.size == (640, 384)
    count = sum(p.numel() for p in zoo.load("pixart-sigma").transformer.parameters())
    for part in (f"{count:,}", "train it", "| n | 10 | 0.001 | 5 | 1.5 |", "F32", "20 steps"):
        assert part in text, part
    for line in zoo.twin("pixart-sigma").differences:
        assert line in text
    assert text.splitlines()[0] == "# pixart-sigma: a twin of PixArt-Sigma"


def test_a_card_needs_what_training_noted(copied):
    for content in ("[]", "{}", "{"):
        (copied / "training.json").write_text(content)
        with pytest.raises(EvenkeelError, match=r"training\.json"):
            training_of(copied)
    (copied / "training.json").unlink()
    with pytest.raises(EvenkeelError, match=r"evenkeel\.zoo\.making\.train"):
        write_card("pixart-sigma", 100)
    assert not (copied / "README.md").exists()


def test_too_few_images_are_refused():
    with pytest.raises(EvenkeelError, match="at least 100"):
        measure(zoo.twin("pixart-sigma"), 99)


def estimate(value):
    return {"value": value, "stderr": 0.01, "low": value - 0.02, "high": value + 0.02, "n": 100}


def test_an_unconditional_card_speaks_of_recognisable_samples():
    quality = {
        "command": "measure it",
        "images": 100,
        "recognisable_samples": estimate(0.8),
        "recognisable_held_out_scans": estimate(0.95),
        "frechet_samples_to_held_out": estimate(3.0),
        "frechet_held_out_to_held_out": estimate(2.0),
        "frechet_training_to_held_out": estimate(2.5),
        "seconds_per_image_and_step": estimate(0.01)
        | {"fastest": 0.01, "slowest": 0.02, "batch": 50},
        "samplers": {"ddpm": {"alignment": estimate(0.7)}},
        "first_prompts": ["0", "1"],
    }
    training = {"command": "train it", "machine": "a machine", "torch": "2"}
    text = card(zoo.twin("ddim-cifar"), {"unet": ("UNet2DModel", 5)}, ["F16"], training, quality)
    assert "| recognisable | 80.0 ± 1.0 % | 95.0 ± 1.0 % |" in text
    assert "share of recognisable samples (100 images): ddpm 70.0 ± 1.0 %." in text
    assert "no guidance" in text and "Asked for" not in text


def test_a_distilled_twin_is_measured_beside_its_teacher(tmp_path):
    # The embedded twin as its own teacher: with as many steps both show the same.
    student = replace(zoo.twin("pixart-sigma"), teacher="pixart-sigma", num_inference_steps=3)
    quality, _ = measure(student, 100, tmp_path)
    rows = quality["few_steps"]
    assert [row["steps"] for row in rows] == [3, 2, 1]
    for row in rows:
        assert row["student"] == row["teacher"]
        assert row["student"]["settings"]["num_inference_steps"] == row["steps"]
    assert rows[0]["student"]["frechet_to_held_out"] == quality["frechet_samples_to_held_out"]
    assert rows[0]["student"]["alignment"]["value"] > rows[2]["student"]["alignment"]["value"]
    assert measure(student, 100, tmp_path)[0] == quality  # from what was kept, timings included
    training = {"command": "train it", "machine": "a machine", "torch": "2"}
    text = card(student, {}, ["F32"], training, quality)
    assert "**Distilled from pixart-sigma.**" in text
    table = [line.split(" | ") for line in text.splitlines() if line.startswith(("| 3 |", "| 1 |"))]
    assert len(table) == 2
    assert all(row[1] == row[2] for row in table)


def test_noise_is_not_recognisable():
    kind = KINDS["unconditional"]
    folder, prompts = zoo.path_of("pixart-sigma"), list(range(200))
    judge = Judge(kind, folder, kind.references(prompts, 1))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (200, 3, 32, 32), generator=generator, dtype=torch.uint8)
    assert judge.alignment(noise, prompts)["value"] < 0.3
    assert judge.alignment(kind.references(prompts, 2), prompts)["value"] > 0.9


def test_dtypes_and_parameters_are_read_off_a_folder():
    assert saved_dtypes(zoo.path_of("pixart-sigma")) == ["F32"]
    found = parameters(zoo.load("pixart-sigma"))
    assert found["transformer"][0] == "PixArtTransformer2DModel"
    assert set(found) == {"text_encoder", "vae", "transformer"}
