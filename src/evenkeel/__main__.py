"""The command ``evenkeel``, ``python -m evenkeel``, and ``torchrun -m evenkeel``."""

import sys


def run() -> int:
    """The command; Ctrl-C before it has begun says nothing more than Ctrl-C after."""
    try:
        from evenkeel.cli import main

        return main()
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(run())
