"""One module for each original: its networks in small, how they are trained, and the saved pipeline."""
