"""The node pack on a stub of what it calls; ``test_real_comfyui.py`` asks the same of the real one."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfyui_model as comfy
import pytest
import torch
from synthetic_record import WHOLE, provenance
from torch import Tensor, nn

import evenkeel
from evenkeel.corrections import (
    D2DPM,
    EpsilonScaling,
    ExactDrift,
    QDrift,
    Readout,
    RecoveryAdapters,
)
from evenkeel.corrections.head_table import HeadTable
from evenkeel.errors import Incompatible, OutOfRange, UnsupportedSampler
from evenkeel.hosts.recognition import in_comfyui, recognition
from evenkeel.low_rank.factors import LayerAdapter, rounded
from evenkeel.record.lora_file import write_lora
from evenkeel.sampling.step_law import StepLaw

PACK = Path(__file__).parents[2] / "integrations" / "comfyui"
STUB = Path(__file__).parents[1] / "helpers" / "comfyui_stub"
SIGMAS = torch.tensor([14.6, 7.3, 14.6 / 3, 0.0])
CHANNELS = 2


@pytest.fixture(scope="module")
def pack() -> Any:
    """The pack as ComfyUI imports it: a package of a name of its own."""
    before = {
        n: m for n, m in sys.modules.items() if n.split(".")[0] in ("comfy_api", "folder_paths")
    }
    sys.path.insert(0, str(STUB))
    spec = importlib.util.spec_from_file_location(
        "evenkeel_nodes", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["evenkeel_nodes"] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(STUB))
        for name in [*sys.modules]:
            if name.split(".")[0] in ("evenkeel_nodes", "comfy_api", "folder_paths"):
                del sys.modules[name]
        sys.modules.update(before)


@pytest.fixture
def folder(pack: Any, tmp_path: Path) -> Path:
    sys.modules["folder_paths"]._folders["evenkeel"] = [str(tmp_path)]
    return tmp_path


class Network(nn.Module):
    """With the names of ComfyUI's PixArt: one fused layer and a head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.blocks = nn.ModuleList([nn.Module()])
        self.blocks[0].attn = nn.Module()
        self.blocks[0].attn.qkv = nn.Linear(8, 24)
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(24, CHANNELS)
        self.x_embedder = nn.Linear(CHANNELS, 8)
        for p in self.parameters():
            nn.init.normal_(p, std=0.4, generator=generator)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.x_embedder(x.movedim(1, -1)) + torch.sin(t.float())[:, None, None, None]
        return self.final_layer.linear(torch.tanh(self.blocks[0].attn.qkv(h))).movedim(-1, 1)


def patcher(
    network: nn.Module | None = None, sampling: Any = None, channels: int = CHANNELS
) -> Any:
    model = comfy.BaseModel(network or Network(), sampling or comfy.NoiseSampling(), channels)
    return comfy.ModelPatcher(model)


def noise(images: int = 1) -> Tensor:
    return torch.randn(images, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(1))


def run(
    model: Any, function: Any = comfy.sample_euler, x: Tensor | None = None, **guider: Any
) -> Tensor:
    x = noise() if x is None else x
    return comfy.Guider(model, **guider).sample(comfy.sampler(function), SIGMAS.clone(), x)


# ---- recover


def _adapters() -> RecoveryAdapters:
    generator = torch.Generator().manual_seed(5)
    layers = [
        LayerAdapter(
            f"transformer_blocks.0.attn1.to_{letter}",
            *(rounded(torch.randn(2, 8, generator=generator) * 0.3, 16) for _ in range(2)),
        )
        for letter in "qkv"
    ]
    return RecoveryAdapters(
        provenance(pipeline_class="PixArtSigmaPipeline"), "local", 16, tuple(layers)
    )


