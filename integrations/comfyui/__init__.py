"""Evenkeel's nodes for ComfyUI; this folder goes into ``ComfyUI/custom_nodes``."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
