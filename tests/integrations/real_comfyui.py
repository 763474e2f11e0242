"""The nodes inside a real ComfyUI, on a CPU: contract, parity with diffusers, what is left behind.

    EVENKEEL_COMFYUI=<checkout> python tests/integrations/real_comfyui.py

in an environment that can import both; prints one JSON object. ``test_real_comfyui.py`` runs it.
EVENKEEL_COMFYUI_GGUF=<checkout of ComfyUI-GGUF> adds that loader's layers.
"""

# ruff: noqa: E402
from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import inspect
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMFY = os.environ["EVENKEEL_COMFYUI"]
sys.argv = ["main.py", "--cpu"]
sys.path[:0] = [
    COMFY,
    str(ROOT / "src"),
    str(ROOT / "tests" / "helpers"),
    str(ROOT / "tests" / "integrations"),
]
os.environ["HF_HUB_OFFLINE"] = "1"

import tiny_pipelines

# What ComfyUI needs and this environment lacks; after transformers has looked for torchvision.
sys.path[1:1] = filter(None, os.environ.get("EVENKEEL_COMFYUI_ALSO", "").split(os.pathsep))
import comfy.options

comfy.options.enable_args_parsing()
import comfy.model_base
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import comfy.samplers
import folder_paths
import numpy as np
import torch
from comfyui_tiny import CHANNELS, flux_of
from made_adapters import made_adapters
from PIL import Image

import evenkeel
from evenkeel.corrections import Composite, EpsilonScaling
from evenkeel.hosts.recognition import in_comfyui, recognition
from evenkeel.record.lora_file import write_lora

torch.set_num_threads(1)
SIDE, STEPS = 8, 4
READY = {}  # what main has made for the parts


