"""What twins share lies once; a twin's folder is complete when it is used, in any copy of the zoo."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evenkeel import zoo
from evenkeel.errors import EvenkeelError, StorageError
from evenkeel.zoo.folders import bytes_in
from evenkeel.zoo.making.sharing import share
from evenkeel.zoo.parts import PARTS_FILE, TWIN_FILE, complete, files_of, parts_of

ZOO = Path(__file__).parents[2] / "zoo"
SHARING = sorted(p.parent.name for p in ZOO.glob(f"*/{PARTS_FILE}"))


@pytest.fixture
def copied(tmp_path):
    """Two twins and what they share, as a checkout has them: nothing laid in yet."""
    shutil.copytree(ZOO / "shared", tmp_path / "shared")
    for name in ("sd-v1.4", "sdxl"):
        parts = json.loads((ZOO / name / PARTS_FILE).read_text())
        shutil.copytree(ZOO / name, tmp_path / name, ignore=shutil.ignore_patterns(*parts))
        assert not any((tmp_path / name / part).exists() for part in parts)
    return tmp_path


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_copied_twin_is_completed_and_loads_without_evenkeel(copied, monkeypatch):
    monkeypatch.setenv("EVENKEEL_ZOO", str(copied))
    folder = zoo.path_of("sd-v1.4")
    assert folder == copied / "sd-v1.4"
    assert content(folder) == {k: v.read_bytes() for k, v in files_of(ZOO / "sd-v1.4").items()}
    code = (
        "import sys; from diffusers import DiffusionPipeline as P;"
        "p = P.from_pretrained(sys.argv[1], local_files_only=True);"
        "print(type(p).__name__, p.vae.config.latent_channels, 'evenkeel' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(folder)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["StableDiffusionPipeline", "4", "False"]


def test_the_size_is_that_of_the_complete_twin_before_and_after(copied):
    folder = copied / "sdxl"
    before = bytes_in(folder)
    complete(folder)
    assert bytes_in(folder) == before == sum(map(len, content(folder).values()))


def test_what_was_damaged_is_laid_in_again_and_the_rest_is_not_written(copied):
    folder = complete(copied / "sd-v1.4")
    whole, config = content(folder), folder / "vae" / "config.json"
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0\0")
    written = config.stat().st_mtime_ns
    assert content(complete(folder)) == whole
    assert config.stat().st_mtime_ns == written


def test_sharing_undoes_completing(copied):
    folder = copied / "sdxl"
    bare, parts = content(folder), json.loads((folder / PARTS_FILE).read_text())
    complete(folder)
    (folder / PARTS_FILE).unlink()
    (folder / ".gitignore").unlink()
    assert share(folder) == parts
    assert content(folder) == bare
    complete(folder)
    (folder / "vae" / "config.json").write_text("{}")  # no longer the shared one
    assert set(share(folder)) == set(parts) - {"vae"}
    assert (folder / "vae" / "config.json").read_text() == "{}"


def test_what_is_made_from_another_file_is_the_same_to_the_bit(tmp_path):
    shutil.copytree(complete(ZOO / "dit-xl"), tmp_path / "dit-xl")
    folder = tmp_path / "dit-xl"
    whole, parts = content(folder), parts_of(folder)
    assert {part.made for part in parts.values()} == {None, "halved", "unpacked"}
    for name in parts:
        (folder / name).unlink()
    packed = (folder / "transformer.xz").stat().st_size
    assert packed < 0.8 * len(whole[Path("transformer/diffusion_pytorch_model.safetensors")])
    assert content(complete(folder)) == whole
    (folder / PARTS_FILE).unlink()
    (folder / "transformer.xz").unlink()
    assert set(share(folder)) == set(parts)
    assert content(complete(folder)) == whole


def test_a_missing_part_says_where_it_was_looked_for(copied):
    shutil.rmtree(copied / "shared" / "kl-4")
    with pytest.raises(EvenkeelError, match=r"shared/kl-4.*sd-v1\.4.*from the repository"):
        complete(copied / "sd-v1.4")
    for text in ("[]", "{", '{"vae": 3}', '{"vae": {"guessed": "shared/kl-16"}}'):
        (copied / "sd-v1.4" / PARTS_FILE).write_text(text)
        with pytest.raises(EvenkeelError, match=r"parts\.json is not of the form"):
            parts_of(copied / "sd-v1.4")


def test_a_folder_that_cannot_be_written_says_what_to_do(copied, monkeypatch):
    def refuse(path, content):
        raise PermissionError("read-only")

    monkeypatch.setattr("evenkeel.zoo.parts.write_atomically", refuse)
    with pytest.raises(EvenkeelError, match=r"read-only.*EVENKEEL_ZOO"):
        complete(copied / "sdxl")


@pytest.mark.parametrize("name", SHARING)
def test_what_is_laid_in_is_not_tracked(name):
    ignored = (ZOO / name / ".gitignore").read_text().split()
    assert [line.strip("/") for line in ignored] == list(parts_of(ZOO / name))


def test_the_package_alone_says_where_the_other_twins_are(monkeypatch):
    monkeypatch.setattr(zoo, "places_of", lambda name: [Path("nowhere") / name])
    with pytest.raises(EvenkeelError, match=r"carries pixart-sigma alone.*zoo/.*EVENKEEL_ZOO"):
        zoo.path_of("sana")


def test_a_twin_whose_files_are_not_those_that_were_measured_is_refused(copied, monkeypatch):
    monkeypatch.setenv("EVENKEEL_ZOO", str(copied))
    folder = zoo.path_of("sdxl")
    config = folder / "unet" / "config.json"
    kept = config.read_bytes()
    config.write_bytes(kept.replace(b"EulerDiscrete", b"Other") + b" ")
    with pytest.raises(StorageError, match=r"unet.config\.json was changed"):
        zoo.path_of("sdxl")
    config.unlink()
    with pytest.raises(StorageError, match=r"unet/config\.json is missing or foreign"):
        zoo.path_of("sdxl")
    config.write_bytes(kept)
    assert zoo.path_of("sdxl") == folder
    named = json.loads((folder / TWIN_FILE).read_text())
    (folder / TWIN_FILE).write_text(json.dumps(named | {"pictures": "captions"}))
    with pytest.raises(StorageError, match="changed after it was written"):
        zoo.path_of("sdxl")
