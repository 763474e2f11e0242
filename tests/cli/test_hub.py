"""push and pull against a hub that is a folder: what is asked of huggingface_hub, and what it answers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub as hub
import pytest
import synthetic_record
import torch
from diffusers import DiTTransformer2DModel
from huggingface_hub import errors
from torch import nn

import evenkeel
from evenkeel.cli import main
from evenkeel.errors import StorageError
from evenkeel.quantizers import QuantizerSpec, quantize_module, save_quantized
from evenkeel.storage.hub import is_hub_id, local


class Hub:
    """Repositories as folders; None of them exists before ``create_repo``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.private: dict[str, bool] = {}

    def create_repo(self, repo_id: str, *, exist_ok: bool, private: bool) -> None:
        assert exist_ok
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        self.private[repo_id] = private

    def upload_file(self, *, path_or_fileobj: Any, path_in_repo: str, repo_id: str) -> None:
        data = (
            path_or_fileobj if isinstance(path_or_fileobj, bytes) else path_or_fileobj.read_bytes()
        )
        (self.root / repo_id / path_in_repo).write_bytes(data)

    def upload_folder(self, *, folder_path: Path, repo_id: str, allow_patterns: list[str]) -> None:
        assert "*.safetensors" in allow_patterns and "*.bin" not in allow_patterns
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)

    def snapshot_download(self, repo_id: str, *, allow_patterns: list[str]) -> str:
        assert "*.safetensors" in allow_patterns
        if not (self.root / repo_id).is_dir():
            raise _not_found(errors.RepositoryNotFoundError)
        return str(self.root / repo_id)

    def hf_hub_download(self, repo_id: str, filename: str) -> str:
        place = Path(self.snapshot_download(repo_id, allow_patterns=["*.safetensors"])) / filename
        if not place.is_file():
            raise _not_found(errors.RemoteEntryNotFoundError)
        return str(place)

    def model_info(self, repo_id: str) -> Any:
        return hub.ModelInfo(id=repo_id, cardData={"license": "openrail++"})


def _not_found(kind: type) -> Exception:
    found = kind.__new__(kind)  # as the hub raises it, without the answer that it comes from
    Exception.__init__(found, "404")
    return found  # type: ignore[no-any-return]


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(tmp_path / "hub")
    monkeypatch.setattr(hub, "HfApi", type("HfApi", (), {"__new__": lambda kind: found}))
    for name in ("snapshot_download", "hf_hub_download", "model_info"):
        monkeypatch.setattr(hub, name, getattr(found, name))
    monkeypatch.chdir(tmp_path)
    return found


def _record(place: Path) -> Path:
    return evenkeel.save(synthetic_record.WHOLE, place)


def test_a_record_goes_up_with_a_card_and_its_id_is_a_path(
    there: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _record(tmp_path / "record.safetensors")
    asked = ["push", "record.safetensors", "me/records", "--base", "someone/model", "--private"]
    assert main(asked) == 0, capsys.readouterr().err
    assert "huggingface.co/me/records" in capsys.readouterr().out
    assert there.private == {"me/records": True}
    card = hub.ModelCard.load(there.root / "me/records/README.md").data
    assert card.base_model == ["someone/model"] and card.base_model_relation == "adapter"
    assert card.license == "openrail++" and card.library_name == "diffusers"
    assert card.tags == ["evenkeel", "quantization", "record"]
    found = evenkeel.load("me/records/record.safetensors")
    assert synthetic_record.same(found, synthetic_record.WHOLE)  # type: ignore[arg-type]


def test_a_quantized_denoiser_goes_up_and_down(
    there: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    net: nn.Module = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=4
    )
    quantized, _ = quantize_module(net, QuantizerSpec.parse("w4a16"))
    save_quantized(quantized, tmp_path / "small")
    assert main(["push", "small", "me/small"]) == 0
    card = hub.ModelCard.load(there.root / "me/small/README.md").data
    assert card.tags[-1] == "quantized-denoiser" and card.base_model is None
    assert main(["pull", "me/small", "--out", "again"]) == 0
    first = sorted(p.name for p in (tmp_path / "small").iterdir())
    second = sorted(p.name for p in (tmp_path / "again").iterdir())
    assert second == sorted([*first, "README.md"])
    from evenkeel.cli.sources import load_denoiser

    class Pipeline:
        transformer = net

    found = load_denoiser("me/small", Pipeline())
    name = "transformer_blocks.0.attn1.to_q"
    assert torch.equal(found.get_submodule(name).weight, quantized.get_submodule(name).weight)
    assert main(["pull", "me/small", "--out", "again"]) == 1  # nothing is written over
    (tmp_path / ".third.part" / "half").mkdir(parents=True)  # as a killed pull leaves it
    assert main(["pull", "me/small", "--out", "third"]) == 0
    assert not (tmp_path / "third" / "half").exists() and not (tmp_path / ".third.part").exists()
    (tmp_path / "file").write_text("mine")
    assert main(["pull", "me/nothing", "--out", "file/below"]) == 1
    assert "is a file" in capsys.readouterr().err  # before anything is asked of the hub


def test_what_could_execute_does_not_go_up(
    there: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mixed").mkdir()
    _record(tmp_path / "mixed" / "record.safetensors")
    (tmp_path / "mixed" / "README.md").write_text("x")
    (tmp_path / "mixed" / "weights.bin").write_bytes(b"x")
    assert main(["push", "mixed", "me/mixed"]) == 1
    assert "weights.bin is not pushed" in capsys.readouterr().err
    assert not there.root.exists()
    assert main(["push", "nothing", "me/mixed"]) == 1
    assert "nothing is not there" in capsys.readouterr().err
    _record(tmp_path / "record.safetensors")
    assert main(["push", "record.safetensors", "only-a-name"]) == 1
    assert "expected USER/NAME" in capsys.readouterr().err


def test_missing_repositories_and_no_network_say_what_to_do(
    there: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match=r"no repository me/none.*hf auth login"):
        local("me/none")
    (there.root / "me/some").mkdir(parents=True)
    with pytest.raises(StorageError, match="no such file"):
        local("me/some/record.safetensors")

    def offline(*_: Any, **__: Any) -> str:
        raise errors.LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(StorageError, match=r"out of reach.*HF_HUB_OFFLINE.*evenkeel pull me/some"):
        evenkeel.load("me/some")


def test_a_path_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkdir("user")
    assert not is_hub_id("user/name/record.safetensors")  # a folder of that name is here
    with pytest.raises(StorageError):
        evenkeel.load("user/name/record.safetensors")