def pack(place=ROOT / "integrations" / "comfyui", name="evenkeel_nodes"):
    """The nodes of a pack as ComfyUI imports it."""
    spec = importlib.util.spec_from_file_location(
        name, place / "__init__.py", submodule_search_locations=[str(place)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return sys.modules[f"{name}.nodes"]


def gguf_loader(place, work, nodes, tiny, run, noise):
    """Recover beside the layers of ComfyUI-GGUF: parity with diffusers' own GGUF layers, what stays."""
    import gguf
    from quantized_by import BACKENDS

    theirs = pack(Path(place), "gguf_pack")
    ops = sys.modules["gguf_pack.ops"]
    pipe, reference = tiny.pipe, tiny.pipe.transformer
    found = {}
    for name in ("Q4_0", "Q8_0"):
        kind = gguf.GGMLQuantizationType[name]

        def packed(key, value, kind=kind):
            if value.ndim != 2 or value.shape[1] % 32:
                return value
            blocks = torch.from_numpy(gguf.quants.quantize(value.numpy(), kind))
            return ops.GGMLTensor(blocks, tensor_type=kind, tensor_shape=value.shape)

        quantized = BACKENDS[f"gguf {name}"][1](reference, ("x_embedder",))
        adapters = made_adapters(reference, size=0.2)
        known = recognition(quantized, [a.name for a in adapters.layers])
        file = write_lora(
            adapters, work / f"{name}.safetensors", "comfyui", in_comfyui(known, "FluxPipeline")
        )
        patcher = flux_of(reference.state_dict(), ops.GGMLOps(), packed)
        patcher = theirs.GGUFModelPatcher.clone(patcher)
        found[name] = {
            "patcher": type(patcher).__name__,
            **recovered(nodes, patcher, file, pipe, quantized, adapters, run, noise),
        }
    return found


def recovered(nodes, patcher, file, pipe, quantized, adapters, run, noise):
    """Recover on a quantized model of ComfyUI beside the same adapters on the same one in diffusers."""
    reference = pipe.transformer
    pipe.transformer = quantized
    with evenkeel.applied(pipe, adapters, allow=("denoiser",)):
        expected = unpacked(pipe(**run)[0])
    bare = unpacked(pipe(**run)[0])
    pipe.transformer = reference
    given = (
        run["prompt_embeds"],
        run["pooled_prompt_embeds"],
        pipe.scheduler.sigmas.clone(),
        noise,
    )
    before = sampled(patcher, *given)
    got = sampled(nodes.EvenkeelRecover.execute(patcher, file.name, 1.0, True).args[0], *given)
    return {
        "quantized": apart(bare, unpacked(pipe(**run)[0])),
        "bare": apart(before, bare),
        "changes": apart(expected, bare),
        "parity": apart(got, expected),
        "left behind": float((sampled(patcher, *given) - before).abs().max()),
    }


FORMATS = {  # of ComfyUI's checkpoints -> layout of comfy-kitchen
    "float8_e4m3fn": "TensorCoreFP8Layout",
    "int8_tensorwise": "TensorWiseINT8Layout",
    "nvfp4": "TensorCoreNVFP4Layout",
    "mxfp8": "TensorCoreMXFP8Layout",
}


def checkpoints(work, nodes, tiny, run, noise):
    """Recover beside layers of ComfyUI's own quantized checkpoints; diffusers reads the same files."""
    import comfy.utils
    from comfy_kitchen.tensor import QuantizedTensor

    from evenkeel.hosts.comfy_checkpoint import load_comfy, write_comfy

    pipe, reference = tiny.pipe, tiny.pipe.transformer
    theirs = flux_of(reference.state_dict()).model.diffusion_model.state_dict()
    found = {}
    for name, layout in FORMATS.items():
        file = write_comfy(
            {
                key: QuantizedTensor.from_float(value, layout)
                if "_blocks" in key and key.endswith(".weight") and value.ndim == 2
                else value
                for key, value in theirs.items()
            },
            work / f"{name}-model.safetensors",
        )
        quantized = load_comfy(file, reference, "FluxPipeline")
        adapters = made_adapters(reference, size=0.2)
        known = recognition(quantized, [a.name for a in adapters.layers])
        lora = write_lora(
            adapters, work / f"{name}.safetensors", "comfyui", in_comfyui(known, "FluxPipeline")
        )
        state, metadata = comfy.utils.load_torch_file(str(file), return_metadata=True)
        state, _ = comfy.utils.convert_old_quants(state, "", metadata)
        patcher = flux_of(reference.state_dict(), checkpoint=state)
        kinds = {
            type(layer.weight).__name__
            for layer in patcher.model.diffusion_model.modules()
            if getattr(layer, "weight", None) is not None
        }
        found[name] = {
            "weights": sorted(kinds),
            **recovered(nodes, patcher, lora, pipe, quantized, adapters, run, noise),
        }
    return found


def guidance(nodes, tiny, quantized, patcher, work, run, packed):
    """With a negative prompt: both branches in one call, apart, and in the other order."""
    pipe = tiny.pipe
    negative, pooled, _ = pipe.encode_prompt(
        ["a blurry picture of something"], None, max_sequence_length=run["max_sequence_length"]
    )
    more = {
        "true_cfg_scale": 2.0,
        "negative_prompt_embeds": negative,
        "negative_pooled_prompt_embeds": pooled,
    }
    fitted = {
        "quantized": quantized, "prompts": [f"picture {i}" for i in range(6)], "batch_size": 1,
        "num_inference_steps": STEPS, "guidance_scale": 3.5, "progress": False,
        "call": {**tiny.call, "true_cfg_scale": 2.0, "negative_prompt": "a blurry picture"},
    }  # fmt: skip
    pipe.transformer = READY["reference"]
    readout = evenkeel.fit_readout(pipe, **fitted)
    record = evenkeel.calibrate(pipe, **fitted)
    pipe.transformer = quantized
    evenkeel.save(readout, work / "readout-cfg.safetensors")
    evenkeel.save(record, work / "record-cfg.safetensors")
    arms = {
        "bare": (None, lambda m: m),
        "recover": (
            READY["adapters"],
            lambda m: nodes.EvenkeelRecover.execute(m, "adapters.safetensors", 1.0, True).args[0],
        ),
        "correct": (
            EpsilonScaling(),
            lambda m: nodes.EvenkeelCorrect.execute(
                m, "record-cfg.safetensors", "epsilon-scaling", False, True
            ).args[0],
        ),
        "readout": (
            readout,
            lambda m: nodes.EvenkeelReadout.execute(m, "readout-cfg.safetensors", 1.0, False).args[
                0
            ],
        ),
    }
    found = {"guidance": readout.provenance.guidance, "heads per step": readout.table.branches}
    sigmas = pipe.scheduler.sigmas.clone()
    noise = unpacked(packed)
    needed = patcher.model.memory_required
    for name, (correction, node) in arms.items():
        given = {**run, **more, "latents": packed}
        if correction is None:
            expected = plain = unpacked(pipe(**given)[0])
        else:
            with evenkeel.applied(pipe, correction, allow=("denoiser",)):
                expected = unpacked(pipe(**given)[0])
        model = node(patcher)
        seen = []
        layouts = {}
        for layout in ("joined", "apart", "other order"):
            other = watched(model, seen, layout == "other order")
            patcher.model.memory_required = (lambda *_, **__: 1e30) if layout == "apart" else needed
            layouts[layout] = apart(
                sampled(
                    other, run["prompt_embeds"], run["pooled_prompt_embeds"], sigmas, noise, cfg=2.0,
                    negative=negative, negative_pooled=pooled,
                ),
                expected,
            )  # fmt: skip
        patcher.model.memory_required = needed
        found[name] = {"changes": apart(expected, plain), "parity": layouts}
        found["orders"] = sorted({tuple(order) for order in seen})
    return found


def watched(model, seen, other_order):
    """A clone that notes in what order the branches come, and may change it, as other nodes do."""
    clone = model.clone()

    def call(apply_model, arguments):
        x, t, c = arguments["input"], arguments["timestep"], arguments["c"]
        order = arguments["cond_or_uncond"]
        if not other_order or len(order) == 1:
            seen.append(order)
            return apply_model(x, t, **c)

        def turned(value):
            if isinstance(value, torch.Tensor) and len(value) == len(x):
                return torch.cat(value.chunk(len(order))[::-1])
            return value

        options = {**c["transformer_options"], "cond_or_uncond": order[::-1]}
        seen.append(order[::-1])
        rest = {k: turned(v) for k, v in c.items() if k != "transformer_options"}
        return turned(apply_model(turned(x), turned(t), **rest, transformer_options=options))

    clone.set_model_unet_function_wrapper(call)
    return clone


def in_turn(patcher, execute, given):
    """Two chains of nodes and none, again and again on one model; ComfyUI runs one at a time."""
    models = [
        execute["recover"](patcher).args[0],
        execute["correct"](execute["readout"](patcher).args[0]).args[0],
        patcher,
    ]
    before, first = bits(patcher), [sampled(m, *given) for m in models]
    found = [float((sampled(m, *given) - x).abs().max())
             for m, x in [*zip(models, first, strict=True)] * 2]  # fmt: skip
    return {"differ": max(found), "model bit-equal": bits(patcher) == before}


def scaled_by_hand(nodes, patcher, given, name):
    """Epsilon scaling of a sampler, by the node and by a function of the model's answers."""
    node = nodes.EvenkeelCorrect.execute(
        patcher, "record.safetensors", "epsilon-scaling", False, True
    ).args[0]
    hand = patcher.clone()

    def scaled(said):
        x, sigma = said["input"], float(said["sigma"].flatten()[0])
        if sigma > 1 - 1e-6:  # pure noise: it does not depend on the answer
            return said["denoised"]
        noise = (x - (1 - sigma) * said["denoised"]) / EpsilonScaling().factor
        return (x - noise) / (1 - sigma)

    hand.set_model_sampler_post_cfg_function(scaled)
    found, expected = sampled(node, *given, name), sampled(hand, *given, name)
    return {
        "parity": apart(found, expected),
        "changes": apart(expected, sampled(patcher, *given, name)),
    }


def bits(patcher):
    """A digest of all weights."""
    running = hashlib.sha256()
    for name, value in sorted(patcher.model.state_dict().items()):
        running.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return running.hexdigest()


def apart(a, b):
    """Largest difference over the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def plain(quantized, like):
    """The same network with dense weights on the quantized ones' grid."""
    import copy

    dense = copy.deepcopy(like)
    for name, layer in dense.named_modules():
        if isinstance(layer, torch.nn.Linear):
            found = quantized.get_submodule(name)
            layer.weight.data = found.weight.detach().float().clone()
    return dense


def unpacked(latents):
    n, tokens, _ = latents.shape
    side = int(tokens**0.5)
    x = latents.reshape(n, side, side, CHANNELS, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(n, CHANNELS, 2 * side, 2 * side)


def sampled(patcher, embeds, pooled, sigmas, noise, name="euler", cfg=1.0, negative=None,
            negative_pooled=None):  # fmt: skip
    guider = comfy.samplers.CFGGuider(patcher)
    extra = {"pooled_output": pooled, "guidance": 3.5}
    other = {**extra, **({} if negative is None else {"pooled_output": negative_pooled})}
    guider.set_conds([[embeds, extra]], [[embeds if negative is None else negative, other]])
    guider.set_cfg(cfg)
    with torch.no_grad():
        return guider.sample(
            noise,
            torch.zeros_like(noise),
            comfy.samplers.sampler_object(name),
            sigmas.clone(),  # uni_pc writes into them
            seed=0,
            disable_pbar=True,
        )


def contract():
    """Every name that the nodes call, with the parameters they give."""
    import comfy_api.latest as api

    asked = {
        "ModelPatcher.add_wrapper_with_key": ["wrapper_type", "key", "wrapper"],
        "ModelPatcher.set_model_sampler_post_cfg_function": ["post_cfg_function"],
        "ModelPatcher.get_model_object": ["name"],
        "ModelPatcher.clone": [],
    }
    import comfyui_model as stub

    missing = []
    for text, names in asked.items():
        kind, method = text.split(".")
        for home in (stub, comfy.model_patcher):
            found = list(inspect.signature(getattr(getattr(home, kind), method)).parameters)[1:]
            if found[: len(names)] != names:
                missing.append(f"{home.__name__}.{text}: {found}")
    kinds = comfy.patcher_extension.WrappersMP
    if (kinds.APPLY_MODEL, kinds.SAMPLER_SAMPLE) != ("apply_model", "sampler_sample"):
        missing.append("names of wrappers")
    for home in (comfy.model_base.BaseModel, stub.BaseModel):
        given = list(inspect.signature(home.apply_model).parameters)
        if given[1:7] != ["x", "t", "c_concat", "c_crossattn", "control", "transformer_options"]:
            missing.append(f"{home}.apply_model: {given}")
    for name in (
        "add_model_folder_path",
        "get_filename_list",
        "get_full_path_or_raise",
        "models_dir",
    ):
        if not hasattr(folder_paths, name):
            missing.append(f"folder_paths.{name}")
    for name in (
        "ComfyNode",
        "Schema",
        "NodeOutput",
        "Model",
        "Combo",
        "Float",
        "Boolean",
        "String",
        "Image",
    ):
        if not hasattr(api.io, name):
            missing.append(f"io.{name}")
    return missing


def server(work, transformer, embeds, pooled, sigmas):
    """Workflows posted to a headless server: the nodes it knows, and a picture with and without them."""
    from safetensors.torch import save_file

    state = {k: v.contiguous() for k, v in transformer.state_dict().items()}
    save_file(state | {"embeds": embeds, "pooled": pooled}, work / "tiny.safetensors")
    for folder in ("custom_nodes", "output", "temp", "user", "input", "models"):
        (work / folder).mkdir()
    (work / "custom_nodes" / "evenkeel").symlink_to(ROOT / "integrations" / "comfyui")
    (work / "custom_nodes" / "tiny").symlink_to(ROOT / "tests" / "integrations" / "comfyui_tiny")
    (work / "models" / "evenkeel").symlink_to(work)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    path = os.pathsep.join(
        filter(None, [str(ROOT / "src"), os.environ.get("EVENKEEL_COMFYUI_ALSO", "")])
    )
    command = [
        sys.executable,
        f"{COMFY}/main.py",
        "--cpu",
        "--disable-api-nodes",
        "--base-directory",
        work,
    ]
    with open(work / "log", "w") as log:
        run = subprocess.Popen(
            [*map(str, command), "--port", str(port), "--database-url", "sqlite:///:memory:"],
            stdout=log,
            stderr=log,
            cwd=work,
            env={**os.environ, "PYTHONPATH": path, "EVENKEEL_TINY": str(work / "tiny.safetensors")},
        )

    def ask(place, data=None):
        body = None if data is None else json.dumps(data).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{place}", body, timeout=30) as answer:
            return json.loads(answer.read())

    try:
        began = time.monotonic()
        while True:
            try:
                known = ask("object_info")
                break
            except OSError:
                if time.monotonic() - began > 120 or run.poll() is not None:
                    raise RuntimeError((work / "log").read_text()[-2000:]) from None
                time.sleep(0.5)
        found = {"seconds to start": round(time.monotonic() - began, 1)}
        found["nodes"] = sorted(n for n in known if n.startswith("Evenkeel"))
        ours = {
            "without": [],
            "recover": [
                ("EvenkeelRecover", {"file": "adapters.safetensors", "strength": 0.5, "check_base": True}),
            ],
            "with": [
                ("EvenkeelRecover", {"file": "adapters.safetensors", "strength": 1.0, "check_base": True}),
                ("EvenkeelReadout", {"file": "readout.safetensors", "strength": 1.0, "allow_range": True}),
                ("EvenkeelCorrect", {"file": "record.safetensors", "correction": "exact-drift",
                                     "allow_range": True, "check_guidance": True}),
            ],
        }  # fmt: skip

        def flow_of(name, chain):
            flow = {"1": {"class_type": "TinyFlux", "inputs": {}}}
            for i, (kind, inputs) in enumerate(chain, 2):
                flow[str(i)] = {"class_type": kind, "inputs": {**inputs, "model": [str(i - 1), 0]}}
            last = str(len(flow))
            flow["20"] = {"class_type": "KSampler", "inputs": {
                "model": [last, 0], "seed": 7, "steps": STEPS, "cfg": 1.0, "sampler_name": "euler",
                "scheduler": "simple", "positive": ["1", 1], "negative": ["1", 1],
                "latent_image": ["1", 2], "denoise": 1.0}}  # fmt: skip
            flow["21"] = {"class_type": "TinyDecode", "inputs": {"samples": ["20", 0]}}
            flow["22"] = {
                "class_type": "SaveImage",
                "inputs": {"images": ["21", 0], "filename_prefix": name},
            }
            if chain:
                flow["23"] = {
                    "class_type": "EvenkeelInspect",
                    "inputs": {"file": "record.safetensors"},
                }
            return flow

        def finished(name, job):
            while job not in (history := ask(f"history/{job}")):
                time.sleep(0.2)
            picture = next((work / "output").glob(f"{name}_*.png"), None)
            # The picture alone: a file holds its workflow, too.
            pixels = picture and np.asarray(Image.open(picture)).tobytes()
            return {
                "status": history[job]["status"]["status_str"],
                "picture": pixels and hashlib.sha256(pixels).hexdigest()[:12],
                "said": [m[1].get("exception_message") for m in history[job]["status"]["messages"]
                         if m[0] == "execution_error"],
            }  # fmt: skip

        # One after the other, then all of them queued at once on the model that is loaded.
        for name, chain in ours.items():
            job = ask("prompt", {"prompt": flow_of(name, chain)})["prompt_id"]
            found[name] = finished(name, job)
        queued = {
            f"queued {name}": ask("prompt", {"prompt": flow_of(f"queued {name}", chain)})[
                "prompt_id"
            ]
            for name, chain in ours.items()
        }
        found |= {name: finished(name, job) for name, job in queued.items()}
    finally:
        run.terminate()
        run.wait(30)
    return found


def main():
    nodes = pack()
    work = Path(tempfile.mkdtemp())
    folder_paths.add_model_folder_path("evenkeel", str(work))
    tiny = tiny_pipelines.flux()
    pipe, reference = tiny.pipe, tiny.pipe.transformer
    rounded, _ = evenkeel.quantize_module(reference, evenkeel.QuantizerSpec.parse("w3a16-g16"))
    quantized = plain(rounded, reference)
    fitted = {
        "quantized": quantized, "prompts": [f"picture {i}" for i in range(6)],
        "num_inference_steps": STEPS, "guidance_scale": 3.5, "call": tiny.call, "progress": False,
    }  # fmt: skip
    record = evenkeel.calibrate(pipe, **fitted)
    readout = evenkeel.fit_readout(pipe, **fitted)
    adapters = made_adapters(quantized, size=0.2)
    evenkeel.save(record, work / "record.safetensors")
    evenkeel.save(readout, work / "readout.safetensors")
    known = in_comfyui(recognition(quantized, [a.name for a in adapters.layers]), "FluxPipeline")
    write_lora(adapters, work / "adapters.safetensors", "comfyui", known)
    READY.update(reference=reference, adapters=adapters)

    pipe.transformer = quantized
    patcher = flux_of(quantized.state_dict())
    embeds, pooled, _ = pipe.encode_prompt(
        ["a cat"], None, max_sequence_length=tiny.call.get("max_sequence_length", 32)
    )
    run = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "guidance_scale": 3.5,
           "num_inference_steps": STEPS, "return_dict": False, **tiny.call}  # fmt: skip
    packed = torch.randn(1, SIDE * SIDE, 16, generator=torch.Generator().manual_seed(3))

    def diffusers():
        final = pipe(latents=packed.clone(), **run)[0]
        return unpacked(final)

    noise = unpacked(packed)
    bare = diffusers()
    sigmas = pipe.scheduler.sigmas.clone()
    found = {"contract": contract(), "sigmas": sigmas.tolist()}

    before = sampled(patcher, embeds, pooled, sigmas, noise)
    found["bare"] = apart(before, bare)
    execute = {
        "recover": lambda m: nodes.EvenkeelRecover.execute(m, "adapters.safetensors", 1.0, True),
        "correct": lambda m: nodes.EvenkeelCorrect.execute(
            m, "record.safetensors", "epsilon-scaling", False, True
        ),
        "readout": lambda m: nodes.EvenkeelReadout.execute(m, "readout.safetensors", 1.0, False),
    }
    applied = {"recover": adapters, "correct": EpsilonScaling(), "readout": readout}
    for name, node in execute.items():
        patched = node(patcher).args[0]
        allow = ("denoiser",) if name == "recover" else ()
        with evenkeel.applied(pipe, applied[name], allow=allow):
            expected = diffusers()
        got = sampled(patched, embeds, pooled, sigmas, noise)
        found[name] = {
            "changes": apart(expected, bare),
            "parity": apart(got, expected),
            "left behind": float(
                (sampled(patcher, embeds, pooled, sigmas, noise) - before).abs().max()
            ),
        }
    three = patcher
    for node in execute.values():
        three = node(three).args[0]
    both = sampled(three, embeds, pooled, sigmas, noise)
    own = dataclasses.replace(adapters, provenance=readout.provenance)
    with evenkeel.applied(pipe, Composite((own, readout, EpsilonScaling()))):
        found["three nodes"] = {"changes": apart(both, bare), "parity": apart(both, diffusers())}
    batch = torch.cat([noise, noise.flip(-1)])
    two = sampled(three, embeds, pooled, sigmas, batch)
    found["batch"] = max(
        apart(two[:1], both), apart(two[1:], sampled(three, embeds, pooled, sigmas, batch[1:]))
    )
    other = flux_of(reference.state_dict())
    refusals = {}
    for name, model in (("foreign base", other), ("twice", three)):
        try:
            execute["recover"](model)
            refusals[name] = "accepted"
        except Exception as e:
            refusals[name] = f"{type(e).__name__}: {e}"
    for name in ("heun", "euler_ancestral", "dpmpp_2m", "ddim", "lms", "uni_pc", "res_multistep"):
        try:
            model = nodes.EvenkeelCorrect.execute(
                patcher, "record.safetensors", "exact-drift", False, True
            ).args[0]
            got = sampled(model, embeds, pooled, sigmas, noise, name)
            refusals[name] = (
                f"corrected, {apart(got, sampled(patcher, embeds, pooled, sigmas, noise, name)):.1e}"
            )
        except Exception as e:
            refusals[name] = f"{type(e).__name__}: {e}"
    found["refusals"] = refusals
    found["corrections"] = {}
    for name in nodes.CORRECTIONS:
        try:
            model = nodes.EvenkeelCorrect.execute(
                patcher, "record.safetensors", name, False, True
            ).args[0]
            found["corrections"][name] = apart(
                sampled(model, embeds, pooled, sigmas, noise), before
            )
        except Exception as e:
            found["corrections"][name] = f"{type(e).__name__}: {e}"
    given = (embeds, pooled, sigmas, noise)
    found["by hand"] = {
        name: scaled_by_hand(nodes, patcher, given, name)
        for name in (
            "euler",
            "dpmpp_2m",
            "ddim",
            "lms",
            "uni_pc",
            "uni_pc_bh2",
            "res_multistep",
            "deis",
        )
    }
    found["in turn"] = in_turn(patcher, execute, given)
    found["with guidance"] = guidance(nodes, tiny, quantized, patcher, work, run, packed)
    if hasattr(comfy.ops, "mixed_precision_ops"):
        pipe.transformer = reference
        given = {**run, "latents": packed}
        found["checkpoints"] = checkpoints(work, nodes, tiny, given, noise)
    if "EVENKEEL_COMFYUI_GGUF" in os.environ:
        pipe.transformer = reference
        given = {**run, "latents": packed}
        place = os.environ["EVENKEEL_COMFYUI_GGUF"]
        found["gguf"] = gguf_loader(place, work, nodes, tiny, given, noise)
    found["server"] = server(work, quantized, embeds, pooled, sigmas)
    said = nodes.EvenkeelInspect.execute("record.safetensors")
    found["inspect"] = [said.args[0].splitlines()[0], list(said.args[1].shape)]
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