class Unfused(nn.Module):
    """The same network as diffusers names it."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        block = self.transformer_blocks = nn.ModuleList([nn.Module()])
        block[0].attn1 = nn.Module()
        qkv = network.blocks[0].attn.qkv
        for i, letter in enumerate("qkv"):
            layer = nn.Linear(8, 8)
            layer.weight.data = qkv.weight.data[8 * i : 8 * i + 8].clone()
            layer.bias.data = qkv.bias.data[8 * i : 8 * i + 8].clone()
            setattr(block[0].attn1, f"to_{letter}", layer)


def _write(folder: Path, network: Network, name: str = "a.safetensors") -> RecoveryAdapters:
    adapters = _adapters()
    known = recognition(Unfused(network), [a.name for a in adapters.layers])
    write_lora(adapters, folder / name, "comfyui", in_comfyui(known, "PixArtSigmaPipeline"))
    return adapters


def _recover(pack: Any, model: Any, strength: float = 1.0, check: bool = True) -> Any:
    return (
        sys.modules["evenkeel_nodes.nodes"]
        .EvenkeelRecover.execute(model, "a.safetensors", strength, check)
        .args[0]
    )


def test_recover_adds_what_the_adapters_are(pack: Any, folder: Path) -> None:
    network = Network()
    adapters = _write(folder, network)
    model = patcher(network)
    before = run(model)
    merged = Network()
    for i, a in enumerate(adapters.layers):
        change = a.up.dense().T @ a.down.dense()
        merged.blocks[0].attn.qkv.weight.data[8 * i : 8 * i + 8] += change
    recovered = _recover(pack, model)
    torch.testing.assert_close(run(recovered), run(patcher(merged)), rtol=1e-4, atol=1e-4)
    assert (run(recovered) - before).abs().max() > 0.1
    assert torch.equal(run(model), before)  # the model without the node is what it was
    assert torch.equal(run(_recover(pack, model, 0.0)), before)
    half = (run(_recover(pack, model, 0.5)) - before).abs().max()
    assert 0 < half < (run(recovered) - before).abs().max()


def test_recover_treats_every_image_and_order_of_branches_alike(pack: Any, folder: Path) -> None:
    network = Network()
    _write(folder, network)
    model = _recover(pack, patcher(network))
    both = noise(2)
    whole = run(model, x=both, cfg=4.0)
    assert torch.allclose(whole[1:], run(model, x=both[1:], cfg=4.0), atol=1e-5)
    assert torch.allclose(whole, run(model, x=both, cfg=4.0, order=(0, 1)), atol=1e-5)


def test_recover_refuses_another_base(pack: Any, folder: Path) -> None:
    _write(folder, Network())
    with pytest.raises(Incompatible, match="another quantization"):
        _recover(pack, patcher(Network(seed=1)))
    _recover(pack, patcher(Network(seed=1)), check=False)
    wider = Network()
    wider.blocks[0].attn.qkv = nn.Linear(8, 32)
    with pytest.raises(Incompatible, match=r"expected a layer 'blocks.0.attn.qkv' of \(24, 8\)"):
        _recover(pack, patcher(wider))
    write_lora(_adapters(), folder / "a.safetensors", "comfyui")
    with pytest.raises(Incompatible, match="turn check_base off"):
        _recover(pack, patcher())


def test_recover_refuses_merging_twice_and_compiled(pack: Any, folder: Path) -> None:
    network = Network()
    _write(folder, network)
    model = patcher(network)
    with pytest.raises(Incompatible, match="one node is enough"):
        _recover(pack, _recover(pack, model))
    factors, _ = sys.modules["evenkeel_nodes.recover"].read(folder / "a.safetensors")
    down, up = factors["blocks.0.attn.qkv"]
    merged = model.clone()
    patch = type("Adapter", (), {"weights": (up, down, 6.0)})()
    merged.patches = {"diffusion_model.blocks.0.attn.qkv.weight": [(1.0, patch, 1.0, None, None)]}
    with pytest.raises(Incompatible, match=r"merged into blocks\.0\.attn\.qkv"):
        _recover(pack, merged)
    compiled = _recover(pack, model)
    compiled.add_wrapper_with_key("apply_model", "torch.compile", lambda run, *a, **k: run(*a, **k))
    with pytest.raises(Incompatible, match="compiled"):
        run(compiled)


def test_recover_reads_only_what_export_writes(pack: Any, folder: Path) -> None:
    write_lora(_adapters(), folder / "a.safetensors", "peft")
    with pytest.raises(Incompatible, match="evenkeel export"):
        _recover(pack, patcher())


def test_two_workflows_on_the_same_weights(pack: Any, folder: Path) -> None:
    """One pauses inside its model call while the other samples."""
    network = Network()
    _write(folder, network)
    plain, recovered = patcher(network), _recover(pack, patcher(network))
    expected, seen = run(plain), []
    import threading

    def other(executor: Any, *arguments: Any, **named: Any) -> Any:
        thread = threading.Thread(target=lambda: seen.append(run(plain)))
        thread.start()
        thread.join()
        return executor(*arguments, **named)

    recovered.add_wrapper_with_key("apply_model", "other", other)
    run(recovered)
    assert len(seen) == 3
    assert all(torch.equal(found, expected) for found in seen)


# ---- correct


def _record(**changes: Any) -> Any:
    made_for = provenance(
        pipeline_class="PixArtSigmaPipeline",
        sigma=SIGMAS[:-1].tolist(),
        **{"guidance": "1", **changes},
    )
    return replace(WHOLE, provenance=made_for, law=None)


def _corrected(
    pack: Any, correction: Any, model: Any = None, record: Any = None, **options: Any
) -> Any:
    given = {"allow_range": False, "check_guidance": True, **options}
    correct = sys.modules["evenkeel_nodes.correct"].correct
    return correct(model or patcher(), correction, (record or _record()).provenance, **given)


def _by_hand(correction: Any, function: Any) -> Tensor:
    """The plan carried out in a loop of our own, from the law of the sampler."""
    network, sampling = Network(), comfy.NoiseSampling()
    read = sys.modules["evenkeel_nodes.sampling"]
    recipe = read.read_recipe(comfy.sampler(function), comfy.Guider(patcher()), SIGMAS)
    law, _ = read.law_of(recipe, sampling, SIGMAS, "epsilon")
    plan = correction.plan(law)
    x, samples, outputs = noise() * SIGMAS[0], [], []
    for k, sigma in enumerate(SIGMAS[:-1]):
        with torch.no_grad():
            output = network(
                sampling.calculate_input(sigma.reshape(1), x), sampling.timestep(sigma).reshape(1)
            )
        if plan.edit is not None:
            gain, of_sample, bias = (
                values[k].float().reshape(1, -1, 1, 1)
                for values in (plan.edit.gain, plan.edit.sample, plan.edit.bias)
            )
            output = output * gain + of_sample * x + bias
        samples.append(x)
        outputs.append(output)
        base = sum(
            float(law.sample_weights[k, j]) * samples[j]
            + float(law.output_weights[k, j]) * outputs[j]
            for j in range(k + 1)
        )
        x = base
        if plan.active[k]:
            x = base * plan.base[k].float().reshape(1, -1, 1, 1)
            for lag in range(plan.samples.shape[1]):
                if lag <= k:
                    x = x + plan.samples[k, lag].float().reshape(1, -1, 1, 1) * samples[k - lag]
                    x = x + plan.outputs[k, lag].float().reshape(1, -1, 1, 1) * outputs[k - lag]
    return x


@pytest.mark.parametrize("function", [comfy.sample_euler, comfy.sample_dpmpp_2m])
@pytest.mark.parametrize("kind", [QDrift, ExactDrift, D2DPM, EpsilonScaling])
def test_correct_carries_the_plan_out(pack: Any, kind: Any, function: Any) -> None:
    correction = kind(1.02) if kind is EpsilonScaling else kind(_record().evidence)
    found = run(_corrected(pack, correction), function)
    torch.testing.assert_close(found, _by_hand(correction, function), rtol=1e-4, atol=1e-4)
    assert (found - run(patcher(), function)).abs().max() > 1e-3


def test_a_scaled_output_of_euler_against_its_own_loop(pack: Any) -> None:
    """Epsilon scaling divides the noise that is found: denoised' = x - (x - denoised) / s."""
    scale = 1.02

    def scaled(model: Any, x: Tensor, sigmas: Tensor, **_: Any) -> Tensor:
        for here, there in itertools.pairwise(sigmas):
            slope = (x - model(x, here * x.new_ones(len(x)))) / here / scale
            x = x + slope * (there - here)
        return x

    found = run(_corrected(pack, EpsilonScaling(scale)))
    torch.testing.assert_close(found, run(patcher(), scaled), rtol=1e-4, atol=1e-4)
    assert (found - run(patcher())).abs().max() > 1e-2


