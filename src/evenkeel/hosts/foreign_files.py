"""What other tools wrote, looked through before their own loaders read it.

Their formats carry no digest. What they allow to be checked is: JSON that can be read, with numbers a
network can have; headers of safetensors; in a GGUF file that every tensor lies where the one before it
ends; and that the files held a value for every parameter, which their loaders otherwise draw at random or
leave empty. What was loaded is told apart by its fingerprint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from evenkeel.errors import EvenkeelError, StorageError, UnsupportedPipeline
from evenkeel.storage import check_configuration, parse_json

_CONFIGURATIONS = ("config.json", "scheduler_config.json", "model_index.json")
_LARGEST_JSON = 256_000_000  # bytes; tokenizers have tens of millions


@contextmanager
def loading(source: str, expected: str) -> Iterator[None]:
    """Inside a loader of others: whatever it raises is one error about this source.

    Raises:
        UnsupportedPipeline: names the source and what was expected.

    """
    try:
        yield
    except EvenkeelError:
        raise
    except (ImportError, NotImplementedError) as e:
        raise UnsupportedPipeline(
            f"{source!r} was quantized by a backend that is not installed: {first_line(e)}. Install "
            f"it, for example with pip install 'evenkeel[backends]'; docs/backends.md lists all."
        ) from e
    except Exception as e:  # a damaged file provokes whatever its reader does not think of
        raise UnsupportedPipeline(f"{source!r} is not {expected}: {first_line(e)}.") from e


def first_line(error: Exception) -> str:
    """What an error of others says, in a line; what it is, where it says nothing."""
    said = str(error).strip().splitlines()
    text = said[0].rstrip(".")[:300] if said else repr(error)
    known = isinstance(error, (OSError, ValueError, ImportError))
    return text if known else f"{type(error).__name__}: {text}"


def check_diffusers_folder(folder: Path) -> None:
    """Raise unless everything in a pipeline's or network's folder can be read at all.

    Raises:
        StorageError: names the file.

    """
    for path in sorted(p for pattern in ("*", "*/*") for p in folder.glob(pattern)):
        if path.suffix == ".json":
            _check_json(path)
        elif path.suffix == ".safetensors":
            _check_safetensors(path)


def check_complete(source: str, network: nn.Module) -> None:
    """Raise unless the file of a diffusers network held every parameter; what it lacks was left empty.

    Raises:
        StorageError: names the source and the parameters.

    """
    # Tensor classes of quantizers may call themselves meta and hold their values elsewhere.
    plain = ((n, p) for n, p in network.named_parameters() if type(p) is nn.Parameter)
    _refuse_missing(source, [n for n, p in plain if p.is_meta])


def check_complete_pipeline(source: str, pipeline: Any) -> None:
    """The same for every network of a pipeline; transformers draws at random what its files lack.

    Raises:
        StorageError: names the component and the parameters.

    """
    from transformers import PreTrainedModel

    for name, part in pipeline.components.items():
        place = f"{source}: its {name}"
        if isinstance(part, PreTrainedModel) and getattr(part, "hf_quantizer", None) is None:
            # Without data it reads headers alone, and says what it would draw.
            _, found = type(part).from_pretrained(
                pipeline.config._name_or_path,
                subfolder=name,
                local_files_only=True,
                output_loading_info=True,
                device_map="meta",
            )
            _refuse_missing(place, found["missing_keys"])
        elif isinstance(part, nn.Module):
            check_complete(place, part)


def _refuse_missing(what: str, names: Iterable[str]) -> None:
    missing = sorted(names)
    if missing:
        raise StorageError(
            f"{what} is incomplete: there is no value for {', '.join(missing[:3])}"
            f"{f' and {len(missing) - 3} more' if missing[3:] else ''}. Its configuration does not fit its "
            f"weights, or the file is damaged; get it again."
        )


def _check_json(path: Path) -> None:
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"no file of at most {_LARGEST_JSON} bytes")
        found = parse_json(path.read_bytes())
        if path.name in _CONFIGURATIONS and not isinstance(found, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as e:
        raise StorageError(f"{path} is damaged: it is not JSON ({e}).") from e
    if path.name in _CONFIGURATIONS:
        try:
            check_configuration(found)
        except ValueError as e:
            raise StorageError(f"{path} is damaged: {e}.") from e


def _check_safetensors(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except Exception as e:
        raise StorageError(f"{path} is not a readable safetensors file: {e}.") from e


def check_gguf(path: Path) -> None:
    """Raise unless the header can be read and the tensors lie one after another to the file's end.

    Raises:
        StorageError: names the file.
        ImportError: the package gguf is not installed.

    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        end = None
        for tensor in sorted(reader.tensors, key=lambda t: int(t.data_offset)):
            start, size = int(tensor.data_offset), int(tensor.n_bytes)
            if end is not None and not 0 <= start - end < reader.alignment:
                raise ValueError(f"{tensor.name!a} does not begin where the tensor before it ends")
            end = start + size
        if end is None:
            raise ValueError("it holds no tensors")
        if not 0 <= path.stat().st_size - end < reader.alignment:
            raise ValueError("its last tensor does not end where the file ends")
    except Exception as e:  # the reader takes every number in the file for true
        raise StorageError(f"{path} is a damaged GGUF file: {first_line(e)}.") from e
