"""``scripts/fuzz --kind KIND --seeds N``: see docs/reliability.md."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter

os.environ.setdefault("HF_HUB_OFFLINE", "1")

FAULTS_SHOWN = 20


def main() -> int:
    """Try the seeds of one kind, or of all; 1 if any fault was found."""
    from fuzzing import command_line, files
    from fuzzing.sandbox import sandbox

    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("--kind", choices=("all", "cli", *files.KINDS), default="all")
    parser.add_argument("--seeds", type=int, default=500, help="how many, for each kind")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    options = parser.parse_args()
    faults = 0
    with sandbox():
        for kind in ("cli", *files.KINDS) if options.kind == "all" else (options.kind,):
            began, seen, longest = time.monotonic(), Counter(), 0.0
            seeds = range(options.first, options.first + options.seeds)
            if kind == "cli":
                command_line.prepare()
                results = ((s, command_line.call(command_line.generated(s))) for s in seeds)
            else:
                results = files.outcomes(kind, seeds)
            for seed, found in results:
                seen[found.word] += 1
                longest = max(longest, found.seconds)
                if found.word.isupper() or found.word == "unexpected":
                    faults += found.word.isupper()
                    if seen[found.word] <= FAULTS_SHOWN:
                        print(f"  {kind} seed {seed}: {found.word}: {found.said!a}", flush=True)
            counts = ", ".join(f"{n} {word}" for word, n in seen.most_common())
            took = f"{time.monotonic() - began:.0f} s, longest {longest:.1f} s"
            print(f"{kind}: {len(seeds)} cases: {counts} ({took})", flush=True)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
