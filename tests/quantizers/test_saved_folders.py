"""Folders of quantized denoisers: what comes back from them, and what is refused."""

from __future__ import annotations

import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_denoisers import (
    dit,
    pixart,
    run_pixart,
    run_sana,
    sana,
)
from torch import nn

from evenkeel.errors import EvenkeelError, QuantizationError, StorageError
from evenkeel.hosts.pipeline.components import network_settings
from evenkeel.quantizers import (
    DEFAULT_SKIP,
    QuantizerSpec,
    load_quantized,
    quantize_module,
    save_quantized,
)
from evenkeel.storage import digest, json_text


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)  # the layers and denoisers below start from random weights


@pytest.mark.parametrize(
    ("build", "run", "text", "dtype"),
    [
        (pixart, run_pixart, "w3a4-g16-r2", torch.float32),
        (pixart, run_pixart, "w4a8-token", torch.bfloat16),
        (pixart, run_pixart, "w3a8-g16", torch.float64),
        (sana, run_sana, "w4a8-gnone", torch.float32),
    ],
)
def test_saved_and_loaded_models_compute_the_same_bits(
    build, run, text: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    spec = QuantizerSpec.parse(text, skip=(*DEFAULT_SKIP, "*.attn2.to_v"))
    net = build().to(dtype)
    new, report = quantize_module(net, spec)
    folder = save_quantized(new, tmp_path / "deep" / "er")
    state = torch.random.get_rng_state()
    loaded, loaded_report = load_quantized(folder)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(run(loaded), run(new))
    assert not torch.equal(run(loaded), run(net))
    assert loaded_report == report
    assert QuantizerSpec.from_dict(loaded_report.spec) == spec
    assert loaded.evenkeel_quantizer == str(spec) == new.evenkeel_quantizer
    assert (type(loaded), loaded.dtype, loaded.training) == (type(net), dtype, False)
    # whoever keeps work of the one goes on with the other
    assert network_settings(loaded) == network_settings(new)
    assert not any(part.training for part in new.modules())
    # private entries say who wrote the configuration, not what is built
    public = {k: v for k, v in net.config.items() if not k.startswith("_")}
    assert {k: v for k, v in loaded.config.items() if not k.startswith("_")} == public


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_quantized(
        quantize_module(dit(), QuantizerSpec(4))[0], tmp_path_factory.mktemp("dit")
    )


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_two_files_are_written(saved: Path) -> None:
    assert {f.name for f in saved.iterdir()} == {"quantized.safetensors", "quantized.json"}
    description = json.loads((saved / "quantized.json").read_text())
    assert description["class"] == "DiTTransformer2DModel"
    assert description["report"]["spec"]["skip"] == list(DEFAULT_SKIP)


@pytest.mark.parametrize("name", ["quantized.json", "quantized.safetensors"])
def test_missing_files_are_named(folder: Path, name: str) -> None:
    load_quantized(folder)
    (folder / name).unlink()
    with pytest.raises(StorageError, match=f"{name} is (missing|not a file)"):
        load_quantized(folder)
    with pytest.raises(StorageError, match="not a folder"):
        load_quantized(folder / "nowhere")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "is JSON but no object"),
        ('{"_class_name": "DiTTransformer2DModel"}', "is not an evenkeel quantized"),
        ('{"format": "evenkeel-quantized", "schema_version": 99}', "schema version 99"),
        ('{"format": "evenkeel-quantized", "version": 2}', "this library reads 3: quantize the"),
        ('{"format": "evenkeel-quantized", "schema_version": 3}', "was changed"),
    ],
)
def test_foreign_descriptions_are_refused(folder: Path, content: str, says: str) -> None:
    (folder / "quantized.json").write_text(content)
    with pytest.raises(StorageError, match=says):
        load_quantized(folder)


def edit(folder: Path, **changes: object) -> None:
    """Change the description and its digest with it, as anyone could."""
    path = folder / "quantized.json"
    found = {**json.loads(path.read_text()), **changes}
    del found["digest"]
    path.write_text(json.dumps({**found, "digest": digest(json_text(found), {})}))


@pytest.mark.parametrize("name", ["os", "DiTPipeline", "NoSuchModel"])
def test_only_model_classes_are_rebuilt(folder: Path, name: str) -> None:
    edit(folder, **{"class": name})
    with pytest.raises(StorageError, match=f"'{name}' is not a model class"):
        load_quantized(folder)


