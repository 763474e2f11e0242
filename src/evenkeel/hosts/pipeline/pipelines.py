"""A diffusers pipeline as calibration sees it: its denoiser, and how to call it."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from evenkeel.errors import EvenkeelError, UnsupportedPipeline
from evenkeel.hosts.pipeline.prompts import Prompt as Prompt
from evenkeel.hosts.pipeline.prompts import Prompts


def load(place: Any, **options: Any) -> Any:
    """``DiffusionPipeline.from_pretrained`` without the loading bars of two libraries.

    Without ``torch_dtype`` diffusers' networks come in float32, text encoders as they were saved. Parts of
    other classes than the pipeline's type hints name (the zoo's LDM twins) are not remarked on: what
    evenkeel needs of a part is checked where it is used.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    chatty = [x for x in (diffusers_logging, transformers_logging) if x.is_progress_bar_enabled()]
    for library in chatty:
        library.disable_progress_bar()
    remarks = logging.getLogger("diffusers.pipelines.pipeline_utils")
    remarks.addFilter(_is_no_type_hint)
    try:
        with warnings.catch_warnings():
            # Later versions call it dtype; earlier ones know no other name.
            warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
            return DiffusionPipeline.from_pretrained(place, **options)
    finally:
        remarks.removeFilter(_is_no_type_hint)
        for library in chatty:
            library.enable_progress_bar()


def _is_no_type_hint(line: logging.LogRecord) -> bool:
    return not str(line.msg).startswith("Expected types for")


def denoiser_name(pipeline: Any) -> str:
    """Name of the component that predicts: ``transformer`` or ``unet``.

    Raises:
        UnsupportedPipeline: none, or two (Wan 2.2 splits the steps between two transformers).

    """
    if getattr(pipeline, "transformer_2", None) is not None:
        raise UnsupportedPipeline(
            f"{type(pipeline).__name__} has two denoisers (transformer and transformer_2); only "
            f"pipelines with one are supported."
        )
    for name in ("transformer", "unet"):
        if isinstance(getattr(pipeline, name, None), nn.Module):
            return name
    raise UnsupportedPipeline(
        f"{type(pipeline).__name__} has no component called transformer or unet; its components are "
        f"{sorted(getattr(pipeline, 'components', {}))}."
    )


def denoiser_of(pipeline: Any) -> nn.Module:
    """The denoiser itself."""
    module: nn.Module = getattr(pipeline, denoiser_name(pipeline))
    return module


def uncompiled(module: nn.Module) -> nn.Module:
    """The network that ``torch.compile`` wraps, or the module itself."""
    inner: nn.Module = getattr(module, "_orig_mod", module)
    return inner


def forget_graphs(*modules: nn.Module) -> None:
    """Let torch.compile trace anew if any of these is compiled, wrapped or in place.

    Compiled graphs do not notice a hook that is new, or gone: they would leave it out, or keep it.
    """
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in modules):
        torch.compiler.reset()


@contextmanager
def eager(*networks: nn.Module) -> Iterator[None]:
    """Inside, what was compiled in place (``module.compile()``) runs as it is written."""
    kept = {m: m._compiled_call_impl for network in networks for m in network.modules()}
    compiled = {m: call for m, call in kept.items() if call is not None}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


@contextmanager
def denoiser_swapped(pipeline: Any, module: nn.Module) -> Iterator[None]:
    """Inside, the pipeline runs with ``module``; the original is put back whatever happens."""
    name = denoiser_name(pipeline)
    original = getattr(pipeline, name)
    setattr(pipeline, name, module)
    try:
        yield
    finally:
        setattr(pipeline, name, original)


_TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


def call_defaults(pipeline: Any) -> dict[str, Any]:
    """Arguments without which a call would fail or warn, from what the pipeline itself says.

    - ``max_sequence_length``: not beyond what its tokenizers can hold (T5's where there is one);
    - ``height`` and ``width``: not beyond the size that the networks were trained for, where the pipeline
      assumes one whatever they are (FLUX, Sana);
    - ``use_resolution_binning=False`` where the denoiser's sample size has no list of resolutions;
    - ``clean_caption=False``: caption cleaning needs packages that may be missing;
    - ``complex_human_instruction=None`` (Sana): hundreds of instruction tokens in front of every
      prompt that a tokenizer with a short maximum cannot hold.
    """
    parameters = call_parameters(pipeline)
    defaults: dict[str, Any] = {}
    tokenizers: list[Any] = [getattr(pipeline, name, None) for name in _TOKENIZERS]
    longest = max((t.model_max_length for t in tokenizers if t is not None), default=10**9)
    length = parameters.get("max_sequence_length")
    if length is not None and isinstance(length.default, int) and longest < length.default:
        defaults["max_sequence_length"] = int(longest)
        if "complex_human_instruction" in parameters:
            defaults["complex_human_instruction"] = None
    if "use_resolution_binning" in parameters:
        size = getattr(denoiser_of(pipeline).config, "sample_size", None)
        defaults["use_resolution_binning"] = size in (32, 64, 128, 256)
    if "clean_caption" in parameters:
        defaults["clean_caption"] = False
    sides = _sides(pipeline, parameters)
    if sides is not None and sides[1] < sides[0]:
        defaults |= {"height": sides[1], "width": sides[1]}
    return defaults


