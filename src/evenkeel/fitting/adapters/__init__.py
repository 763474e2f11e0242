"""Recovery adapters: rows of one run, adapters from them, and what final samples say of these."""
