"""Two nodes for tests in a real ComfyUI: a tiny FLUX with what it is told, and a decoder of latents."""

from __future__ import annotations

import os

import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.flux.model import FluxParams

CHANNELS, WIDTH, SIDE = 4, 32, 8


class Latents(comfy.latent_formats.LatentFormat):
    latent_channels = CHANNELS
    scale_factor = 1.0


def flux_of(weights, operations=None, packed=lambda name, value: value, checkpoint=None):
    """ComfyUI's FLUX with the weights of a tiny one of diffusers.

    ``operations``: a loader's own layers; ``packed``: what they keep of a weight. ``checkpoint``: a
    quantized one in ComfyUI's names, whose layers it chooses itself.
    """
    sizes = {
        "image_model": "flux", "in_channels": CHANNELS, "out_channels": CHANNELS, "vec_in_dim": WIDTH,
        "context_in_dim": WIDTH, "hidden_size": WIDTH, "mlp_ratio": 4.0, "num_heads": 4, "depth": 2,
        "depth_single_blocks": 2, "axes_dim": [2, 2, 4], "theta": 10000, "patch_size": 2,
        "qkv_bias": True, "guidance_embed": True,
    }  # fmt: skip
    if "txt_ids_dims" in FluxParams.__dataclass_fields__:  # since 0.4
        sizes["txt_ids_dims"] = []
    config = comfy.supported_models.Flux(dict(sizes))
    config.set_inference_dtype(torch.float32, None)
    config.latent_format = Latents()
    model = comfy.model_base.Flux(config, device=torch.device("cpu")).eval()
    state = {k: v.clone() for k, v in model.diffusion_model.state_dict().items()}
    if operations is not None or checkpoint is not None:
        config.custom_operations = operations
        if checkpoint is not None:
            config.set_inference_dtype(torch.float32, torch.float32)
            config.quant_config = comfy.utils.detect_layer_quantization(checkpoint, "")
        model = comfy.model_base.Flux(config, device=torch.device("cpu")).eval()
    places = comfy.utils.flux_to_diffusers(sizes)
    for name, value in weights.items():
        to = places[name]
        target = state[to if isinstance(to, str) else to[0]]
        if isinstance(to, str):
            target.copy_(value)
            continue
        if len(to) > 2:
            value = to[2](value)
        target.narrow(*to[1]).copy_(value) if to[1] else target.copy_(value)
    if checkpoint is None:
        checkpoint = {k: packed(k, v) for k, v in state.items()}
    model.diffusion_model.load_state_dict(checkpoint)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu)


class TinyFlux:
    """Model, conditioning and an empty latent."""

    RETURN_TYPES = ("MODEL", "CONDITIONING", "LATENT")
    FUNCTION, CATEGORY = "make", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        from safetensors.torch import load_file

        weights = load_file(os.environ["EVENKEEL_TINY"])
        embeds, pooled = weights.pop("embeds"), weights.pop("pooled")
        latent = {"samples": torch.zeros(1, CHANNELS, 2 * SIDE, 2 * SIDE)}
        return flux_of(weights), [[embeds, {"pooled_output": pooled, "guidance": 3.5}]], latent


class TinyDecode:
    """Three channels of a latent as a picture."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION, CATEGORY = "decode", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",)}}

    def decode(self, samples):
        return ((samples["samples"][:, :3].movedim(1, -1) / 4 + 0.5).clamp(0, 1),)


NODE_CLASS_MAPPINGS = {"TinyFlux": TinyFlux, "TinyDecode": TinyDecode}
