"""Layers that hold rounded weights, and what they do with inputs."""
