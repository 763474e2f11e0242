"""The command ``evenkeel``: parse, call one function, print. Nothing heavy is imported for --help.

Exit codes: 0 done; 1 it could not be done, and standard error says why in one line; 2 the command
line itself is wrong; 130 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext

from evenkeel.cli import (
    exporting,
    fitting,
    generating,
    hub,
    planning,
    quantizing,
    reproducing,
    restoring,
    zoo,
)
from evenkeel.cli.outputs import try_outputs
from evenkeel.cli.several import launched, several_processes
from evenkeel.cli.stopping import Stopping

EXIT_ERROR, EXIT_INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = argparse.Namespace(command="", stage="starting", kept="nothing was written")
    with Stopping() as stopping:
        try:
            parser = build_parser()
            if any(word.endswith("=--") for word in (sys.argv[1:] if argv is None else argv)):
                parser.error("-- is no value of an option")  # argparse makes an empty list of it
            parser.parse_args(argv, options)
            with (
                several_processes(options) if launched() else nullcontext(),
                ExitStack() as closing,
            ):
                options.closing = closing  # what a command enters and leaves only when it ends
                if options.command != "demo":  # which first says how long it takes
                    try_outputs(options)
                code = int(options.run(options) or 0)
                sys.stdout.flush()  # here, where a reader that has left is known for what it is
                return code
        except BrokenPipeError:
            _forget_stdout()
            return EXIT_ERROR
        except (KeyboardInterrupt, Exception) as e:
            if stopping.asked or isinstance(e, KeyboardInterrupt):
                print(f"interrupted; {options.kept}", file=sys.stderr)
                return EXIT_INTERRUPTED
            _say(options, e)
            return EXIT_ERROR


def _say(options: argparse.Namespace, e: Exception) -> None:
    """One line of what went wrong; of several processes that fail, the first one says why."""
    from evenkeel.errors import EvenkeelError

    if getattr(options, "traceback", False):
        import traceback

        traceback.print_exception(e)
    if not getattr(e, "told", True):
        return
    what = str(e)
    if not isinstance(e, (EvenkeelError, OSError)):
        said = str(e).strip().splitlines() or ["no reason given"]
        what = (
            f"{options.stage} failed: {type(e).__name__}: {said[0][:300]} (--traceback shows all)"
        )
    print(f"evenkeel {options.command}: {' '.join(what.split())}", file=sys.stderr)


def _forget_stdout() -> None:
    """Nobody reads it: what is left in it must not be complained about when Python ends."""
    import os

    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # not a file of the system
        return


_FIRST = (
    restoring.add_restore,
    generating.add_compare,
    quantizing.add_quantize,
    generating.add_sample,
    zoo.add_zoo,
)
_EXPERTS = (
    generating.add_demo,
    planning.add_plan,
    exporting.add_export,
    hub.add_push,
    hub.add_pull,
    fitting.add_calibrate,
    fitting.add_readout,
    fitting.add_refit,
    fitting.add_fold,
    fitting.add_inspect,
    fitting.add_recommend,
    reproducing.add_reproduce,
)
_CODES = (
    "Exit codes: 0 done, 1 it could not be done, 2 wrong usage, 130 stopped by Ctrl-C or SIGTERM."
)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from evenkeel import __version__

    parser = argparse.ArgumentParser(
        prog="evenkeel",
        description="Quantized diffusion models that sample as if they had never been quantized.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"evenkeel {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (*_FIRST, *_EXPERTS):
        add(commands)
    listed = commands._choices_actions
    lines = [
        textwrap.fill(
            f"{c.dest:<10} {(c.help or '').partition('.')[0]}",
            100,
            initial_indent="  ",
            subsequent_indent=" " * 13,
        )
        for c in listed
    ]
    first = len(_FIRST)
    # They are listed here, in two groups, instead of in one long list.
    commands._choices_actions = []
    commands.help = "one of these; evenkeel COMMAND --help ends with an example"
    parser.epilog = "\n".join(
        ["what people want first:", *lines[:first], "", "for experts:", *lines[first:], "", _CODES]
    )
    return parser