def test_tensors_that_do_not_fit_are_refused(folder: Path) -> None:
    found = json.loads((folder / "quantized.json").read_text())
    config = found["config"]
    edit(folder, config={**config, "num_layers": 2})
    with pytest.raises(StorageError, match=r"missing \['transformer_blocks\.1\."):
        load_quantized(folder)
    edit(folder, config={**config, "out_channels": 4})
    with pytest.raises(StorageError, match=r"of another shape \['proj_out_2\.bias'"):
        load_quantized(folder)
    edit(folder, config=config)
    assert load_quantized(folder)
    name, layer = next(iter(found["layers"].items()))
    for wrong in ({"dtype": "os"}, {"dtype": "int8"}, {"shape": [0, -1]}, {"shape": "16"}):
        bad = {**layer, "weight": {**layer["weight"], **wrong}}
        edit(folder, layers={**found["layers"], name: bad})
        with pytest.raises(StorageError, match="is not a valid quantized"):
            load_quantized(folder)
    edit(folder, layers=found["layers"])
    (folder / "quantized.safetensors").write_bytes(b"not tensors")
    with pytest.raises(StorageError, match="was changed"):
        load_quantized(folder)


def corrupted(folder: Path, rng: random.Random) -> None:
    """One mistake or mischief: a bit, an end cut off, two tensors swapped, an edited report."""
    tensors, description = folder / "quantized.safetensors", folder / "quantized.json"
    kind = rng.choice(("bit", "bit", "end", "swap", "report"))
    if kind in ("bit", "end"):
        path = rng.choice((tensors, description))
        content = bytearray(path.read_bytes())
        place = rng.randrange(len(content))
        content[place] ^= 1 << rng.randrange(8)
        path.write_bytes(content if kind == "bit" else content[:place])
    elif kind == "swap":
        found = load_file(tensors)
        like: dict[Any, list[str]] = {}
        for name, tensor in found.items():
            like.setdefault((tensor.dtype, tensor.shape), []).append(name)
        one, other = rng.sample(rng.choice([n for n in like.values() if len(n) > 1]), 2)
        save_file({**found, one: found[other], other: found[one]}, tensors)
    else:
        found = json.loads(description.read_text())
        layer = rng.choice([r for r in found["report"]["layers"] if not r["reason"]])
        layer[rng.choice(("weight_error", "stored", "group"))] = 0
        description.write_text(json.dumps(found, indent=1))


def test_whatever_is_corrupted_is_refused(saved: Path, tmp_path: Path) -> None:
    before, told = load_quantized(saved)
    refused = 0
    for seed in range(60):
        folder = shutil.copytree(saved, tmp_path / str(seed))
        corrupted(folder, random.Random(seed))
        try:
            after, found = load_quantized(folder)
        except EvenkeelError:
            refused += 1
        else:  # a blank between two words of the description
            assert found == told
            for name, tensor in before.state_dict().items():
                assert torch.equal(tensor, after.state_dict()[name])
    assert refused > 50


def test_a_save_that_fails_leaves_the_old_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, _ = quantize_module(dit(), QuantizerSpec(8))

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("evenkeel.quantizers.saved.folder.save_file", full)
    with pytest.raises(OSError, match="no space"):
        save_quantized(new, folder)
    assert load_quantized(folder)[1].quantizer == "w4a16"


def test_saving_refuses_what_could_not_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="'Sequential' is not a model class"):
        save_quantized(
            quantize_module(nn.Sequential(nn.Linear(4, 4)), QuantizerSpec(4))[0], tmp_path
        )
    net = dit()
    with pytest.raises(QuantizationError, match="carries no report"):
        save_quantized(net, tmp_path)
    new, _ = quantize_module(net, QuantizerSpec(4))
    assert save_quantized(copy.deepcopy(new), tmp_path / "copy")
    assert set(new.state_dict()) == set(load_quantized(tmp_path / "copy")[0].state_dict())
    new.transformer_blocks[0].ff = net.transformer_blocks[0].ff
    with pytest.raises(QuantizationError, match=r"of other layers: \['transformer_blocks.0.ff"):
        save_quantized(new, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="is a file"):
        save_quantized(quantize_module(net, QuantizerSpec(4))[0], tmp_path / "file")
