"""A file appears whole or not at all: a crash leaves the old one or none, never half of one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes | str) -> Path:
    """Write beside the place (under a name of this process's own), then move there.

    Missing folders are made; text is written as UTF-8. Nothing is left behind when writing fails.

    >>> import tempfile
    >>> place = Path(tempfile.mkdtemp()) / "new" / "file.txt"
    >>> write_atomically(place, "whole").read_text()
    'whole'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def json_safe(values: dict[str, Any]) -> dict[str, Any]:
    """A copy as JSON reads it back; what JSON cannot hold becomes its type's name."""
    plain: dict[str, Any] = json.loads(json.dumps(values, default=lambda v: type(v).__name__))
    return plain
