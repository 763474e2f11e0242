"""They carry a correction out inside a scheduler or a denoiser."""
