"""Schedulers of diffusers: intercepted, probed, recorded."""
