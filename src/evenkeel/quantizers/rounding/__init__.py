"""How weights are rounded, smoothed, split."""
