"""Recovery adapters: what the fit collects, what it gives back, and what others make of its file."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import accelerate
import diffusers as d
import pytest
import torch
from quantized_by import BACKENDS
from several_processes import environment, torchrun
from tiny_pipelines import ALL, TinyPipeline, generate
from torch import nn

import evenkeel
from evenkeel import zoo
from evenkeel.cli import main
from evenkeel.comparing.restore import restore
from evenkeel.corrections import Composite, RecoveryAdapters
from evenkeel.errors import CalibrationError, Incompatible, RecordError
from evenkeel.fitting.adapters.collect import _Probe, _Rows, _Watch, collect
from evenkeel.fitting.adapters.effective_weight import effective_weight, reference_weight
from evenkeel.fitting.adapters.pairs import Pairs
from evenkeel.fitting.adapters.row_sample import RowFile, RowSample, folds_of, row_keys
from evenkeel.fitting.adapters.sites import Site
from evenkeel.hosts.actuators.head_rows import Head
from evenkeel.hosts.pipeline.denoiser_calls import Call
from evenkeel.hosts.pipeline.fingerprint import fingerprint
from evenkeel.hosts.pipeline.prompts import Prompts
from evenkeel.hosts.run import Batch, Run
from evenkeel.quantizers import QuantizerSpec, load_quantized, quantize_module
from evenkeel.reports.restored import write_restored
from evenkeel.zoo.pictures import KINDS

W3 = QuantizerSpec.parse("w3a16-g16")
STEPS = 3


def fitted(tiny: TinyPipeline, quantized: nn.Module, **options) -> RecoveryAdapters:
    """Adapters whatever the held-out pairs say: random networks have nothing to recover."""
    call = {k: v for k, v in tiny.call.items() if k != "output_type"}
    settings = {
        "quantized": quantized,
        "prompts": list(tiny.prompts),
        "num_inference_steps": STEPS,
        "guidance_scale": tiny.guidance_scale,
        "call": call,
        "progress": False,
        **options,
    }
    return evenkeel.fit_adapters(tiny.pipe, **settings)[0]


@pytest.fixture(scope="module")
def flux() -> TinyPipeline:
    return ALL["flux"]()


@pytest.fixture(scope="module")
def flux_w3(flux) -> nn.Module:
    return quantize_module(flux.model, W3)[0]


@pytest.fixture(scope="module")
def adapters(flux, flux_w3) -> RecoveryAdapters:
    return fitted(flux, flux_w3, rank=4, bits=4, metric="local")


def with_quantized(tiny: TinyPipeline, quantized: nn.Module) -> TinyPipeline:
    """The same pipeline sampling with another denoiser; the components are shared."""
    pipe = type(tiny.pipe)(**{**tiny.pipe.components, tiny.denoiser: quantized})
    pipe.set_progress_bar_config(disable=True)
    return replace(tiny, pipe=pipe)


# ---- rows


@pytest.mark.parametrize("in_files", [False, True])
def test_a_sample_of_rows_is_the_same_for_any_split(tmp_path, in_files):
    keys = row_keys(torch.arange(40), 2, torch.arange(40) % 2, 25).flatten()
    rows = torch.arange(1000.0)[:, None].expand(-1, 3)
    whole = RowSample(64)
    whole.offer(keys, rows)
    generator = torch.Generator().manual_seed(0)
    halves = [RowSample(64), RowSample(64)]
    if in_files:
        halves = [RowFile(64, tmp_path / str(i)) for i in range(2)]
    order = torch.randperm(1000, generator=generator)
    for i in range(0, 1000, 37):
        part = order[i : i + 37]
        halves[(i // 37) % 2].offer(keys[part], rows[part])
    halves[0].merge(halves[1])
    assert all(torch.equal(a, b) for a, b in zip(whole.sorted(), halves[0].sorted(), strict=True))
    assert len(whole.sorted()[0]) == 64


def test_folds_share_no_pair():
    pairs = torch.arange(6)
    keys = row_keys(pairs, 1, torch.zeros(6, dtype=torch.int64), 10)
    of_pair = folds_of(keys.flatten()).view(6, 10)
    assert torch.equal(of_pair, (pairs % 2 == 1)[:, None].expand(-1, 10))
    one = folds_of(keys[2])
    assert one.sum() == 5  # of a single pair every second row


def test_keys_are_spread_evenly_and_tell_rows_apart():
    keys = row_keys(torch.arange(100), 7, torch.zeros(100, dtype=torch.int64), 50)
    assert keys.unique().numel() == 5000
    shares = torch.histc((keys.double() / 2**63).flatten(), 10, 0, 1) / 5000
    assert bool(((shares - 0.1).abs() < 0.02).all())
    other = row_keys(torch.arange(100), 8, torch.zeros(100, dtype=torch.int64), 50)
    assert not bool(torch.isin(keys, other).any())


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_what_is_collected_does_not_depend_on_batches(flux, flux_w3, batch_size):
    def rows(size):
        run = Run(
            flux.pipe, ["a", "b", "c"], STEPS, guidance_scale=3.5, batch_size=size,
            call={"height": 32, "width": 32}, quantized=flux_w3,
        )  # fmt: skip
        name = "transformer_blocks.0.attn.to_q"
        layers = [m.get_submodule(name) for m in (flux_w3, flux.model)]
        shape = layers[1].weight.shape
        head = Head(name, "linear", shape[1], shape[0], True, ())
        site = Site(head, *layers, RowSample(50), RowSample(50))
        collect(run, {name: site}, probed=0, progress=False)
        return site.inputs.sorted()

    (keys, x), (same, y) = rows(batch_size), rows(3)
    assert torch.equal(keys, same)
    assert torch.allclose(x, y, atol=1e-4)


def test_gradients_are_those_of_the_exact_jacobian():
    torch.manual_seed(0)
    first, second = nn.Linear(5, 4), nn.Linear(4, 6)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x):
            return (self.second(torch.tanh(self.first(x))),)

    net = Net().eval()
    x = torch.randn(2, 3, 5)
    head = Head("first", "linear", 5, 4, True, ())
    site = Site(head, first, first, RowSample(1), RowSample(100_000))
    watch = _Watch()
    rows = _Rows(watch)
    rows.batch = Batch(Prompts.of(["a", "b"]), 0, 0)
    probe = _Probe(net, {"first": site}, [2.0], 0)
    for call in range(3000):
        watch.calls = call  # another key every time
        probe.ask(rows, Call((x,), {}, net(x)[0]))
    rows = site.gradients.sorted()[1].double()
    gradients = rows[:, :-1] * rows[:, -1:]
    found = gradients.T @ gradients / len(gradients)
    slopes = 1 - torch.tanh(first(x)).square().reshape(-1, 4)
    jacobians = second.weight[None] * slopes[:, None, :]  # (rows, 6, 4)
    exact = 4 * torch.einsum("noi,noj->ij", jacobians, jacobians).double() / len(jacobians)
    assert (found - exact).norm() < 0.05 * exact.norm()


# ---- what a layer computes with


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BACKENDS)
def test_the_weight_of_any_backend_is_found_by_asking(name):
    package, quantize = BACKENDS[name]
    if importlib.util.find_spec(package.split(".")[0]) is None:
        pytest.skip(f"{package} is not installed")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32))
    x = torch.randn(50, 64)
    extra = {"run": lambda model: model(x)} if name.startswith("modelopt") else {}
    quantized = quantize(net, **extra)
    weight = effective_weight(quantized[0])
    if "dynamic" in name or "a4" in name:  # they round the input as well
        assert 0.001 < (weight - reference_weight(net[0])).norm() / weight.norm() < 0.4
        return
    with torch.no_grad():
        assert torch.allclose(x @ weight.T + net[0].bias, quantized(x), atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 5, 3, padding=1),
        nn.Conv2d(3, 5, 3, padding=1, stride=2),
        nn.Conv2d(3, 5, (3, 5), padding=(2, 1), dilation=2),
        nn.Conv2d(3, 5, 3, padding="same"),
        nn.Conv2d(3, 5, 2, stride=2, padding_mode="reflect"),
        nn.Linear(7, 3),
    ],
)
def test_the_weight_of_a_plain_layer_is_its_own(layer):
    assert torch.allclose(effective_weight(layer), reference_weight(layer), atol=1e-6)


# ---- the fit


@pytest.mark.parametrize("name", ["flux", "sdxl", "dit", "pixart_sigma"])
def test_adapters_of_full_rank_restore_the_full_precision_network(name):
    tiny = ALL[name]()
    quantized = quantize_module(tiny.model, W3)[0]
    full = generate(tiny, steps=STEPS)
    restored = with_quantized(tiny, quantized)
    plain = generate(restored, steps=STEPS)
    adapters = fitted(tiny, quantized, rank=10_000, bits=16, metric="local")
    assert adapters.layers
    evenkeel.apply(restored.pipe, adapters)
    again = generate(restored, steps=STEPS)
    assert (again - full).norm() < 0.05 * (plain - full).norm()
    evenkeel.remove(restored.pipe)
    assert torch.equal(generate(restored, steps=STEPS), plain)


def test_a_trained_pipeline_comes_nearer_and_stays_within_its_budget():
    twin = zoo.twin("pixart-sigma")
    pipe = zoo.load("pixart-sigma")
    quantized = quantize_module(pipe.transformer, QuantizerSpec.parse("w3a16-g32"))[0]
    before = {k: v.clone() for k, v in quantized.state_dict().items()}
    prompts = KINDS[twin.pictures].prompts(8, 0)
    adapters, report = evenkeel.fit_adapters(
        pipe, quantized=quantized, prompts=prompts, num_inference_steps=6, budget=0.2,
        guidance_scale=twin.guidance_scale, bits=4, progress=False,
    )  # fmt: skip
    assert report.confirmed
    assert report.gain > report.bound > 1.5
    assert 0.9 * report.budget < adapters.stored_bytes <= report.budget
    assert report.budget == int(0.2 * report.quantized_bytes)
    output, local = report.candidates
    assert (output.metric, local.metric) == ("output", "local")
    assert all(c.predicted < 0.5 for c in report.candidates)
    assert f"nearer on {report.pairs} held-out pairs" in report.text()
    assert all(torch.equal(v, before[k]) for k, v in quantized.state_dict().items())
    assert not quantized.transformer_blocks[0].attn1.to_q._forward_hooks


def test_what_held_out_pairs_do_not_confirm_is_not_added(flux, flux_w3, monkeypatch):
    from evenkeel.fitting.adapters import final_samples as module

    monkeypatch.setattr(module, "gain", lambda before, after: torch.tensor([1.0, -3.0]))
    adapters, report = evenkeel.fit_adapters(
        flux.pipe, quantized=flux_w3, prompts=["a"], num_inference_steps=2, rank=1, bits=4,
        metric="local", call={"height": 32, "width": 32}, progress=False,
    )  # fmt: skip
    assert not report.confirmed
    assert adapters.layers == ()
    assert report.text().startswith("nothing helped")
    restored = with_quantized(flux, flux_w3)
    plain = generate(restored)
    with evenkeel.applied(restored.pipe, adapters):
        assert torch.equal(generate(restored), plain)


def test_pairs_are_disjoint(flux):
    def run(n):
        return Run(flux.pipe, [f"p{i}" for i in range(n)], 2, seed=5)

    for n in (1, 3, 8, 32):
        pairs = Pairs.of(run(n))
        held_out = pairs.held_out
        seeds = [p.seed + i for p in (pairs.fit, held_out) for i in range(len(p.prompts))]
        assert len(set(seeds)) == len(seeds)
        assert pairs.choose.stop == pairs.confirm.start
        assert len(pairs.confirm) >= 8
        assert pairs.confirm.stop == pairs.further.start
        assert pairs.further.stop == len(held_out.prompts)
        assert len(pairs.further) == 3 * len(pairs.confirm)
        if n >= 8:
            texts = [held_out.prompts.texts[i] for i in pairs.choose]
            others = [held_out.prompts.texts[i] for i in (*pairs.confirm, *pairs.further)]
            sets = [set(pairs.fit.prompts.texts), set(texts), set(others)]
            assert sum(map(len, sets)) == len(set.union(*sets)) == n
        without = Pairs.of(run(n), choosing=False)
        assert not without.choose
        assert len(without.fit.prompts) >= len(pairs.fit.prompts)


def test_full_precision_weights_may_stay_on_the_disk_and_rows_in_files(flux, flux_w3, tmp_path):
    options = {"rank": 2, "bits": 4, "metric": "local"}
    expected = fitted(flux, flux_w3, **options)
    assert expected.layers
    assert fitted(flux, flux_w3, memory=1.0, **options).digest() == expected.digest()
    pipe = type(flux.pipe)(
        **{**flux.pipe.components, "transformer": copy.deepcopy(flux.pipe.transformer)}
    )
    accelerate.disk_offload(pipe.transformer, tmp_path, execution_device=torch.device("cpu"))
    assert next(pipe.transformer.parameters()).is_meta
    away = fitted(replace(flux, pipe=pipe), flux_w3, **options)
    assert away.digest() == expected.digest()


def test_branches_are_refitted_before_adapters_stand_beside_them(tmp_path):
    twin = zoo.twin("pixart-sigma")
    pipe, prompts = zoo.load("pixart-sigma"), KINDS[twin.pictures].prompts(8, 0)
    spec = replace(QuantizerSpec.parse("w3a4-g32-r16"), only=("transformer_blocks.3.*",))
    quantized = quantize_module(pipe.transformer, spec)[0]
    found = restore(
        pipe, quantized=quantized, prompts=prompts, measured_on=(), num_inference_steps=3, budget=0.1,
        guidance_scale=twin.guidance_scale, readout=False, progress=False,
    )  # fmt: skip
    assert found.refit_gain is not None
    assert found.refit_gain[1] > 0
    assert found.refitted is not None
    assert fingerprint(found.refitted) == found.adapters.provenance.quantized
    assert "refitted branches bring +" in found.sentence
    out = write_restored(
        tmp_path / "out", found, {"pipeline": "p", "quantized": "q", "seed": 0}, []
    )
    assert "`quantized/` of this folder" in (out / "README.md").read_text()
    again, _ = load_quantized(out / "quantized")
    assert fingerprint(again) == fingerprint(found.refitted)
    if found.adapters.layers:
        evenkeel.load(out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.1, "rank": 2}, "not both"),
        ({"budget": 0.0}, "above 0"),
        ({"rank": 0}, "rank"),
        ({"rank": 1, "bits": 5}, "bits"),
        ({"rank": 1, "metric": "best"}, "metric"),
        ({"rank": 1, "rows": 3}, "rows"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_runs(flux, flux_w3, options, message):
    with pytest.raises(CalibrationError, match=message):
        fitted(flux, flux_w3, **options)


# ---- applied


def test_any_scheduler_may_be_used_and_no_other_network(flux, flux_w3, adapters):
    restored = with_quantized(flux, flux_w3)
    pipe = restored.pipe
    pipe.scheduler = d.FlowMatchEulerDiscreteScheduler(shift=2.0)
    plain = generate(restored)
    with evenkeel.applied(pipe, adapters):
        assert not torch.equal(generate(restored), plain)
    with pytest.raises(Incompatible, match="full-precision"):
        evenkeel.apply(flux.pipe, adapters)
    other = with_quantized(flux, quantize_module(flux.model, QuantizerSpec.parse("w4a16-g16"))[0])
    with pytest.raises(Incompatible, match="not the one"):
        evenkeel.apply(other.pipe, adapters)
    with pytest.raises(Incompatible, match="beside"):
        evenkeel.apply(ALL["sdxl"]().pipe, adapters, allow=("denoiser",))


def test_a_scheduler_exchanged_later_loses_nothing_and_a_comparison_sees_the_plain_one(
    flux, flux_w3, adapters
):
    restored = with_quantized(flux, flux_w3)
    pipe = restored.pipe
    plain = generate(restored)
    evenkeel.apply(pipe, adapters)
    corrected = generate(restored)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    assert torch.equal(generate(restored), corrected)  # and no warning
    run = Run(pipe, ["a"], 4)
    with run.undisturbed():
        assert torch.equal(generate(restored), plain)
    assert torch.equal(generate(restored), corrected)
    pipe.scheduler = copy.deepcopy(flux.pipe.scheduler)  # that carries them, too
    assert torch.equal(generate(restored), corrected)
    evenkeel.remove(pipe)
    assert torch.equal(generate(restored), plain)
    assert torch.equal(generate(with_quantized(flux, flux_w3)), plain)  # with the first scheduler


@pytest.mark.parametrize("how", ["wrapped", "in place", "blocks"])
def test_compiled_denoisers_are_fitted_and_notice_adapters_that_come_and_go(
    flux, flux_w3, adapters, how
):
    torch.compiler.reset()
    model: Any = copy.deepcopy(flux_w3)
    if how == "wrapped":
        model = torch.compile(model, backend="eager")
    for part in {"wrapped": [], "in place": [model], "blocks": model.transformer_blocks}[how]:
        part.compile(backend="eager")
    restored = with_quantized(flux, model)
    plain = generate(with_quantized(flux, flux_w3))
    assert torch.equal(generate(restored), plain)  # and the graphs are there
    with evenkeel.applied(with_quantized(flux, flux_w3).pipe, adapters):
        expected = generate(with_quantized(flux, flux_w3))
    evenkeel.apply(restored.pipe, adapters)
    assert torch.equal(generate(restored), expected)
    evenkeel.remove(restored.pipe)
    assert torch.equal(generate(restored), plain)
    again = fitted(flux, model, rank=4, bits=4, metric="local")
    assert again.digest() == adapters.digest()
    torch.compiler.reset()


def test_what_is_fitted_with_adapters_belongs_to_them(flux, flux_w3, adapters):
    from evenkeel.hosts.actuators.beside import with_adapters
    from evenkeel.hosts.pipeline.fingerprint import fingerprint

    before = fingerprint(flux_w3)
    with with_adapters(flux_w3, adapters) as restored:
        assert fingerprint(restored) != before
        with pytest.raises(Incompatible, match="already"), with_adapters(restored, adapters):
            pass
    assert fingerprint(flux_w3) == before


def test_several_add_up_and_a_file_gives_them_back(flux, flux_w3, adapters, tmp_path):
    path = evenkeel.save(adapters, tmp_path / "adapters.safetensors")
    again = evenkeel.load(path)
    assert isinstance(again, RecoveryAdapters)
    assert again.digest() == adapters.digest()
    assert path.stat().st_size < adapters.stored_bytes + 40_000
    restored = with_quantized(flux, flux_w3)
    halves = [
        replace(adapters, layers=adapters.layers[::2]), replace(adapters, layers=adapters.layers[1::2])
    ]  # fmt: skip
    with evenkeel.applied(restored.pipe, adapters):
        whole = generate(restored)
    with evenkeel.applied(restored.pipe, Composite(tuple(halves))):
        assert torch.equal(generate(restored), whole)
    with evenkeel.applied(restored.pipe, Composite((adapters, adapters))):
        assert not torch.equal(generate(restored), whole)


# ---- several processes, and the command

TOGETHER = """
import os
import sys
from pathlib import Path
import evenkeel
from evenkeel.quantizers import QuantizerSpec, load_quantized, quantize_module
from several_processes import environment, torchrun
from tiny_pipelines import ALL

