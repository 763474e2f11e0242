"""A pipeline's networks without their weights, built from the configurations in its folder."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evenkeel.errors import UnsupportedPipeline
from evenkeel.hosts.foreign_files import check_diffusers_folder, loading
from evenkeel.storage import parse_json

INDEX = "model_index.json"
LIBRARIES = ("diffusers", "transformers")


@dataclass(frozen=True)
class Blueprint:
    """What a pipeline is made of; every tensor is on the meta device.

    Attributes:
        pipeline: its class.
        networks: by name of the component.
        scheduler: as configured.
        tokens: the longest prompt that every tokenizer takes, by name of the component.

    """

    pipeline: Any
    networks: dict[str, nn.Module]
    scheduler: Any
    tokens: dict[str, int]

    @property
    def denoiser(self) -> nn.Module:
        """The network that predicts.

        Raises:
            UnsupportedPipeline: none, or two.

        """
        found = [n for n in ("transformer", "transformer_2", "unet") if n in self.networks]
        if len(found) != 1:
            raise UnsupportedPipeline(
                f"{self.pipeline.__name__} has {len(found)} denoisers; one is expected, called "
                f"transformer or unet. Its networks are {sorted(self.networks)}."
            )
        return self.networks[found[0]]

    @property
    def autoencoder(self) -> Any:
        """The network that decodes; None where the pipeline samples pixels."""
        return next((m for n, m in self.networks.items() if n in ("vae", "vqvae")), None)

    def default(self, argument: str) -> Any:
        """What the pipeline's call takes for an argument that is not given; None where it has none."""
        found = inspect.signature(self.pipeline.__call__).parameters.get(argument)
        return None if found is None or found.default is found.empty else found.default


def read_blueprint(folder: Path) -> Blueprint:
    """Build all networks on the meta device.

    Raises:
        StorageError: a file is damaged.
        UnsupportedPipeline: no pipeline there, or a component that diffusers and transformers lack.

    """
    if not (folder / INDEX).is_file():
        raise UnsupportedPipeline(
            f"{folder} holds no {INDEX} of a pipeline that diffusers knows. Give zoo:NAME, a folder with "
            f"the configurations of a pipeline, or the id of one in the hub's cache."
        )
    check_diffusers_folder(folder)
    with loading(str(folder), "a pipeline that diffusers knows"):
        return _read(folder)


def _read(folder: Path) -> Blueprint:
    index = _json(folder / INDEX)
    pipeline = _class(folder, "diffusers", index["_class_name"])
    networks, tokens, scheduler = {}, {}, None
    for name, said in index.items():
        if name[:1] == "_" or not isinstance(said, list) or None in said:
            continue
        place = folder / name
        if name == "scheduler":
            scheduler = _class(folder, *said).from_config(_json(place / "scheduler_config.json"))
        elif name.startswith("tokenizer"):
            longest = _json(place / "tokenizer_config.json").get("model_max_length", 10**9)
            tokens[name] = int(min(longest, 10**9))  # some say 1e30
        elif (place / "config.json").is_file():
            networks[name] = _network(_class(folder, *said), place)
    return Blueprint(pipeline, networks, scheduler, tokens)


def _class(folder: Path, library: str, name: str) -> Any:
    """Of diffusers or transformers: a file does not choose what is imported."""
    try:
        if library not in LIBRARIES:
            raise ImportError(f"expected one of {' or '.join(LIBRARIES)}")
        return getattr(importlib.import_module(library), name)
    except (ImportError, AttributeError) as error:
        raise UnsupportedPipeline(
            f"{folder / INDEX} asks for {name} of {library}, which is not there ({error})."
        ) from error


def _network(kind: Any, place: Path) -> nn.Module:
    said = _json(place / "config.json")
    try:
        with torch.device("meta"):
            if hasattr(kind, "config_class") and kind.config_class is not None:
                network = kind(kind.config_class.from_dict(said))
            else:
                network = kind.from_config(said)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UnsupportedPipeline(
            f"{place / 'config.json'} is no configuration of a {kind.__name__}: {error}."
        ) from error
    made: nn.Module = nn.Module.to(network, "meta").eval().requires_grad_(False)
    return made


def _json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UnsupportedPipeline(
            f"{path} cannot be read ({error}); plan needs every configuration of the pipeline, and none "
            f"of its weights."
        ) from error
    return found
