"""Hostile input, made from seeds: damaged files of every kind, and abusive command lines."""
