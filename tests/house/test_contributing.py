"""CONTRIBUTING's recipes, walked: the files that they copy are copied, changed in one place, and used."""

import ast
import copy
import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_pipelines import generate, pixart_sigma
from torch import nn

import evenkeel
from evenkeel.corrections import catalogue as corrections
from evenkeel.corrections.base import digest_of
from evenkeel.hosts.backends import catalogue as backends
from evenkeel.hosts.pipeline.fingerprint import fingerprint, quantizer_text
from evenkeel.quantizers import load_quantized
from evenkeel.quantizers.methods import catalogue as methods
from evenkeel.testing import SOME, check_correction

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
RECIPES = dict(re.findall(r"^## (Add [^\n]+)\n(.*?)(?=^## )", TEXT, flags=re.DOTALL | re.MULTILINE))
STEPS = 3


def copied(monkeypatch, recipe, folder, changes):
    """The file that a recipe says to copy, with these changes, as a module from another folder."""
    (path,) = re.findall(r"Copy `([^`]+)`", RECIPES[recipe])
    source = (ROOT / path).read_text()
    for old, new in changes.items():
        assert old in source, f"{path} no longer has {old!r}"
        source = source.replace(old, new)
    place = folder / "mine.py"
    place.write_text(source)
    spec = importlib.util.spec_from_file_location("mine", place)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mine", module)  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def defined_names():
    """Of classes, functions and constants anywhere in the package and its test helpers."""
    names = set()
    for folder in ("src/evenkeel", "tests/helpers"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                    names.add(node.name)
                elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    names |= {t.id for t in targets if isinstance(t, ast.Name)}
    return names


def test_there_is_a_recipe_for_everything():
    kinds = ("correction", "quantization method", "backend", "twin")
    assert list(RECIPES) == [f"Add a {kind}" for kind in kinds]


@pytest.mark.parametrize("recipe", RECIPES)
def test_names_in_a_recipe_exist(recipe):
    named = re.findall(r"`([A-Za-z]\w*)(?:\([^`]*\))?`", RECIPES[recipe])
    extra = {"backends"}  # of pyproject.toml
    assert set(named) - extra <= defined_names()


@pytest.mark.parametrize("recipe", RECIPES)
def test_lists_are_in_the_files_that_a_recipe_names(recipe):
    for name, path in re.findall(r"`([A-Z]+)` (?:in|of)\s+`([^`]+)`", RECIPES[recipe]):
        assert re.search(rf"(?m)^{name}\b.*=", (ROOT / path).read_text()), f"{name} in {path}"


@pytest.fixture(scope="module")
def tiny():
    return pixart_sigma()


def options(tiny, **changes):
    call = {k: v for k, v in tiny.call.items() if k != "output_type"}
    given = {"prompts": tiny.prompts, "guidance_scale": tiny.guidance_scale, "call": call}
    return {**given, "num_inference_steps": STEPS, "progress": False, **changes}


def test_a_correction_is_one_file_and_one_entry(tmp_path, monkeypatch, tiny):
    changes = {
        "class ExactDrift": "class HalfDrift",
        '"exact-drift"': '"half-drift"',
        "return (step.level - math.sqrt(left_over)) / step.length - 1": (
            "return ((step.level - math.sqrt(left_over)) / step.length - 1) / 2"
        ),
    }
    mine = copied(monkeypatch, "Add a correction", tmp_path, changes)
    entry = corrections.Entry(corrections.EVIDENCE, mine.HalfDrift)
    monkeypatch.setitem(corrections.ALL, "half-drift", entry)
    check_correction(mine.HalfDrift, schedulers=SOME)

    quantized, _ = evenkeel.quantize_module(tiny.model, evenkeel.QuantizerSpec(3))
    record = evenkeel.calibrate(tiny.pipe, quantized=quantized, **options(tiny))
    path = record.save(tmp_path / "record")
    made, _ = evenkeel.load(path).corrections()
    whole, half = made["exact-drift"], made["half-drift"]
    law = evenkeel.load(path).law
    stretch = [c.plan(law).factor - 1 for c in (whole, half)]
    assert torch.allclose(stretch[1], stretch[0] / 2) and stretch[0].any()
    assert digest_of(whole) != digest_of(half)

    arms = [evenkeel.Arm("full-precision", tiny.model), evenkeel.Arm("quantized", quantized)]
    arms += [evenkeel.Arm(name, quantized, made[name]) for name in ("exact-drift", "half-drift")]
    compare = options(tiny, folder=tmp_path / "images")
    errors = [
        arm.measures["psnr"].value for arm in evenkeel.compare(tiny.pipe, arms, **compare).arms
    ]
    assert len(set(errors[1:])) == 3

    full = tiny.model
    try:
        tiny.pipe.transformer = quantized
        before = generate(tiny, steps=STEPS)
        with evenkeel.applied(tiny.pipe, half):
            assert not torch.equal(generate(tiny, steps=STEPS), before)
        assert torch.equal(generate(tiny, steps=STEPS), before)
    finally:
        tiny.pipe.transformer = full


def test_a_quantization_method_is_one_file_and_one_entry(tmp_path, monkeypatch, tiny):
    changes = {
        "class RoundToNearest": "class Mine",
        'name: ClassVar[str] = "rtn"': 'name: ClassVar[str] = "mine"',
        "weight_bits: int = 4": "weight_bits: int = 5",
    }
    mine = copied(monkeypatch, "Add a quantization method", tmp_path, changes)
    monkeypatch.setitem(methods.METHODS, "mine", mine.Mine)

    method = methods.method_named("mine")()
    assert method.weight_bits == 5 and methods.method_from(method.as_dict()) == method
    given = options(tiny, out=tmp_path / "model")
    module, report = evenkeel.quantize(tiny.pipe, method, **given)
    assert quantizer_text(module) == report.quantizer == "mine-w5a8"
    loaded, again = load_quantized(tmp_path / "model")
    assert again == report and fingerprint(loaded) == fingerprint(module)


class ToyLinear(nn.Module):
    """As a backend would store it: codes, a scale, and how to put them together."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        largest = layer.weight.detach().abs().max()
        codes = (layer.weight.detach() / largest * 127).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", largest / 127)
        self.bias = layer.bias
        self.toy = SimpleNamespace(weights_dtype="int8", group_size=-1, use_quantized_matmul=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


def test_a_backend_is_one_file_and_one_entry(tmp_path, monkeypatch, tiny):
    full, model = tiny.model, copy.deepcopy(tiny.model)
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and "time" not in name:
            model.set_submodule(name, ToyLinear(layer))
    assert quantizer_text(model) == "none"

    changes = {"class SDNQ": "class Toy", '"sdnq"': '"toy"', "sdnq_dequantizer": "toy"}
    mine = copied(monkeypatch, "Add a backend", tmp_path, changes)
    monkeypatch.setattr(backends, "BACKENDS", (*backends.BACKENDS, mine.Toy()))

    assert re.match(r"toy:int8 x \d+, plain x \d+", quantizer_text(model))
    before = fingerprint(model)
    model.proj_out.toy.group_size = 8
    assert fingerprint(model) != before
    model.proj_out.toy.group_size = -1
    assert fingerprint(model) == before

    readout = evenkeel.fit_readout(tiny.pipe, quantized=model, **options(tiny))
    assert readout.provenance.quantizer.startswith("toy:int8")
    record = evenkeel.calibrate(tiny.pipe, quantized=model, **options(tiny))
    try:
        tiny.pipe.transformer = model
        plain = generate(tiny, steps=STEPS)
        for correction in (evenkeel.ExactDrift(record.evidence), readout):
            with evenkeel.applied(tiny.pipe, correction):
                generate(tiny, steps=STEPS)
            assert torch.equal(generate(tiny, steps=STEPS), plain)
    finally:
        tiny.pipe.transformer = full
