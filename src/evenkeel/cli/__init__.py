"""The command ``evenkeel``: parse, call one function, print. Nothing heavy is imported for --help."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext

from evenkeel.cli import exporting, fitting, generating, planning, quantizing, restoring, zoo
from evenkeel.cli.several import launched, several_processes

EXIT_ERROR, EXIT_INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for an error of the user's, 130 for Ctrl-C."""
    options = build_parser().parse_args(argv)
    try:
        with several_processes(options) if launched() else nullcontext(), ExitStack() as closing:
            options.closing = closing  # what a command enters and leaves only when it ends
            return int(options.run(options) or 0)
    except KeyboardInterrupt:
        print("interrupted; finished batches are kept where a folder was given", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_ERROR
    except Exception as e:
        from evenkeel.errors import EvenkeelError

        if not isinstance(e, (EvenkeelError, OSError)):
            raise
        if getattr(e, "told", True):  # of several processes that fail, the first one says why
            print(f"evenkeel {options.command}: {e}", file=sys.stderr)
        return EXIT_ERROR


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from evenkeel import __version__

    parser = argparse.ArgumentParser(
        prog="evenkeel",
        description="Quantized diffusion models that sample as if they had never been quantized.",
    )
    parser.add_argument("--version", action="version", version=f"evenkeel {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        generating.add_demo,
        planning.add_plan,
        restoring.add_restore,
        exporting.add_export,
        quantizing.add_quantize,
        fitting.add_calibrate,
        fitting.add_readout,
        fitting.add_refit,
        fitting.add_fold,
        fitting.add_inspect,
        generating.add_sample,
        generating.add_compare,
        zoo.add_zoo,
    ):
        add(commands)
    return parser
