"""From words on a command line to pipelines, quantized denoisers, prompts and evaluators."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from evenkeel import zoo
from evenkeel.errors import EvenkeelError, UnsupportedPipeline
from evenkeel.hosts.pipelines import call_parameters, denoiser_of, load
from evenkeel.quantizers import (
    QuantizationReport,
    QuantizerSpec,
    load_quantized,
    quantize_module,
    save_quantized,
)
from evenkeel.zoo.evaluation import HandwritingEvaluator, reference_images, sample_prompts


def load_pipeline(source: str, dtype: str = "float32") -> Any:
    """``zoo:NAME``, a local diffusers folder, or a hub id.

    Raises:
        UnsupportedPipeline: nothing there that diffusers can load.

    """
    import torch

    local = source.startswith("zoo:") or Path(source).exists()
    place = zoo.path_of(source[4:]) if source.startswith("zoo:") else source
    try:
        pipeline = load(place, local_files_only=local)
    except (OSError, ValueError) as e:
        raise UnsupportedPipeline(
            f"{source!r} is not a pipeline that diffusers can load: {_first_line(e)}. Give zoo:NAME, a "
            f"folder with a model_index.json, or the id of a pipeline on the hub."
        ) from e
    return pipeline if dtype == "float32" else pipeline.to(getattr(torch, dtype))


def save_denoiser(module: nn.Module, like: nn.Module, folder: Path) -> None:
    """Write a denoiser where ``load_denoiser`` finds it again.

    Args:
        module: to be written.
        like: the denoiser that ``load_denoiser`` gave; it remembers its quantization report.
        folder: place to write to.

    """
    report = getattr(like, _REPORT, None)
    if report is not None:
        save_quantized(module, report, folder)
    else:
        saver: Any = module
        saver.save_pretrained(folder)


def load_denoiser(source: str, pipeline: Any) -> nn.Module:
    """A quantizer specification (``w3a4-g32-r16``), a saved quantized denoiser, a folder or hub id.

    A folder or hub id may hold weights of any backend that diffusers loads, and the file of GGUF
    weights (``.gguf``) is taken alone.

    Raises:
        EvenkeelError: none of these, or their backend is not installed.

    """
    place = Path(source)
    if (place / "quantized.json").is_file():
        return _remembering(*load_quantized(place))
    reference = denoiser_of(pipeline)
    if not place.exists() and "/" not in source and place.suffix != ".gguf":
        return _remembering(*quantize_module(reference, QuantizerSpec.parse(source)))
    try:
        model: nn.Module = _loaded(source, place, reference).eval()
    except (ImportError, NotImplementedError) as e:
        raise UnsupportedPipeline(
            f"{source!r} was quantized by a backend that is not installed: {_first_line(e)}. Install "
            f"it, for example with pip install 'evenkeel[backends]'; docs/backends.md lists all."
        ) from e
    except (OSError, ValueError, TypeError, RuntimeError) as e:  # no GPU, no such setting
        raise UnsupportedPipeline(
            f"{source!r} is not a {type(reference).__name__} that diffusers can load: "
            f"{_first_line(e)}. Give a specification such as w3a4-g32-r16, a folder, a .gguf file, or "
            f"a hub id."
        ) from e
    return model


def _loaded(source: str, place: Path, reference: nn.Module) -> nn.Module:
    """What diffusers loads: a folder or hub id, or the weights of a ``.gguf`` file.

    Such a file holds no configuration; it gets that of the reference.
    """
    loader: Any = type(reference)
    dtype = next(reference.parameters()).dtype
    if place.suffix != ".gguf":
        model: nn.Module = loader.from_pretrained(
            source, local_files_only=place.exists(), torch_dtype=dtype
        )
        return model
    if not place.is_file():
        raise OSError("there is no such file")
    if not hasattr(loader, "from_single_file"):
        raise ValueError(f"diffusers loads no single files into a {loader.__name__}")
    from diffusers import GGUFQuantizationConfig

    with tempfile.TemporaryDirectory() as folder:
        like: Any = reference
        like.save_config(folder)
        model = loader.from_single_file(
            str(place),
            config=folder,
            quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
            torch_dtype=dtype,
            local_files_only=True,
        )
    return model


_REPORT = "_evenkeel_report"


def _remembering(module: nn.Module, report: QuantizationReport) -> nn.Module:
    module.__dict__[_REPORT] = report
    return module


def is_handwriting(pipeline: Any) -> Path | None:
    """The folder of a pipeline that brings the handwriting evaluator along, or None."""
    folder = Path(str(pipeline.config.get("_name_or_path", "")))
    return folder if (folder / "evaluator.safetensors").is_file() else None


def evaluator_for(pipeline: Any) -> HandwritingEvaluator | None:
    """The evaluator that came with the pipeline; None for pipelines from elsewhere."""
    folder = is_handwriting(pipeline)
    return None if folder is None else HandwritingEvaluator(folder)


def references_for(pipeline: Any, prompts: list[str], seed: int) -> Tensor | None:
    """Held-out real images that show the prompts, where the pipeline is a handwriting one."""
    return None if is_handwriting(pipeline) is None else reference_images(prompts, seed)


def load_prompts(source: str | None, pipeline: Any, n: int | None, seed: int) -> list[str]:
    """Prompts from a text file, one per line (``-`` for standard input), or from the grammar.

    Raises:
        EvenkeelError: no file and no grammar, an unreadable file, or fewer lines than asked for.

    """
    if source is None:
        if is_handwriting(pipeline) is None:
            raise EvenkeelError(
                "this pipeline brings no prompts of its own: pass --prompts FILE, one prompt per line."
            )
        return sample_prompts(n or 32, seed)
    try:
        content = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise EvenkeelError(f"the prompts file {source!r} cannot be read: {_first_line(e)}.") from e
    lines = [line.strip() for line in content.splitlines() if line.strip()]
    if n is not None and len(lines) < n:
        raise EvenkeelError(f"{source} holds {len(lines)} prompts, {n} were asked for.")
    if not lines:
        raise EvenkeelError(f"{source} holds no prompts; expected one per line.")
    return lines if n is None else lines[:n]


def parse_call(pairs: list[str], pipeline: Any) -> dict[str, Any]:
    """``["height=512", "negative_prompt=blurry"]`` to pipeline arguments, values read as JSON if they are.

    Raises:
        EvenkeelError: not KEY=VALUE, or an argument that the pipeline does not take.

    """
    known = call_parameters(pipeline)
    found: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or key not in known:
            raise EvenkeelError(
                f"--call {pair!r}: expected NAME=VALUE with a name that {type(pipeline).__name__} takes: "
                f"{', '.join(k for k in known if k != 'self')}."
            )
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else repr(error)
