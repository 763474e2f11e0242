"""Bits, group sizes and ranks of every layer, chosen by what each byte does for the final image."""
