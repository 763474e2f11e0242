"""Fit the output head of every step."""
