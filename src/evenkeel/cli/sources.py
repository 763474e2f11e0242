"""From words on a command line to pipelines, quantized denoisers, prompts and evaluators."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from evenkeel import zoo
from evenkeel.cli.prompt_files import FORMS, read_prompts
from evenkeel.errors import EvenkeelError
from evenkeel.hosts.comfy_checkpoint import is_comfy_checkpoint, load_comfy
from evenkeel.hosts.foreign_files import (
    check_complete,
    check_complete_pipeline,
    check_diffusers_folder,
    check_gguf,
    loading,
)
from evenkeel.hosts.pipeline.pipelines import call_parameters, denoiser_of, load
from evenkeel.hosts.pipeline.prompts import Prompts
from evenkeel.hosts.scheduler.schedulers import change_scheduler, scheduler_names
from evenkeel.quantizers import QuantizerSpec, load_quantized, quantize_module, save_quantized
from evenkeel.quantizers.saved.foreign_folder import save_foreign
from evenkeel.quantizers.saved.report import report_on
from evenkeel.storage.hub import holds, is_hub_id, local
from evenkeel.zoo.parts import signed
from evenkeel.zoo.pictures import KINDS, Pictures


def load_pipeline(source: str, dtype: str = "float32", scheduler: str | None = None) -> Any:
    """``zoo:NAME``, a local diffusers folder, or a hub id.

    Args:
        source: one of these.
        dtype: of all networks, whatever they were saved in.
        scheduler: to sample with instead of the pipeline's own: a twin's short name for one, or a class
            of diffusers.

    Raises:
        UnsupportedPipeline: nothing there that diffusers can load.
        EvenkeelError: no such scheduler; lists those there are.

    """
    import torch

    twin = zoo.twin(source[4:]) if source.startswith("zoo:") else None
    chosen = None if scheduler is None else _sampler(scheduler, twin)
    local = twin is not None or Path(source).exists()
    place = source if twin is None else zoo.path_of(twin.name)
    if local:
        check_diffusers_folder(Path(place))
    expected = (
        "a pipeline that diffusers can load; expected zoo:NAME, a folder with a model_index.json, or "
        "the id of a pipeline on the hub"
    )
    with loading(source, expected):
        pipeline = load(place, local_files_only=local, torch_dtype=getattr(torch, dtype))
        check_complete_pipeline(source, pipeline)
    if chosen is not None:
        change_scheduler(pipeline, chosen.scheduler, **chosen.changes)
    return pipeline


def _sampler(name: str, twin: zoo.Twin | None) -> zoo.Sampler:
    if twin is not None and name in twin.schedulers:
        return twin.schedulers[name]
    known = scheduler_names()
    if name in known:
        return zoo.Sampler(name)
    own = "" if twin is None else f"{', '.join(twin.schedulers)} (as {twin.original}), or "
    raise EvenkeelError(
        f"no scheduler called {name!r}; expected {own}a class of diffusers: {', '.join(known)}."
    )


def save_denoiser(module: nn.Module, folder: Path) -> None:
    """Write a denoiser where ``load_denoiser`` finds it again, whoever quantized it."""
    if report_on(module) is not None:
        save_quantized(module, folder)
    else:
        save_foreign(module, folder)


def load_denoiser(source: str, pipeline: Any) -> nn.Module:
    """A quantizer specification (``w3a4-g32-r16``), a saved quantized denoiser, a folder or hub id.

    A folder or hub id may hold weights of any backend that diffusers loads, and the file of GGUF
    weights (``.gguf``) is taken alone, as is a quantized checkpoint of ComfyUI (``.safetensors``).

    Raises:
        EvenkeelError: none of these, or their backend is not installed.

    """
    if is_hub_id(source) and holds(source, "quantized.json"):
        source = str(local(source))
    place = Path(source)
    if (place / "quantized.json").is_file():
        return load_quantized(place)[0]
    reference = denoiser_of(pipeline)
    if not place.exists() and "/" not in source and place.suffix != ".gguf":
        return quantize_module(reference, QuantizerSpec.parse(source))[0]
    expected = (
        f"a {type(reference).__name__} that diffusers can load; expected a specification such as "
        f"w3a4-g32-r16, a folder, a .gguf file, or a hub id"
    )
    if place.is_dir():
        check_diffusers_folder(place)
    with loading(source, expected):
        model: nn.Module = _loaded(source, place, reference, type(pipeline).__name__).eval()
    check_complete(source, model)
    return model


def _loaded(source: str, place: Path, reference: nn.Module, pipeline_class: str) -> nn.Module:
    """What diffusers loads: a folder or hub id, or the weights of a ``.gguf`` file; or ComfyUI's file.

    Such a file holds no configuration; it gets that of the reference.
    """
    loader: Any = type(reference)
    dtype = next(reference.parameters()).dtype
    if is_comfy_checkpoint(place):
        return load_comfy(place, reference, pipeline_class)
    if place.suffix != ".gguf":
        model: nn.Module = loader.from_pretrained(
            source, local_files_only=place.exists(), torch_dtype=dtype
        )
        return model
    if not place.is_file():
        raise OSError("there is no such file")
    if not hasattr(loader, "from_single_file"):
        raise ValueError(f"diffusers loads no single files into a {loader.__name__}")
    check_gguf(place)
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


def twin_of(pipeline: Any) -> tuple[Path, Pictures] | None:
    """The folder of a twin's pipeline and the kind of its pictures; None for pipelines from elsewhere.

    Raises:
        StorageError: the folder's ``twin.json`` cannot be used, or a file was changed.
        EvenkeelError: it names no kind of picture.

    """
    folder = Path(str(pipeline.config.get("_name_or_path", "")))
    if not (folder / zoo.TWIN_FILE).is_file():
        return None
    kind = signed(folder)["pictures"]
    if kind not in KINDS:
        raise EvenkeelError(
            f"{folder / zoo.TWIN_FILE} names pictures of kind {kind!r}; there are {', '.join(KINDS)}."
        )
    return folder, KINDS[kind]


def evaluator_for(pipeline: Any) -> Any:
    """The evaluator of a twin's pictures; None for pipelines from elsewhere."""
    found = twin_of(pipeline)
    return None if found is None else found[1].evaluator(found[0])


