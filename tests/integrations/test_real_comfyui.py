"""The nodes in a real ComfyUI, where ``EVENKEEL_COMFYUI`` names a checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PLACE = Path(__file__).with_name("real_comfyui.py")


@pytest.mark.skipif(
    "EVENKEEL_COMFYUI" not in os.environ,
    reason="set EVENKEEL_COMFYUI to a checkout of ComfyUI (EVENKEEL_COMFYUI_PYTHON: its interpreter)",
)
def test_contract_parity_and_server() -> None:
    python = os.environ.get("EVENKEEL_COMFYUI_PYTHON", sys.executable)
    done = subprocess.run([python, PLACE], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout[done.stdout.index("\n{\n") if "\n{\n" in done.stdout else 0 :])
    assert found["contract"] == []
    assert found["bare"] < 1e-4
    for name in ("recover", "correct", "readout"):
        assert found[name]["parity"] < 1e-4 < 1e-3 < found[name]["changes"], name
        assert found[name]["left behind"] == 0
    assert found["batch"] < 1e-4
    refused = found["refusals"]
    assert "another quantization" in refused["foreign base"] and "one node" in refused["twice"]
    assert all("UnsupportedSampler" in refused[n] for n in ("heun", "euler_ancestral"))
    assert all("corrected" in refused[n] for n in ("dpmpp_2m", "ddim"))
    for kind in found.get("gguf", {}).values():
        assert kind["bare"] < 1e-4 and kind["parity"] < 1e-4 < 1e-3 < kind["changes"]
        assert kind["left behind"] == 0
    served = found["server"]
    assert len(served["nodes"]) == 4
    assert served["with"]["status"] == served["without"]["status"] == "success"
    assert None not in (served["with"]["picture"], served["without"]["picture"])
    assert served["with"]["picture"] != served["without"]["picture"]