def _sides(pipeline: Any, parameters: dict[str, inspect.Parameter]) -> tuple[int, int] | None:
    """Height that the pipeline assumes, and that its networks say; None where it asks them itself."""
    if not {"height", "width"} <= set(parameters):
        return None
    assumed, scale = parameters["height"].default, getattr(pipeline, "vae_scale_factor", 1)
    native = getattr(getattr(denoiser_of(pipeline), "config", None), "sample_size", None)
    if isinstance(assumed, int) and isinstance(native, int):
        return assumed, native * scale
    # FLUX: its denoiser knows no size, its autoencoder does.
    latents = getattr(pipeline, "default_sample_size", None)
    trained = getattr(getattr(getattr(pipeline, "vae", None), "config", None), "sample_size", None)
    if native is None and isinstance(latents, int) and isinstance(trained, int):
        return latents * scale, trained
    return None


def call_parameters(pipeline: Any) -> dict[str, inspect.Parameter]:
    """Parameters of the pipeline's ``__call__``."""
    return dict(inspect.signature(type(pipeline).__call__).parameters)


def run_pipeline(
    pipeline: Any,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    *,
    num_inference_steps: int,
    guidance_scale: float | None,
    output_type: str,
    call: dict[str, Any],
) -> Any:
    """Call the pipeline on a batch, one seeded CPU generator per prompt; returns its first output.

    Raises:
        UnsupportedPipeline: an argument that this pipeline does not take, named.

    """
    parameters = call_parameters(pipeline)
    given: dict[str, Any] = {"num_inference_steps": num_inference_steps, **call_defaults(pipeline)}
    given |= Prompts.of(prompts).arguments(parameters)
    if guidance_scale is not None:
        given["guidance_scale"] = guidance_scale
    if "output_type" in parameters:
        given["output_type"] = output_type
    given |= call
    unknown = sorted(set(given) - set(parameters))
    if unknown:
        raise UnsupportedPipeline(
            f"{type(pipeline).__name__} does not take {', '.join(unknown)}; its call takes "
            f"{', '.join(p for p in parameters if p != 'self')}."
        )
    given["generator"] = [torch.Generator("cpu").manual_seed(s) for s in seeds]
    pixels = getattr(pipeline, "vae", None) is None
    with (
        torch.no_grad(),
        _NumpyOfBfloat16() if pixels else nullcontext(),
        _encoders_missed(pipeline),
    ):
        out = pipeline(**given, return_dict=False)
    return out[0] if isinstance(out, tuple) else out


@contextmanager
def _encoders_missed(pipeline: Any) -> Iterator[None]:
    """What fails inside for want of text encoders that were taken out is said as that."""
    try:
        yield
    except (AttributeError, TypeError, ValueError) as e:
        parts = getattr(pipeline, "components", {})
        gone = [k for k, v in parts.items() if v is None and k.startswith("text_encoder")]
        if isinstance(e, EvenkeelError) or not gone:
            raise
        raise UnsupportedPipeline(
            f"{type(pipeline).__name__} has no {', '.join(gone)} and failed: {e}. Pass prompt_embeds and "
            f"whatever comes with them (pooled and negative ones, masks), or load the encoders."
        ) from e


def default_guidance(pipeline: Any) -> float | None:
    """The guidance scale of a call that names none; None where the pipeline has no such argument."""
    default = getattr(call_parameters(pipeline).get("guidance_scale"), "default", None)
    return float(default) if isinstance(default, (int, float)) else None


class _NumpyOfBfloat16(TorchFunctionMode):
    """Inside, ``Tensor.numpy`` widens bfloat16, which numpy does not know.

    Most pipelines do so themselves; those in pixel space (``DDPMPipeline``) do not.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.numpy and args[0].dtype == torch.bfloat16:
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


@contextmanager
def global_noise_kept() -> Iterator[None]:
    """Afterwards, the global generators are as they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def quiet(pipeline: Any) -> Iterator[None]:
    """Inside, the pipeline shows no progress bar of its own."""
    config = dict(getattr(pipeline, "_progress_bar_config", {}))
    if hasattr(pipeline, "set_progress_bar_config"):
        pipeline.set_progress_bar_config(**{**config, "disable": True})
    try:
        yield
    finally:
        if hasattr(pipeline, "set_progress_bar_config"):
            pipeline.set_progress_bar_config(**config)
