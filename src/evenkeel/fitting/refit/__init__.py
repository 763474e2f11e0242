"""Fit low-rank branches, scales and biases of a quantized denoiser again."""
