"""The nodes inside a real ComfyUI, on a CPU: contract, parity with diffusers, what is left behind.

    EVENKEEL_COMFYUI=<checkout> python tests/integrations/real_comfyui.py

in an environment that can import both; prints one JSON object. ``test_real_comfyui.py`` runs it.
EVENKEEL_COMFYUI_GGUF=<checkout of ComfyUI-GGUF> adds that loader's layers.
"""

# ruff: noqa: E402
from __future__ import annotations

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
import comfy.patcher_extension
import comfy.samplers
import folder_paths
import torch
from comfyui_tiny import CHANNELS, flux_of
from made_adapters import made_adapters

import evenkeel
from evenkeel.corrections import EpsilonScaling
from evenkeel.hosts.recognition import in_comfyui, recognition
from evenkeel.record.lora_file import write_lora

torch.set_num_threads(1)
SIDE, STEPS = 8, 4


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
        found[name] = {
            "patcher": type(patcher).__name__,
            "bare": apart(before, bare),
            "changes": apart(expected, bare),
            "parity": apart(got, expected),
            "left behind": float((sampled(patcher, *given) - before).abs().max()),
        }
    return found


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


def sampled(patcher, embeds, pooled, sigmas, noise, name="euler", cfg=1.0, negative=None):
    guider = comfy.samplers.CFGGuider(patcher)
    extra = {"pooled_output": pooled, "guidance": 3.5}
    guider.set_conds(
        [[embeds, dict(extra)]], [[embeds if negative is None else negative, dict(extra)]]
    )
    guider.set_cfg(cfg)
    with torch.no_grad():
        return guider.sample(
            noise,
            torch.zeros_like(noise),
            comfy.samplers.sampler_object(name),
            sigmas,
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
            "with": [
                ("EvenkeelRecover", {"file": "adapters.safetensors", "strength": 1.0, "check_base": True}),
                ("EvenkeelReadout", {"file": "readout.safetensors", "strength": 1.0, "allow_range": True}),
                ("EvenkeelCorrect", {"file": "record.safetensors", "correction": "exact-drift",
                                     "allow_range": True, "check_guidance": True}),
            ],
        }  # fmt: skip
        for name, chain in ours.items():
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
            job = ask("prompt", {"prompt": flow})["prompt_id"]
            while job not in (history := ask(f"history/{job}")):
                time.sleep(0.2)
            picture = next((work / "output").glob(f"{name}_*.png"), None)
            found[name] = {
                "status": history[job]["status"]["status_str"],
                "picture": picture and hashlib.sha256(picture.read_bytes()).hexdigest()[:12],
                "said": [m[1].get("exception_message") for m in history[job]["status"]["messages"]
                         if m[0] == "execution_error"],
            }  # fmt: skip
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
    found["three nodes"] = apart(both, bare)
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