def test_a_sampler_that_mixes_in_the_default_dtype(pack: Any) -> None:
    """Epsilon scaling again, of a multistep sampler that cannot be read in float64."""
    scale, function = 1.02, comfy.sample_default_dtype
    with pytest.raises(RuntimeError, match="dtype"):
        function(lambda x, s: x, torch.ones(1, 1, dtype=torch.float64), SIGMAS.double())

    def scaled(model: Any, x: Tensor, sigmas: Tensor, **rest: Any) -> Tensor:
        return function(lambda y, s: y - (y - model(y, s)) / scale, x, sigmas, **rest)

    read = sys.modules["evenkeel_nodes.sampling"]
    given = SIGMAS.clone()
    read.read_recipe(comfy.sampler(function), comfy.Guider(patcher()), given)
    assert torch.equal(given, SIGMAS)
    found = run(_corrected(pack, EpsilonScaling(scale)), function)
    torch.testing.assert_close(found, run(patcher(), scaled), rtol=1e-4, atol=1e-4)
    assert (found - run(patcher(), function)).abs().max() > 1e-2


def test_correct_leaves_an_identity_and_a_bare_model_alone(pack: Any) -> None:
    model = patcher()
    before = run(model)
    assert torch.equal(run(_corrected(pack, EpsilonScaling(1.0), model)), before)
    _corrected(pack, EpsilonScaling(1.05), model)
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("function", [comfy.sample_heun, comfy.sample_euler_ancestral])
def test_correct_refuses_samplers_that_it_cannot_read(pack: Any, function: Any) -> None:
    model = _corrected(pack, QDrift(_record().evidence))
    state = torch.get_rng_state()
    with pytest.raises(UnsupportedSampler, match=function.__name__.removeprefix("sample_")):
        run(model, function)
    assert torch.equal(torch.get_rng_state(), state)


