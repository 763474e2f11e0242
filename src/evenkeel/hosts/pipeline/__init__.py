"""Pipelines of diffusers: their denoiser, its calls, their latents."""