tiny = ALL["flux"]()
quantized = quantize_module(tiny.model, QuantizerSpec.parse("w3a16-g16"))[0]
adapters, report = evenkeel.fit_adapters(
    tiny.pipe, quantized=quantized, prompts=["a", "b", "c"], num_inference_steps=2, rank=2, bits=4,
    guidance_scale=3.5, batch_size=1, rows=64, call={"height": 32, "width": 32}, progress=False,
)
said = f"{report.candidates} {report.gain} {adapters.digest()}"
Path(sys.argv[1], os.environ.get("RANK", "alone")).write_text(said)
"""


def test_two_processes_give_the_adapters_of_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TOGETHER)
    subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    both = torchrun(tmp_path, str(script), str(tmp_path))
    assert both.returncode == 0, both.stderr[-2000:]
    alone, *shared = ((tmp_path / name).read_text() for name in ("alone", "0", "1"))
    assert shared == [alone, alone]


def test_restore_writes_a_folder_that_any_loader_takes(tmp_path, capsys):
    out = tmp_path / "restored"
    code = main(
        [
            "restore", "zoo:pixart-sigma", "--quantized", "w3a16-g32", "--budget", "20%", "--steps", "6",
            "--count", "8", "--images", "4", "--no-readout", "--out", str(out), "--json",
        ]
    )  # fmt: skip
    said = json.loads(capsys.readouterr().out)
    assert code == 0
    assert said["out"] == str(out)
    assert said["parts"] == ["adapters"]
    assert {"6", "4", "50"} == set(said["measured"])
    written = {path.name for path in out.iterdir()}
    assert written == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors",
        "recognition.json", "report.html", "restored.json", "results.json",
    }  # fmt: skip
    card = (out / "README.md").read_text()
    assert "Never merge it" in card
    assert said["sentence"][1:] in card
    assert isinstance(evenkeel.load(out), RecoveryAdapters)
    (out / "adapters.safetensors").write_bytes(b"")
    with pytest.raises(RecordError, match="changed"):
        evenkeel.load(out)