def test_correct_refuses_what_it_was_not_made_for(pack: Any) -> None:
    correction = QDrift(_record().evidence)
    with pytest.raises(Incompatible, match="2 latent channels; this model has 16"):
        _corrected(pack, correction, patcher(channels=16))
    with pytest.raises(Incompatible, match="calibrated at cfg 1, this run has 4"):
        run(_corrected(pack, correction), cfg=4.0)
    run(_corrected(pack, correction, check_guidance=False), cfg=4.0)
    with pytest.raises(Incompatible, match="outputs are 'epsilon'"):
        run(_corrected(pack, correction, patcher(sampling=comfy.FlowSampling())))
    with pytest.raises(Incompatible, match="one node is enough"):
        _corrected(pack, correction, _corrected(pack, correction))
    far = patcher()
    with pytest.raises(OutOfRange):
        comfy.Guider(_corrected(pack, correction, far)).sample(
            comfy.sampler(comfy.sample_euler), SIGMAS * 0.02, noise()
        )


def test_the_recipe_of_euler_is_its_formula(pack: Any) -> None:
    read = sys.modules["evenkeel_nodes.sampling"]
    recipe = read.read_recipe(comfy.sampler(comfy.sample_euler), comfy.Guider(patcher()), SIGMAS)
    ratio = (SIGMAS[1:] / SIGMAS[:-1]).double().numpy()
    assert abs(recipe.ratio - ratio).max() < 1e-6
    assert abs(recipe.weights.diagonal() - (1 - ratio)).max() < 1e-6
    law, _ = read.law_of(recipe, comfy.NoiseSampling(), SIGMAS, "epsilon")
    assert isinstance(law, StepLaw)
    assert abs(law.sample_weights.diagonal() - 1).max() < 1e-6
    assert (
        abs(law.output_weights.diagonal() - (SIGMAS[1:] - SIGMAS[:-1]).double().numpy()).max()
        < 1e-5
    )


