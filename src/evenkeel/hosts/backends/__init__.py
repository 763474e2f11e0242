"""Quantization backends: recognised, described, read."""
