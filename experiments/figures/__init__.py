"""The figures of the papers, one module per paper; see ``paper_figures.py``."""
