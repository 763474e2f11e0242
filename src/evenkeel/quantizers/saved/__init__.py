"""Quantized denoisers and their reports on disk."""
