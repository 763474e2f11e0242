"""Several pipeline calls advanced together, step by step."""
