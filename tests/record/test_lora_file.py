"""The plain form of recovery adapters, loaded by those it is for."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCardData
from made_adapters import made_adapters
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_pipelines import ALL, TinyPipeline, generate

from evenkeel.comparing.restore import Restored
from evenkeel.corrections import RecoveryAdapters
from evenkeel.errors import RecordError
from evenkeel.fitting.adapters.fit_adapters import AdapterReport
from evenkeel.hosts.actuators.beside import with_adapters
from evenkeel.record.lora_file import FILE, peft_files, write_lora
from evenkeel.reports.restored import write_restored

STEPS = 2


def difference(tiny: TinyPipeline, adapters: RecoveryAdapters, load: Any) -> tuple[float, float]:
    """How far their loader's samples are from ours, over how far ours are from the plain ones."""
    plain = generate(tiny, steps=STEPS)
    with with_adapters(tiny.model, adapters):
        ours = generate(tiny, steps=STEPS)
    load(tiny.pipe)
    theirs = generate(tiny, steps=STEPS)
    effect = float((ours - plain).norm())
    return float((theirs - ours).norm()) / effect, effect / float(plain.norm())


@pytest.mark.parametrize("ranks", [(3,), (2, 3, 5)])
@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_diffusers_loads_the_plain_form(tmp_path, name, ranks):
    tiny = ALL[name]()
    kind = type(tiny.pipe).__name__
    adapters = made_adapters(tiny.model, kind, denoiser=tiny.denoiser, ranks=ranks)
    write_lora(adapters, tmp_path / FILE)
    found, effect = difference(tiny, adapters, lambda pipe: pipe.load_lora_weights(tmp_path))
    assert found < 1e-4
    assert effect > 1e-2


def test_diffusers_loads_kohyas_names_into_convolutions(tmp_path):
    tiny = ALL["sdxl"]()
    adapters = made_adapters(tiny.model, denoiser="unet", size=0.1)
    # diffusers 0.42 takes lora_unet_add_embedding_linear_1 for add.embedding.linear.1.
    known = tuple(a for a in adapters.layers if not a.name.startswith("add_embedding"))
    adapters = replace(adapters, layers=known)
    assert {a.kernel for a in adapters.layers} >= {(), (3, 3)}
    place = write_lora(adapters, tmp_path / "kohya.safetensors", "kohya")
    found, effect = difference(tiny, adapters, lambda pipe: pipe.load_lora_weights(place))
    assert found < 1e-2  # their up factors hold the rank, and are rounded to 16 bits once more
    assert effect > 1e-2


def test_the_end_of_a_name_is_not_taken_for_the_name(tmp_path):
    """peft takes ``proj_out`` for ``single_transformer_blocks.0.proj_out``, and its rank with it."""
    tiny = ALL["flux"]()
    ranks = {"single_transformer_blocks.0.proj_out": 2, "single_transformer_blocks.1.proj_out": 2}
    layers = tuple(
        replace(layer, down=layer.down.take(slice(n)), up=layer.up.take(slice(n)))
        for layer in made_adapters(tiny.model, ranks=(5,)).layers
        if (n := {**ranks, "proj_out": 5, "x_embedder": 2}.get(layer.name))
    )
    adapters = replace(made_adapters(tiny.model), layers=layers)
    write_lora(adapters, tmp_path / FILE)
    found, _ = difference(tiny, adapters, lambda pipe: pipe.load_lora_weights(tmp_path))
    assert found < 1e-4


def test_the_plain_file_says_what_it_is_for(tmp_path):
    tiny = ALL["flux"]()
    adapters = made_adapters(tiny.model)
    path = write_lora(adapters, tmp_path / FILE)
    with safe_open(path, "pt") as file:
        said = file.metadata()
    assert said["evenkeel.quantized"] == adapters.provenance.quantized
    assert said["evenkeel.digest"] == adapters.digest()
    assert "never fuse" in said["evenkeel.use"]
    layer = adapters.layers[0]
    tensors = load_file(path)
    up, down = (tensors[f"transformer.{layer.name}.lora_{s}.weight"] for s in "BA")
    assert torch.equal(up.float() @ down.float(), layer.change)
    with pytest.raises(RecordError, match="layout"):
        write_lora(adapters, path, "a1111")


# ---- the folder that restore writes


def restored(tiny: TinyPipeline, folder: Path, pipeline: str = "zoo:tiny") -> RecoveryAdapters:
    kind = type(tiny.pipe).__name__
    adapters = made_adapters(tiny.model, kind, denoiser=tiny.denoiser)
    report = AdapterReport(2, 9, 10**6, None, (), 0, 1.0, 0.5, pairs=2, confirmed=True)
    found = Restored(
        adapters, replace(report, candidates=(_candidate(adapters),)), None, None, "none was tried"
    )
    settings = {"pipeline": pipeline, "quantized": "someone/tiny-int4", "seed": 0}
    write_restored(folder, found, settings, [])
    return adapters


def _candidate(adapters: RecoveryAdapters) -> Any:
    from evenkeel.fitting.adapters.fit_adapters import Candidate

    return Candidate(
        metric="local", target="difference", bits=4, bytes=adapters.stored_bytes, predicted=0.5
    )


@pytest.mark.parametrize("name", ["flux", "pixart_sigma", "dit"])
def test_the_cards_own_lines_load_it_without_this_library(tmp_path, name):
    tiny = ALL[name]()
    folder = tmp_path / "restored"
    adapters = restored(tiny, folder)
    text = (folder / "README.md").read_text()
    (code,) = (
        b for b in _code(text) if "evenkeel" not in b and b.strip().startswith(("pipe.", "from"))
    )
    code = code.replace('"restored"', repr(str(folder)))

    def load(pipe: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exec(code, {"pipe": pipe, "quantized": tiny.model})

    found, effect = difference(tiny, adapters, load)
    assert found < 1e-4
    assert effect > 1e-2


def _code(text: str) -> list[str]:
    return [block.split("```")[0] for block in text.split("```python")[1:]]


def test_the_card_is_metadata_that_the_hub_takes(tmp_path):
    import yaml

    def metadata(pipeline: str, name: str) -> dict[str, Any]:
        restored(ALL[name](), tmp_path / name, pipeline)
        text = (tmp_path / name / "README.md").read_text()
        assert "Never merge it" in text
        assert "on disk and in memory" in text
        return yaml.safe_load(text.split("---")[1])

    flux = metadata("black-forest-labs/FLUX.1-dev", "flux")
    assert flux["base_model"] == ["black-forest-labs/FLUX.1-dev", "someone/tiny-int4"]
    assert flux["base_model_relation"] == "adapter"
    assert flux["library_name"] == "diffusers"
    assert "lora" in flux["tags"]
    data = ModelCardData(**flux)
    assert data.to_dict()["base_model"] == flux["base_model"]
    pixart = metadata("zoo:pixart-sigma", "pixart_sigma")
    assert pixart["library_name"] == "peft"
    assert pixart["base_model"] == ["someone/tiny-int4"]


def test_peft_is_told_the_base_model():
    import json

    adapters = made_adapters(ALL["dit"]().model, "DiTPipeline")
    config = json.loads(peft_files(adapters, "facebook/DiT-XL-2-256")["adapter_config.json"])
    assert config["base_model_name_or_path"] == "facebook/DiT-XL-2-256"
    assert config["r"] == config["lora_alpha"]
