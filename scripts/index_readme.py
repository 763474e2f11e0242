"""The README as the package index shows it: nobody has the checkout's files there.

hatchling calls it whenever metadata are made.
"""

from __future__ import annotations

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

PICTURE = re.compile(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n*")
LINK = re.compile(r"\[([^\]]+)\]\((?!https?:)[^)]*\)")


def for_the_index(text: str) -> str:
    """Without pictures of the checkout, and with the words of links into it in their place."""
    return LINK.sub(r"\1", PICTURE.sub("", text))


class Hook(MetadataHookInterface):
    """Fills in ``readme``."""

    def update(self, metadata: dict[str, object]) -> None:
        """See hatchling."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": for_the_index(text)}