def references_for(pipeline: Any, prompts: Prompts, seed: int) -> Tensor | None:
    """Held-out real images that show the prompts, where the pipeline is a twin."""
    found = twin_of(pipeline)
    return None if found is None else found[1].references([*prompts], seed)


def _rows_of(source: str) -> tuple[str, slice]:
    """``FILE#5000:10000`` as the file and its rows; a file that is called so is taken whole."""
    found = re.fullmatch(r"(.+)#(\d{0,12}):(\d{0,12})", source)
    if found is None or Path(source).exists():
        return source, slice(None)
    first, last = (int(number) if number else None for number in found.groups()[1:])
    return found[1], slice(first, last)


_DRAWN = 256  # at once


def _first(n: int, pictures: Pictures, seed: int) -> list[Any]:
    """The first prompts of one row: more of them are the same ones and others."""
    rounds = range(-(-n // _DRAWN))
    return [p for i in rounds for p in pictures.prompts(_DRAWN, seed + 1_000_000 * i)][:n]


def load_prompts(source: str | None, pipeline: Any, n: int | None, seed: int) -> Prompts:
    """The first ``n`` prompts of a file (``-`` for standard input; see ``read_prompts``), or the twin's own.

    ``FILE#5000:10000`` is these rows of it, counted from 0. Where the pipeline takes class labels, prompts
    are numbers.

    Raises:
        EvenkeelError: no file and no twin, a file that cannot be read, fewer prompts than asked for, or
            something that is no class label.

    """
    if source is None:
        found = twin_of(pipeline)
        if found is None:
            raise EvenkeelError(
                f"this pipeline brings no prompts of its own: pass --prompts FILE, with {FORMS}."
            )
        return Prompts.of(_first(n or 32, found[1], seed))
    known = call_parameters(pipeline)
    file, rows = _rows_of(source)
    prompts = read_prompts(file, known, labels="prompt" not in known and "class_labels" in known)
    prompts = prompts[rows]
    if not len(prompts):
        raise EvenkeelError(f"{file} holds no prompts in the rows of {source}.")
    if n is not None and len(prompts) < n:
        raise EvenkeelError(f"{source} holds {len(prompts)} prompts, {n} were asked for.")
    return prompts[:n]
