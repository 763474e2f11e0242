"""``python -m evenkeel.zoo.making.card NAME [--images 1000]``: measure a twin and write its model card."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from evenkeel import zoo
from evenkeel.errors import EvenkeelError
from evenkeel.zoo.making.cards import write_card


def main() -> int:
    """Parse the command line and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(zoo.TWINS))
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--work", type=Path, help="keep finished batches here (default: nowhere)")
    options = parser.parse_args()
    try:
        print(write_card(options.name, options.images, options.work))
    except EvenkeelError as e:
        print(f"{parser.prog}: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
