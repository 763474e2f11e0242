"""Reads what this library writes, by docs/file-formats.md and its pages alone.

Nothing here knows the library, torch or safetensors: numpy, JSON and a hash.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
DTYPES = {
    "F64": ("float64", "<f8"),
    "F32": ("float32", "<f4"),
    "F16": ("float16", "<f2"),
    "BF16": ("bfloat16", "<u2"),
    "F8_E4M3": ("float8_e4m3fn", "u1"),
    "I64": ("int64", "<i8"),
    "I32": ("int32", "<i4"),
    "U8": ("uint8", "u1"),
    "BOOL": ("bool", "?"),
}
PROVENANCE = {
    "pipeline_class", "denoiser", "reference", "quantized", "quantizer", "scheduler_class",
    "scheduler_config", "prediction", "num_inference_steps", "guidance_scale", "timesteps", "alpha",
    "sigma", "call", "trajectory", "layout", "latent_shape", "dtype", "elements", "versions", "correction",
}  # fmt: skip


class Refused(Exception):
    """The file is not what its page says."""


def need(right: bool, what: str) -> None:
    if not right:
        raise Refused(what)


# ---- containers


class Tensor:
    """Bytes, and what they are."""

    def __init__(self, kind: str, shape: list[int], data: bytes) -> None:
        self.name, code = DTYPES[kind]
        self.shape, self.data = tuple(shape), data
        raw = np.frombuffer(data, dtype=code).reshape(self.shape)
        if self.name == "bfloat16":
            raw = (raw.astype("<u4") << 16).view("<f4")
        if self.name == "float8_e4m3fn":
            raw = floating(raw, 4, 3, 448.0)
        self.values: Array = raw


def safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors, unchecked."""
    content = path.read_bytes()
    need(len(content) >= 8, "no header")
    end = 8 + int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8:end])
        metadata = header.pop("__metadata__", {})
        found = {
            name: Tensor(said["dtype"], said["shape"], content[end:][slice(*said["data_offsets"])])
            for name, said in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise Refused(f"damaged: {e}") from e
    return metadata, found


def parsed(text: str | bytes) -> Any:
    """JSON of at most 200 levels, nothing else."""
    try:
        found = json.loads(text)
        level, depth = [found], 0
        while level:
            depth += 1
            need(depth <= 200, "nested too deep")
            inner = [v for v in level if isinstance(v, (list, dict))]
            level = [x for v in inner for x in (v.values() if isinstance(v, dict) else v)]
        json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as e:
        raise Refused(f"no JSON: {e}") from e
    return found


def tensor_file(
    path: Path, kind: str, version: str, keys: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What its own keys say, and its tensors."""
    metadata, tensors = safetensors(path)
    need(metadata.get("format") == f"evenkeel-{kind}", "another format")
    need(metadata.get("schema_version") == version, "another version")
    need(set(metadata) >= {"digest", *keys}, "metadata are missing")
    running = hashlib.sha256("".join(metadata[key] for key in keys).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        need(0 not in tensor.shape, "no elements")
        running.update(f"{name}:torch.{tensor.name}:{tensor.shape}".encode() + tensor.data)
        if tensor.name.startswith(("float", "bfloat")):
            need(bool(np.isfinite(tensor.values).all()), "not finite")
    need(running.hexdigest() == metadata["digest"], "changed")
    return {key: parsed(metadata[key]) for key in keys}, tensors


def json_file(path: Path, kind: str, version: int, keys: tuple[str, ...]) -> dict[str, Any]:
    """The object, its digest checked; numbers as they stand in the file."""
    raw = path.read_text(encoding="utf-8")
    found = parsed(raw)
    need(isinstance(found, dict) and found.get("format") == f"evenkeel-{kind}", "another format")
    need(found.get("schema_version") == version, "another version")
    need(set(found) >= {"digest", *keys}, "keys are missing")
    kept = json.loads(raw, parse_float=Number, parse_int=Number, parse_constant=Number)
    del kept["digest"]
    computed = hashlib.sha256(canonical(kept).encode()).hexdigest()
    need(computed == found["digest"], "changed")
    return found


class Number(str):
    """A number's characters."""


_SHORT = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def canonical(value: Any) -> str:
    """The text that a digest is over."""
    if isinstance(value, Number):
        return str(value)
    if isinstance(value, str):
        units = (c if c in _SHORT or " " <= c <= "~" else utf16(c) for c in value)
        return '"' + "".join(_SHORT.get(u, u) for u in units) + '"'
    if isinstance(value, dict):
        return (
            "{" + ", ".join(f"{canonical(k)}: {canonical(value[k])}" for k in sorted(value)) + "}"
        )
    if isinstance(value, list):
        return "[" + ", ".join(map(canonical, value)) + "]"
    return {None: "null", True: "true", False: "false"}[value]


def utf16(character: str) -> str:
    both = character.encode("utf-16-be").hex()
    return "".join(f"\\u{both[i : i + 4]}" for i in range(0, len(both), 4))


def folder(
    place: Path, kind: str, version: int, keys: tuple[str, ...], manifest: str | None = None
) -> tuple[dict[str, Any], dict[str, Path]]:
    """What the manifest says, and where each listed file is."""
    said = json_file(place / (manifest or f"{kind}.json"), kind, version, (*keys, "files"))
    found = {}
    for name, digest in said["files"].items():
        need(not {"", ".", ".."} & set(name.split("/")) and "\0" not in name, f"{name} leads out")
        need((place / name).parent.resolve().is_relative_to(place.resolve()), f"{name} leads out")
        both = [p for p in (place / name, place / f"{name}.new") if p.is_file()]
        right = [p for p in both if hashlib.sha256(p.read_bytes()).hexdigest() == digest]
        need(bool(right), f"{name} is missing or changed")
        found[name] = right[0]
    return said, found


# ---- what they hold


def whole(value: Any, low: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def provenance(found: Any) -> dict[str, Any]:
    need(isinstance(found, dict) and set(found) - {"guidance"} == PROVENANCE, "provenance")
    steps = len(found["timesteps"])
    for levels in (found["timesteps"], found["alpha"], found["sigma"]):
        need(len(levels) == steps and all(map(math.isfinite, levels)), "levels")
    return found


def unpacked(packed: Array, bits: int, count: int) -> Array:
    """Codes from a string of bits, lowest bit first."""
    need(packed.shape == (-(-count * bits // 8),), "another number of bytes")
    stream = np.unpackbits(packed, bitorder="little")[: count * bits].reshape(count, bits)
    return (stream.astype(np.int64) << np.arange(bits)).sum(1)


def adapters(path: Path) -> dict[str, tuple[Array, Array, list[int]]]:
    """down (r, F), up (r, O) and kernel by layer, float32."""
    header, tensors = tensor_file(path, "adapters", "1", ("provenance", "adapters"))
    provenance(header["provenance"])
    said = header["adapters"]
    need(set(said) == {"bits", "metric", "layers"} and said["bits"] in (3, 4, 8, 16), "adapters")
    need(said["metric"] in ("output", "uniform", "local"), "metric")
    bits, layers = said["bits"], said["layers"]
    need(len({x["name"] for x in layers}) == len(layers), "a layer twice")
    for layer in layers:
        need(set(layer) == {"name", "rank", "features", "outputs", "kernel"}, "a layer's fields")
        sizes = (layer["rank"], layer["features"], layer["outputs"], *layer["kernel"])
        need(all(map(whole, sizes)), "a size")
    names = {"values": "float16"} if bits == 16 else {"codes": "uint8", "scales": "float16"}
    kinds = {name: tensor.name for name, tensor in tensors.items()}
    need(kinds == (names if layers else {}), "other tensors")
    at = dict.fromkeys(names, 0)

    def take(name: str, count: int) -> Array:
        found = tensors[name].values[at[name] : at[name] + count]
        need(tensors[name].values.ndim == 1 and len(found) == count, f"{name} is too short")
        at[name] += count
        return found

    def factor(r: int, n: int) -> Array:
        if bits == 16:
            return take("values", r * n).reshape(r, n).astype(np.float32)
        top = 2 ** (bits - 1) - 1
        codes = unpacked(take("codes", -(-r * n * bits // 8)), bits, r * n)
        need(int(codes.max()) <= 2 * top, "a code that is none")
        scale = take("scales", r * -(-n // 32)).reshape(r, -1).astype(np.float32)
        need(bool((scale >= 0).all()), "a negative scale")
        return (codes.reshape(r, n) - top) * scale[:, np.arange(n) // 32]

    found = {}
    for x in layers:
        down, up = factor(x["rank"], x["features"]), factor(x["rank"], x["outputs"])
        found[x["name"]] = down.astype(np.float32), up.astype(np.float32), x["kernel"]
    need(all(at[name] == len(tensors[name].values) for name in tensors), "too long")
    return found


def convolved(x: Array, filters: Array, stride: int, padding: int) -> Array:
    """(N, C, h, w) with (r, C, kh, kw)."""
    kh, kw = filters.shape[2:]
    x = np.pad(x, ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2))
    windows = np.lib.stride_tricks.sliding_window_view(x, (kh, kw), (2, 3))
    return np.einsum("nchwij,rcij->nrhw", windows[:, :, ::stride, ::stride], filters)


class Readout:
    """Heads over noise levels."""

    def __init__(self, path: Path) -> None:
        header, tensors = tensor_file(path, "readout", "1", ("provenance", "readout"))
        made_for, said = provenance(header["provenance"]), header["readout"]
        need(set(said) == {"head", "form", "fits"}, "readout")
        need(said["form"] in ("per-step", "shared", "hierarchical"), "form")
        self.head = said["head"]
        table = {n.removeprefix("table."): t for n, t in tensors.items() if n.startswith("table.")}
        kinds = {name: tensor.name for name, tensor in table.items()}
        need(kinds == {"weight": "float16", "scale": "float32", "constant": "float32", "active": "bool"},
             "another table")  # fmt: skip
        self.weight, self.scale, self.constant, self.active = (
            table[n].values for n in ("weight", "scale", "constant", "active")
        )
        steps, branches, _, outputs = self.weight.shape
        need(self.scale.shape == self.active.shape == (steps, branches), "a shape")
        need(self.constant.shape == (steps, branches, outputs), "a shape")
        need(steps == len(made_for["timesteps"]), "another number of steps")
        with np.errstate(divide="ignore"):
            snr = np.log(np.array(made_for["alpha"])) - np.log(np.array(made_for["sigma"]))
        self.snr = np.clip(snr, -20, 20)

    def entry(self, step: int) -> tuple[Array, Array]:
        """(B, F, O) and (B, O)."""
        weight = self.weight[step].astype(np.float32) * self.scale[step][:, None, None]
        return weight, self.constant[step]

    def at(self, alpha: float, sigma: float) -> tuple[Array, Array]:
        """Between the levels, for tables that meet every level once."""
        level = float(np.clip(np.log(alpha) - np.log(sigma), -20, 20))
        order = np.argsort(self.snr)
        known = self.snr[order]
        nearest = int(np.argmin(np.abs(known - level)))
        if abs(known[nearest] - level) < 1e-4:
            return self.entry(order[nearest])
        below, above = known[0] - (known[1] - known[0]), known[-1] + (known[-1] - known[-2])
        need(below <= level <= above, "outside")
        upper = int(np.clip(np.searchsorted(known, level), 1, len(known) - 1))
        share = np.clip((level - known[upper - 1]) / (known[upper] - known[upper - 1]), 0, 1)
        a, b = self.entry(order[upper - 1]), self.entry(order[upper])
        return a[0] + share * (b[0] - a[0]), a[1] + share * (b[1] - a[1])


# ---- quantized denoisers


def floating(codes: Array, e: int, m: int, largest: float) -> Array:
    codes = codes.astype(np.int64)
    exponent, fraction = (codes >> m) & (2**e - 1), codes & (2**m - 1)
    size = 2.0 ** (np.maximum(exponent, 1) - (2 ** (e - 1) - 1)) * (
        fraction * 2.0**-m + (exponent > 0)
    )
    need(bool((size <= largest).all()), "a code that is none")
    return np.where(codes >> (e + m), -size, size).astype(np.float32)


FLOATS = {"fp8_e4m3": 448, "fp8_e5m2": 57344, "fp6_e2m3": 7.5, "fp6_e3m2": 28, "fp4_e2m1": 6}
NF4 = [
    -1, -0.6961928009986877, -0.5250729322433472, -0.39491742849349976, -0.2844413220882416,
    -0.18477340042591095, -0.09104997664690018, 0, 0.07958031445741653, 0.16093014180660248,
    0.24611225724220276, 0.3379151225090027, 0.4407097399234772, 0.5626168847084045, 0.722956657409668, 1,
]  # fmt: skip


def bits_of(name: str) -> int:
    need(name == "nf4" or name in FLOATS or bool(re.fullmatch("u?int[2-8]", name)), "format")
    return (
        4
        if name == "nf4"
        else int(name.removeprefix("u").removeprefix("int").removeprefix("fp")[0])
    )


def numbers(codes: Array, name: str) -> Array:
    """What codes of a format stand for."""
    if name == "nf4":
        return np.array(NF4, dtype=np.float32)[codes]
    if name in FLOATS:
        e, m = int(name[-3]), int(name[-1])
        return floating(codes, e, m, FLOATS[name])
    if name[0] == "u":
        return codes.astype(np.float32)
    bits = bits_of(name)
    need(bool((codes != 2 ** (bits - 1)).all()), "a code that is none")
    return np.where(codes >> (bits - 1), codes - 2**bits, codes).astype(np.float32)


def rounded_to(values: Array, dtype: str) -> Array:
    """Ties to even; bfloat16 in float32."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    raw = values.astype(np.float32).view(np.uint32)
    return ((raw + 0x7FFF + ((raw >> 16) & 1)) & 0xFFFF0000).view(np.float32)


class Quantized:
    """A quantized denoiser: its layers, and all other tensors by name."""

    def __init__(self, place: Path) -> None:
        keys = ("class", "config", "layers", "report")
        self.said, files = folder(place, "quantized", 3, keys)
        _, tensors = safetensors(files["quantized.safetensors"])
        names = [x["name"] for x in self.said["report"]["layers"] if x["reason"] == ""]
        need(set(names) == set(self.said["layers"]), "layers without a description")
        self.parts: dict[str, dict[str, Tensor]] = {}
        for name in names:
            own = [n for n in tensors if n.startswith(f"{name}.")]
            self.parts[name] = {n[len(name) + 1 :]: tensors.pop(n) for n in own}
        self.others = tensors

    def weight(self, name: str) -> Array:
        """Of a layer, in the dtype that it says; bfloat16 in float32."""
        said, parts = self.said["layers"][name]["weight"], self.parts[name]
        grid, shape = said["grid"], said["shape"]
        need(all(map(whole, shape)), "a size")
        if grid is None:
            need(parts["weight"].shape == tuple(shape), "another shape")
            return parts["weight"].values
        wide = list(shape) if len(shape) == 2 else [shape[0], *shape[2:], shape[1]]
        if grid["group"] is None:
            wide = [shape[0], math.prod(shape[1:])]
        size = min(grid["group"] or wide[-1], wide[-1])
        groups = -(-wide[-1] // size)
        expected = (1,) * len(wide) if grid["per_tensor"] else (*wide[:-1], groups)
        bits = bits_of(grid["format"])
        codes = unpacked(parts["weight.codes"].values, bits, math.prod(wide)).reshape(wide)
        scale = parts["weight.scale"]
        need(scale.shape == expected, "scales of another shape")
        need(("weight.unit" in parts) == (grid["scale"] == "fp8_e4m3"), "unit")
        need(("weight.zero" in parts) == grid["zero_point"], "zeros")
        unit = parts.get("weight.unit", scale)
        work = np.float64 if unit.name == "float64" else np.float32
        s = scale.values.astype(work)
        if unit is not scale:
            s = s * unit.values.astype(work)
        where = np.zeros(wide[-1], int) if grid["per_tensor"] else np.arange(wide[-1]) // size
        found = numbers(codes, grid["format"]).astype(work)
        if grid["zero_point"]:
            need(parts["weight.zero"].shape == expected, "zeros of another shape")
            found = found - parts["weight.zero"].values.astype(work)[..., where]
        found = found * s[..., where]
        if grid["group"] is not None and len(shape) == 4:
            found = np.moveaxis(found, -1, 1)
        return rounded_to(found.reshape(shape), said["dtype"])

    def output(self, name: str, x: Array, told: float = 0.0) -> Array:
        """Of a linear layer, float32: (..., F) to (..., O)."""
        parts = {n: t.values for n, t in self.parts[name].items()}
        smoothed = x / parts["smoothing"] if "smoothing" in parts else x
        found = self.rounded(name, smoothed, told) @ self.weight(name).T
        if "bias" in parts:
            found = found + parts["bias"]
        if "down" in parts:
            found = found + (smoothed @ parts["down"].T) @ parts["up"].T
        if "first_token" in parts:
            found[..., 0, :] = parts["first_token"]
        return found

    def rounded(self, name: str, x: Array, told: float) -> Array:
        """What is multiplied by the weight."""
        said, parts = self.said["layers"][name]["activation"], self.parts[name]
        if said is None:
            return x
        if said["kind"] != "dynamic":
            scale, zero = (parts[f"activation.{n}"].values for n in ("scale", "zero"))
            need(bool((scale > 0).all()), "a scale that is not positive")
            if said["kind"] == "timed":
                at = int(np.argmin([abs(level - told) for level in said["levels"]]))
                scale, zero = scale[at], zero[at]
            elif said["split"] is not None:
                counts = [said["split"], x.shape[-1] - said["split"]]
                scale, zero = np.repeat(scale, counts), np.repeat(zero, counts)
            codes = np.clip(np.rint(x / scale) + zero, 0, 2 ** said["bits"] - 1)
            return ((codes - zero) * scale).astype(np.float32)
        kind, width = said["format"], x.shape[-1]
        size = min(said["group"] or width, width)
        d = parts["activation.shift"].values if said["shift"] is None else np.float32(said["shift"])
        y = x + d
        y = np.concatenate([y, np.zeros((*y.shape[:-1], -width % size), np.float32)], -1)
        y = y.reshape(*x.shape[:-1], -1, size)
        axes = (0, -1) if said["across_batch"] and y.ndim > 3 else -1
        low, high = (
            np.minimum(y.min(axes, keepdims=True), 0),
            np.maximum(y.max(axes, keepdims=True), 0),
        )
        table = numbers_of(kind)
        largest = table[-1]
        tiny = np.finfo(np.float32).tiny
        if said["zero_point"]:
            s = (high - low) / largest
            s = np.where(s < tiny, np.float32(1), s)
            zero = np.rint(-low / s)
            found = (np.clip(np.rint(y / s) + zero, 0, largest) - zero) * s
        else:
            s = (high if kind[0] == "u" else np.maximum(high, -low)) / largest
            s = np.where(s < tiny, np.float32(1), s)
            found = nearest(y / s, kind) * s
        return (found.reshape(*x.shape[:-1], -1)[..., :width] - d).astype(np.float32)


def numbers_of(kind: str) -> Array:
    """All numbers of a format, in rising order."""
    found = []
    for code in range(2 ** bits_of(kind)):
        try:
            found.append(float(numbers(np.array([code]), kind)[0]))
        except Refused:
            continue
    return np.unique(np.array(found, dtype=np.float32))


def nearest(x: Array, kind: str) -> Array:
    """The nearest number of the format; ties to even, of a list to the lower."""
    table = numbers_of(kind)
    if "int" in kind:
        return np.clip(np.rint(x), table[0], table[-1])
    middles = (table[1:] + table[:-1]) / 2
    lower = np.searchsorted(middles, x)
    if kind != "nf4":  # counted from zero, every second number has an even mantissa
        tie = (lower < len(middles)) & (middles[np.minimum(lower, len(middles) - 1)] == x)
        lower = lower + (tie & ((lower - int(np.searchsorted(table, 0))) % 2 == 1))
    return table[lower]


def recognised(place: Path) -> dict[str, Any]:
    """``recognition.json``: entries by layer."""
    return parsed(place.read_bytes())