# ---- readout


def _readout(branches: int = 1, guidance: str = "3 -2") -> Any:
    generator = torch.Generator().manual_seed(9)
    steps = len(SIGMAS) - 1
    weight = torch.randn(steps, branches, 24, CHANNELS, generator=generator) * 0.2
    constant = torch.randn(steps, branches, CHANNELS, generator=generator) * 0.2
    table = HeadTable.of(
        [1.0] * steps,
        SIGMAS[:-1].tolist(),
        weight,
        constant,
        torch.ones(steps, branches, dtype=torch.bool),
    )
    made_for = _record(trajectory="corrected", guidance=guidance).provenance
    return Readout(made_for, "proj_out", "per-step", table, (), None)


def _with_readout(pack: Any, model: Any, readout: Any, strength: float = 1.0) -> Any:
    return sys.modules["evenkeel_nodes.readout"].apply_readout(model, readout, strength, False)


def test_readout_uses_the_head_of_each_level(pack: Any) -> None:
    readout, model = _readout(), patcher()
    plain, calls = Network(), []

    def changed(x: Tensor, t: Tensor) -> Tensor:
        weight, constant = readout.table.entry(len(calls))
        calls.append(t)
        head = plain.final_layer.linear
        kept = head.weight.data, head.bias.data
        head.weight.data, head.bias.data = kept[0] + weight[0].T, kept[1] + constant[0]
        out = plain(x, t)
        head.weight.data, head.bias.data = kept
        return out

    expected = patcher()
    expected.model.diffusion_model = changed
    found, before = run(_with_readout(pack, model, readout)), run(model)
    torch.testing.assert_close(found, run(expected), rtol=1e-4, atol=1e-4)
    assert len(calls) == 3 and (found - before).abs().max() > 0.1
    assert torch.equal(run(model), before)


def test_readout_with_a_head_per_branch_in_any_order(pack: Any) -> None:
    two = _with_readout(pack, patcher(), _readout(branches=2))
    first = run(two, x=noise(2), cfg=3.0, order=(1, 0))
    assert torch.allclose(first, run(two, x=noise(2), cfg=3.0, order=(0, 1)), atol=1e-5)
    one = _with_readout(pack, patcher(), _readout(branches=1))
    assert (first - run(one, x=noise(2), cfg=3.0)).abs().max() > 0.01


@pytest.mark.parametrize(("guidance", "prompted"), [("3 -2", 0), ("-2 3", 1), ("-2 3 rescaled", 1)])
def test_the_head_of_the_prompt_is_that_of_the_larger_share(
    pack: Any, guidance: str, prompted: int
) -> None:
    both = _readout(branches=2, guidance=guidance)
    t = both.table
    own = (part[:, prompted, None] for part in (t.weight, t.scale, t.constant, t.active))
    alone = replace(both, table=HeadTable(t.alpha, t.sigma, *own))
    found = run(_with_readout(pack, patcher(), both))  # cfg 1: the prompt alone
    assert torch.equal(found, run(_with_readout(pack, patcher(), alone)))


@pytest.mark.parametrize("guidance", ["", "not linear", "5"])
def test_heads_per_call_are_refused_where_nobody_knows_whose_they_are(
    pack: Any, guidance: str
) -> None:
    with pytest.raises(Incompatible, match="which of them has the prompt"):
        _with_readout(pack, patcher(), _readout(branches=2, guidance=guidance))


