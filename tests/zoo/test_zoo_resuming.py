"""A training that is killed with signal 9 and started again ends with the weights of one that was not."""

import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

# Trains a twin's denoiser, tiny in pictures and steps; from the step asked for on it is no more.
SCRIPT = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from evenkeel import zoo
from evenkeel.zoo.making import objectives
from evenkeel.zoo.making.loop import Recipe
from evenkeel.zoo.making.twins import ldm, sd_v2_1

name, work, last = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
objective = "velocity_loss" if name == "sd-v2.1" else "epsilon_loss"
plain, calls = getattr(objectives, objective), []

def dying(*args):
    calls.append(1)
    if len(calls) > last:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*args)

setattr(objectives, objective, dying)
pipe = zoo.load(name)
ldm.PICTURES = sd_v2_1.PICTURES = 16
ldm.BATCH = sd_v2_1.BATCH = 2
recipe = Recipe(steps=5, learning_rate=1e-3, seed=1, save_every=2, bfloat16=name == "sd-v2.1")
ldm.RECIPES_8, sd_v2_1.DENOISER = (recipe,), (recipe,)
if name == "sd-v2.1":
    sd_v2_1.train_denoiser(work, pipe.tokenizer, pipe.text_encoder, pipe.vae)
else:
    ldm.train_denoiser(8, pipe.vae, work)
"""


def trained(name, work, last):
    """Exit code, and the checkpoint that was left."""
    command = [sys.executable, "-c", SCRIPT, name, str(work), str(last)]
    code = subprocess.run(command, capture_output=True, check=False).returncode
    return code, load_file(next(work.glob("denoiser*/state.safetensors")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ldm-8", "sd-v2.1"])
def test_killed_and_resumed_is_not_killed(name, tmp_path):
    code, whole = trained(name, tmp_path / "whole", 99)
    assert code == 0
    code, half = trained(name, tmp_path / "killed", 3)
    assert code == -signal.SIGKILL
    weights = [k for k in whole if k.startswith("average.")]
    assert any(not torch.equal(half[k], whole[k]) for k in weights)
    code, resumed = trained(name, tmp_path / "killed", 99)
    assert code == 0
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[k], whole[k]) for k in whole)
