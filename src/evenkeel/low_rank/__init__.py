"""Low-rank maps beside layers: the best ones, their rounding, and how to share out bytes."""
