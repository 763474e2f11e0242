"""Quantized denoisers that are trained by gradient descent, on calls of the pipeline itself."""
