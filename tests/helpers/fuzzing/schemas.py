"""What commands print with ``--json``, as ``storage.check_json`` reads it; a null number says why beside."""

from __future__ import annotations

from typing import Any

from evenkeel.storage import Number

N = (float, None)
WHY = {"not_finite?": {str: {"infinite", "minus infinity", "not a number"}}}
COUNT = Number(int, low=0)
_STEP = {
    **{"step": COUNT, "timestep": float, "noise_to_signal": N, "explanation": str},
    **{"factor": [N], "factor_low": [N], "factor_high": [N], "variance": [N]},
    **{"gain": [N], "slope": [N], "explained": [N]},
    **WHY,
}
RECORD = {
    **{"prompts": COUNT, "quantizer": str, "steps": [_STEP], "noise_floor": [N]},
    **{"step_correlation": [[N]], "error_spectrum": ([[N]], None), "provenance": dict},
    **{"record?": str, "check?": dict, "merged?": object},
    **WHY,
}
READOUT = {
    **{"record?": str, "head": str, "form": str, "quantizer": str, "changed": COUNT},
    "steps": [
        {
            **{"step": COUNT, "branch": COUNT, "penalty": N, "held_out": N, "bound": N},
            **{"explanation": str, **WHY},
        }
    ],
    **{"provenance": dict, **WHY},
}
_REFITTED = {
    **{"name": str, "rank": COUNT, "before": N, "after": N, "penalty": N, "reason": str},
    **{"what": str, "changed": bool, "bias": bool, **WHY},
}
_LAYER = {
    **{"name": str, "kind": str, "shape": [COUNT], "weight_bits": COUNT, "activation_bits": COUNT},
    **{"group": (int, None), "rank": COUNT, "weight_error": N, "reason": str, "note": str},
    **{"weight_format": str, "activation_format": str, "output_error": N, **WHY},
}
SCHEMAS: dict[str, Any] = {
    "calibrate": RECORD,
    "inspect": (RECORD, READOUT),
    "readout": READOUT,
    "refit": {"quantized": str, "prompts": COUNT, "layers": [_REFITTED]},
    "sample": {"images": [str], "seconds_per_image": N, "black": list, **WHY},
    "quantize": {
        **{"quantized": str, "quantizer": str, "spec": dict, "layers": [_LAYER]},
        **{"stored_bytes": COUNT, "full_precision_bytes": COUNT, "bit_operations": (dict, None)},
    },
    "fold": {"quantized": str, "head": str},
    "restore": {
        **{"out": (str, None), "sentence": str, "parts": [str], "adapters": dict},
        **{"readout": ([N], None), "no_readout": str, "refit": ([N], None), "refitted": bool},
        **{"measured": {str: list}, "unmeasured": {str: str}, **WHY},
    },
    "compare": {
        **{"settings": dict, "calibration": (dict, None), "not_applicable": {str: str}},
        "arms": [dict],
    },
    "plan": {
        **{"pipeline": str, "size": dict, "dtype": str, "steps": COUNT, "prompts": COUNT},
        **{"batch_size": COUNT, "rows": COUNT, "weights": {str: COUNT}, "quantized": dict},
        **{"denoising": COUNT, "decoding": COUNT, "jobs": [dict]},
    },
    "zoo": {"name": str, "path": str, "card?": str, "quality?": (dict, None)},
}
