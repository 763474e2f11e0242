"""Number formats, grids, packed codes."""