def test_readout_refuses_another_head_and_unknown_levels(pack: Any) -> None:
    wider = Network()
    wider.final_layer.linear = nn.Linear(24, 8)
    with pytest.raises(Incompatible, match=r"final_layer\.linear"):
        _with_readout(pack, patcher(wider), _readout())
    with pytest.raises(OutOfRange):
        comfy.Guider(_with_readout(pack, patcher(), _readout())).sample(
            comfy.sampler(comfy.sample_euler), SIGMAS * 0.02, noise()
        )


# ---- the pack


def test_several_nodes_on_one_model(pack: Any, folder: Path) -> None:
    network = Network()
    _write(folder, network)
    steps = {
        "recover": lambda m: _recover(pack, m),
        "readout": lambda m: _with_readout(pack, m, _readout()),
        "correct": lambda m: _corrected(pack, EpsilonScaling(1.02), m),
    }
    orders = (("recover", "readout", "correct"), ("correct", "recover", "readout"))
    found = []
    for order in orders:
        model = patcher(network)
        for name in order:
            model = steps[name](model)
        found.append(run(model))
    assert torch.allclose(*found, atol=1e-4)
    assert (found[0] - run(steps["readout"](patcher(network)))).abs().max() > 1e-3


def test_schemas_and_inspect(pack: Any, folder: Path) -> None:
    network = Network()
    _write(folder, network)
    evenkeel.save(_record(), folder / "record.safetensors")
    evenkeel.save(_readout(), folder / "readout.safetensors")
    found = asyncio.run(pack.comfy_entrypoint())
    kinds = {node.define_schema().node_id: node for node in asyncio.run(found.get_node_list())}
    assert sorted(kinds) == [
        "EvenkeelCorrect",
        "EvenkeelInspect",
        "EvenkeelReadout",
        "EvenkeelRecover",
    ]
    (files, *_) = [i for i in kinds["EvenkeelRecover"].define_schema().inputs if i.id == "file"]
    assert files.settings["options"] == [
        "a.safetensors",
        "readout.safetensors",
        "record.safetensors",
    ]
    for name, said in (
        ("a", "beside 1 layers"),
        ("record", "5 prompts"),
        ("readout", "per-step readout"),
    ):
        text, picture = kinds["EvenkeelInspect"].execute(f"{name}.safetensors").args
        assert said in text
        assert picture.shape == (1, 320, 640, 3) and picture.std() > 0
    with pytest.raises(Incompatible, match="holds a Readout, expected a Record"):
        kinds["EvenkeelCorrect"].execute(patcher(), "readout.safetensors", "q-drift", False, True)
    corrected = kinds["EvenkeelCorrect"].execute(
        patcher(), "record.safetensors", "q-drift", False, True
    )
    assert (run(corrected.args[0]) - run(patcher())).abs().max() > 1e-3


@pytest.mark.parametrize(
    "place", sorted((PACK / "example_workflows").glob("*.json")), ids=lambda p: p.stem
)
def test_example_workflows_are_whole(pack: Any, folder: Path, place: Path) -> None:
    """Every link joins an output to an input that exist, of the same type; our nodes have our inputs."""
    flow = json.loads(place.read_text())
    nodes = {node["id"]: node for node in flow["nodes"]}
    assert len(nodes) == len(flow["nodes"])
    for link, source, slot, target, entry, kind in flow["links"]:
        out, given = nodes[source]["outputs"][slot], nodes[target]["inputs"][entry]
        assert link in out["links"] and given["link"] == link
        assert out["type"] == given["type"] == kind
    kinds = {n.define_schema().node_id: n.define_schema() for n in _all(pack)}
    ours = [node for node in nodes.values() if node["type"].startswith("Evenkeel")]
    assert ours
    for node in ours:
        widgets = [i for i in kinds[node["type"]].inputs if i.id != "model"]
        assert len(node["widgets_values"]) == len(widgets)


def _all(pack: Any) -> Any:
    return asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
