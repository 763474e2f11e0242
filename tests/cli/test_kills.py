"""A seeded handful of ``scripts/kills``: stopped at a random moment, started again, nothing lost or mixed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import evenkeel

# A run cut short of each kind: what keeps batches, what makes a folder of several files, what keeps nothing.
HANDFUL = [
    ("calibrate", "kill"),
    ("refit", "full"),
]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_stopped_and_started_again():
    helpers = Path(__file__).parents[1] / "helpers"
    paths = os.pathsep.join([str(Path(evenkeel.__file__).parents[1]), str(helpers)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    code = "import sys; from fuzzing import kills; sys.exit(kills.handful(eval(sys.argv[1])))"
    command = [sys.executable, "-c", code, repr(HANDFUL)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-2000:]
    assert ran.stdout.count(" 0 wrong") == len(HANDFUL) or "no tmpfs" in ran.stdout
