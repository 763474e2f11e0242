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
    assert found["three nodes"]["parity"] < 1e-4 < 1e-3 < found["three nodes"]["changes"]
    assert found["batch"] < 1e-4
    for name, sampler in found["by hand"].items():
        assert sampler["parity"] < 1e-4 < 1e-3 < sampler["changes"], name
    assert found["in turn"] == {"differ": 0, "model bit-equal": True}
    guided = found["with guidance"]
    assert guided["heads per step"] == 2 and {(0, 1), (1, 0), (0,), (1,)} <= {
        tuple(order) for order in guided["orders"]
    }
    for name in ("bare", "recover", "correct", "readout"):
        assert max(guided[name]["parity"].values()) < 1e-4, name
        assert name == "bare" or guided[name]["changes"] > 1e-3, name
    for name, kind in found.get("checkpoints", {}).items():
        assert "QuantizedTensor" in kind["weights"] and kind["quantized"] > 1e-4
        # Where inputs are rounded, too, a rounding falls to the other side now and then.
        most = 1e-3 if name == "int8_tensorwise" else 1e-4
        assert max(kind["bare"], kind["parity"]) < most and kind["changes"] > 0.1, name
        assert kind["left behind"] == 0
    refused = found["refusals"]
    assert "another quantization" in refused["foreign base"] and "one node" in refused["twice"]
    assert all("UnsupportedSampler" in refused[n] for n in ("heun", "euler_ancestral"))
    assert all("corrected" in refused[n] for n in ("dpmpp_2m", "ddim", "uni_pc"))
    for kind in found.get("gguf", {}).values():
        assert kind["bare"] < 1e-4 and kind["parity"] < 1e-4 < 1e-3 < kind["changes"]
        assert kind["left behind"] == 0
    served = found["server"]
    assert len(served["nodes"]) == 4
    arms = ("without", "recover", "with")
    assert len({served[name]["picture"] for name in arms} - {None}) == 3
    for name in arms:  # alone, and queued with the others on the model that is loaded
        assert served[name]["status"] == "success" and served[f"queued {name}"] == served[name]
