"""comfy-kitchen, ComfyUI's kernels: linear layers whose weight is a tensor with a layout."""

from __future__ import annotations

from typing import Any

from evenkeel.hosts.backends.base import Backend, comes_from, joined, number

# Layout -> format in ComfyUI's checkpoints, bits of the input where a CPU rounds it, too.
FORMATS = {
    "TensorWiseINT8Layout": ("int8_tensorwise", 8),
    "TensorCoreFP8Layout": ("float8_e4m3fn", None),
    "TensorCoreNVFP4Layout": ("nvfp4", None),
    "TensorCoreMXFP8Layout": ("mxfp8", None),
    "TensorCoreConvRotW4A4Layout": ("convrot_w4a4", 4),
    "AsymW4A8Int8Layout": ("asym_w4a8_int8", 8),
    "TensorCoreAWQW4A16Layout": ("awq_w4a16", None),
    "TensorCoreSVDQuantW4A4Layout": ("svdquant_w4a4", 4),
}


class ComfyKitchen(Backend):
    """Its tensors are taken apart by ``__tensor_flatten__``, so only names are read here."""

    name = "comfy-kitchen"

    def owns(self, layer: Any) -> bool:
        return comes_from(getattr(layer, "weight", None), "comfy_kitchen")

    def format(self, layer: Any) -> str:
        _, said = layer.weight.__tensor_flatten__()
        layout, fields = said["layout_cls"], said["non_tensor_fields"]
        text, activation = FORMATS.get(layout, (layout.lower(), None))
        if text == "float8_e4m3fn" and "e5m2" in str(layer.weight.storage_dtype):
            text = "float8_e5m2"
        if fields.get("linear_dtype"):
            activation = int(number(fields["linear_dtype"]))
        rotated = "-rotated" if fields.get("convrot") else ""
        return joined(text + rotated, g=fields.get("group_size"), a=activation)
