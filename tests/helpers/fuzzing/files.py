"""Every kind of file that is read: how one is made, loaded and told from another, and what damage does."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import random
import resource
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_bytes

from evenkeel.errors import EvenkeelError
from evenkeel.storage import digest, json_text
from fuzzing.command_line import Outcome
from fuzzing.damage import SAFETENSORS, damage, edited, tensors

LIMIT = 10.0  # seconds of the processor
MEMORY = 500e6  # bytes more than loading the whole file takes


@dataclass(frozen=True)
class FileKind:
    """One kind.

    Attributes:
        make: writes a good one into a folder that is there and empty.
        load: what is in the folder, as words that tell any two apart.
        ours: written by this library, with a digest; of other formats a change can only be noticed where
            the format itself allows.

    """

    make: Callable[[Path], Any]
    load: Callable[[Path], str]
    ours: bool = True


def _told(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _of_tensors(found: dict[str, torch.Tensor]) -> str:
    return digest("", {n: t.cpu() for n, t in found.items()})


def _network(module: Any) -> str:
    from evenkeel.hosts.pipeline.fingerprint import fingerprint

    return fingerprint(module)


# ---- our own


def _record(place: Path) -> None:
    from synthetic_record import WHOLE

    WHOLE.save(place / "record.safetensors")


def _correction(place: Path) -> str:
    import evenkeel

    path = next(place.glob("*.safetensors"), place / f"{place.name.split('-')[-1]}.safetensors")
    found = evenkeel.load(path)
    again = place.parent / "again.safetensors"
    evenkeel.save(found, again)
    return _told(again.read_bytes())


def _made_readout() -> Any:
    from made_corrections import readout
    from synthetic_record import WHOLE

    return readout(WHOLE.evidence)


def _readout(place: Path) -> None:
    import evenkeel

    evenkeel.save(_made_readout(), place / "readout.safetensors")


def _adapters(place: Path) -> None:
    from made_adapters import made_adapters
    from small_denoisers import dit

    import evenkeel

    torch.manual_seed(0)
    evenkeel.save(made_adapters(dit()), place / "adapters.safetensors")


def _small_quantized() -> Any:
    from small_denoisers import dit

    from evenkeel.quantizers import QuantizerSpec, quantize_module

    torch.manual_seed(0)
    return quantize_module(dit(), QuantizerSpec.parse("w4a8-g16-r2"))[0]


def _quantized(place: Path) -> None:
    from evenkeel.quantizers import save_quantized

    save_quantized(_small_quantized(), place)


def _load_quantized(place: Path) -> str:
    from evenkeel.quantizers import load_quantized

    module, report = load_quantized(place)
    return _told(_network(module), repr(report), _of_tensors(module.state_dict()))


def _resume(place: Path) -> None:
    from evenkeel.quantizers.saved.progress_files import Partial

    module, partial = _small_quantized(), Partial(place, "svdquant")
    report = module.evenkeel_report
    for layer in report.quantized[:3]:
        partial.write(layer.name, {layer.name: module.get_submodule(layer.name)}, [layer])
    partial.stage("sensitivity", lambda: {"a": [1.0, 2.0]})


def _load_resume(place: Path) -> str:
    from small_denoisers import dit

    from evenkeel.quantizers.saved.progress_files import Partial

    partial, like = Partial(place, "svdquant"), dit()
    names = [layer.name for layer in _small_quantized().evenkeel_report.quantized[:3]]
    found = [partial.read(name, like) for name in names]
    stage = partial.stage("sensitivity", lambda: {"a": [1.0, 2.0]})
    if any(x is None for x in found):  # not there: computed again
        return ""
    states = [_of_tensors(layer.state_dict()) for x in found if x for layer in x[0].values()]
    return _told(states, [x[1] for x in found if x], stage)


def _images(place: Path) -> None:
    from evenkeel.comparing.generation import IMAGES
    from evenkeel.storage import write_tensors

    made = {"images": torch.arange(2 * 3 * 8 * 8, dtype=torch.uint8).reshape(2, 3, 8, 8)}
    header = {"made_by": {"seed": 1, "prompts": ["a", "b"]}, "seconds": 0.5}
    write_tensors(place / "000000-002.safetensors", IMAGES, header, made)


def _load_images(place: Path) -> str:
    from evenkeel.comparing.generation import _kept

    asked = {"seed": 1, "prompts": ["a", "b"]}
    pictures, seconds = _kept(place / "000000-002.safetensors", asked)
    return _told(_of_tensors({"": pictures}), seconds)


def _piece(place: Path) -> None:
    from evenkeel.fitting.adapters.kept import Kept

    kept = Kept(place)
    kept.tensor("samples", {"seed": 1}, lambda: torch.arange(12.0).reshape(3, 4))
    kept.put("rows", {"seed": 2}, {"a": 1.0}, {"keys": torch.arange(3), "rows": torch.ones(3, 2)})


def _load_piece(place: Path) -> str:
    from evenkeel.fitting.adapters.kept import Kept

    kept = Kept(place)
    made = kept.tensor("samples", {"seed": 1}, lambda: torch.arange(12.0).reshape(3, 4))
    found = kept.get("rows", {"seed": 2}, "keys", "rows")
    if found is None:  # not there: computed again
        return ""
    return _told(_of_tensors({"": made, **found[1]}), found[0])


def _training_of() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    network = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return network, optimizer


def _training(place: Path) -> None:
    from evenkeel.fitting.training.checkpoint import Checkpoint

    network, optimizer = _training_of()
    own = dict(network.named_parameters())
    best = {name: p.detach() + 1 for name, p in own.items()}
    Checkpoint(place, {"seed": 1}).write({"epoch": 2, "loss": 0.5}, own, optimizer, best)


def _load_training(place: Path) -> str:
    from evenkeel.fitting.training.checkpoint import Checkpoint

    network, optimizer = _training_of()
    own = dict(network.named_parameters())
    found = Checkpoint(place, {"seed": 1}).read(own, optimizer)
    if found is None:
        return ""
    moments = {f"{i}.{k}": v for i, s in enumerate(optimizer.state.values()) for k, v in s.items()}
    return _told(_of_tensors(network.state_dict() | moments), found[0], _of_tensors(found[1]))


def _zoo_training(place: Path) -> None:
    from evenkeel.zoo.making.loop import Recipe, fit

    torch.manual_seed(0)
    recipe = Recipe(steps=3, learning_rate=1e-3, seed=1)
    fit(torch.nn.Linear(4, 3), lambda net, _: net(torch.ones(2, 4)).sum(), recipe, place)


def _load_zoo_training(place: Path) -> str:
    from evenkeel.zoo.making.loop import Recipe, fit

    torch.manual_seed(0)
    recipe = Recipe(steps=3, learning_rate=1e-3, seed=1)
    network = torch.nn.Linear(4, 3)
    fit(network, lambda net, _: net(torch.ones(2, 4)).sum(), recipe, place)
    return _told(_of_tensors(network.state_dict()))


def _restored(place: Path) -> None:
    from made_adapters import made_adapters
    from small_denoisers import dit

    from evenkeel.record.correction_file import RESTORED, save
    from evenkeel.storage import write_folder

    torch.manual_seed(0)
    parts = {"adapters": made_adapters(dit()), "readout": _made_readout()}
    files: dict[str, Any] = {
        f"{name}.safetensors": lambda path, part=part: save(part, path)
        for name, part in parts.items()
    }
    files["results.json"] = json.dumps({"a": 1})
    write_folder(place, RESTORED, {"parts": [*parts]}, files)


def _load_restored(place: Path) -> str:
    import evenkeel

    found = evenkeel.load(place)
    return _told([part.digest() for part in found.parts])


def _twin(place: Path) -> None:
    from evenkeel import zoo
    from evenkeel.zoo.parts import files_of

    for name, source in files_of(zoo.path_of("pixart-sigma")).items():
        if name.parts[0] in ("scheduler", "model_index.json", "evaluator.safetensors", "tokenizer"):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, place / name)
    from evenkeel.zoo.parts import sign

    sign(place, "pixart-sigma", "captions")


def _load_twin(place: Path) -> str:
    from evenkeel.zoo.evaluation import HandwritingEvaluator
    from evenkeel.zoo.parts import signed

    said = signed(place)
    return _told(said, _of_tensors(HandwritingEvaluator(place).network.state_dict()))


# ---- of others


def _pipeline(place: Path) -> None:
    import tiny_pipelines

    tiny_pipelines.pixart_sigma().pipe.save_pretrained(place)


def _load_pipeline(place: Path) -> str:
    from evenkeel.cli.sources import load_pipeline
    from evenkeel.hosts.pipeline.components import component_keys

    pipeline = load_pipeline(str(place))
    return _told(component_keys(pipeline, ""))


def _load_blueprint(place: Path) -> str:
    from evenkeel.planning.blueprint import read_blueprint

    found = read_blueprint(place)
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in found.networks.items()}
    return _told(
        sizes,
        found.pipeline.__name__,
        sorted(getattr(found.scheduler, "config", {}).items()),
        found.tokens,
    )


def _denoiser(place: Path) -> None:
    import tiny_pipelines

    tiny_pipelines.pixart_sigma().model.save_pretrained(place)


class _Reference:
    """A pipeline of the class that the damaged denoiser belongs to, made once."""

    def __init__(self) -> None:
        self.made: dict[str, Any] = {}

    def __call__(self, name: str) -> Any:
        import tiny_pipelines

        if name not in self.made:
            self.made[name] = tiny_pipelines.ALL[name]().pipe
        return self.made[name]


_reference = _Reference()


def _load_denoiser(place: Path) -> str:
    from evenkeel.cli.sources import load_denoiser

    return _network(load_denoiser(str(place), _reference("pixart_sigma")))


def _gguf(place: Path) -> None:
    import gguf

    model = _reference("flux").transformer
    writer = gguf.GGUFWriter(str(place / "model.gguf"), "flux")
    writer.add_quantization_version(2)
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in model.state_dict().items():
        array = tensor.detach().float().numpy()
        if tensor.dim() == 2 and tensor.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _load_gguf(place: Path) -> str:
    from evenkeel.cli.sources import load_denoiser

    return _network(load_denoiser(str(place / "model.gguf"), _reference("flux")))


KINDS: dict[str, FileKind] = {
    "record": FileKind(_record, _correction),
    "readout": FileKind(_readout, _correction),
    "adapters": FileKind(_adapters, _correction),
    "restored": FileKind(_restored, _load_restored),
    "quantized": FileKind(_quantized, _load_quantized),
    "resume": FileKind(_resume, _load_resume),
    "images": FileKind(_images, _load_images),
    "piece": FileKind(_piece, _load_piece),
    "training": FileKind(_training, _load_training),
    "zoo-training": FileKind(_zoo_training, _load_zoo_training),
    "twin": FileKind(_twin, _load_twin),
    "pipeline": FileKind(_pipeline, _load_pipeline, ours=False),
    "blueprint": FileKind(_pipeline, _load_blueprint, ours=False),
    "denoiser": FileKind(_denoiser, _load_denoiser, ours=False),
    "gguf": FileKind(_gguf, _load_gguf, ours=False),
}


# ---- judging


def outcomes(name: str, seeds: Sequence[int]) -> Iterator[tuple[int, Outcome]]:
    """One damaged copy per seed, in the working directory, and what loading it came to."""
    kind, good, bad = KINDS[name], Path(f"good-{name}"), Path(f"bad-{name}")
    good.mkdir()
    with _quiet():
        kind.make(good)
        expected = kind.load(_copied(good, bad))
        files = sorted(p.relative_to(good) for p in good.rglob("*") if p.is_file())
    for seed in seeds:
        rng = random.Random(f"{name} {seed}")
        victim = _copied(good, bad) / rng.choice(files)
        if kind.ours and rng.random() < 0.4:
            signed, how = True, resign(bad, victim, rng)
        else:
            signed, how = False, damage(victim, rng)
        found = _judged(kind, bad, victim, expected, signed)
        yield seed, Outcome(found.word, f"{victim.name}, {how}: {found.said}", found.seconds)
    shutil.rmtree(bad, ignore_errors=True)


def _copied(good: Path, bad: Path) -> Path:
    shutil.rmtree(bad, ignore_errors=True)
    return shutil.copytree(good, bad)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Libraries complain about damaged files in their own voices, too."""
    logging.disable(logging.CRITICAL)
    try:
        with (
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _judged(kind: FileKind, place: Path, victim: Path, expected: str, signed: bool) -> Outcome:
    began, before = time.process_time(), _most_memory()
    error: BaseException | None = None
    found = ""
    with _quiet():
        try:
            found = kind.load(place)
        except Exception as e:
            error = e
    seconds = time.process_time() - began
    if seconds > LIMIT:
        return Outcome("SLOW", repr(error)[:300], seconds)
    if _most_memory() - before > MEMORY:
        return Outcome("TOO MUCH MEMORY", repr(error)[:300], seconds)
    if error is not None:
        if not isinstance(error, EvenkeelError):
            return Outcome("TRACEBACK", repr(error)[:300], seconds)
        said = " ".join(str(error).split())
        # What is wrong may lie in another file than the damaged one, as seen from the reader.
        named = str(place) in said or victim.name in said
        return Outcome("refused" if named else "NAMELESS", said[:300], seconds)
    if found in (expected, ""):
        return Outcome("same", "", seconds)
    if not kind.ours and _again(kind, place) != found:
        return Outcome("BY CHANCE", "loaded twice it is two things", seconds)
    if signed or not kind.ours:  # forged by somebody, or in a format that keeps no digest
        return Outcome("another one", "", seconds)
    return Outcome("SILENT CHANGE", "", seconds)


def _again(kind: FileKind, place: Path) -> str:
    with _quiet():
        return kind.load(place)


def _most_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


# ---- signing again what was changed


def resign(folder: Path, victim: Path, rng: random.Random) -> str:
    """Change it and make every digest fit, as anybody can; returns how."""
    content, how = victim.read_bytes(), "as it was"
    try:
        if victim.suffix == ".safetensors":
            change = rng.choice((tensors, _metadata_value))
            how = change.__name__
            victim.write_bytes(_signed_tensors(change(content, rng)))
        elif victim.suffix == ".json":
            how = "edited"
            victim.write_bytes(_signed_json(edited(content, rng)))
        for manifest in folder.rglob("*.json"):
            if manifest != victim:
                _update(manifest, victim)
    except Exception:  # too broken to be signed: damaged it is all the same
        how += ", not signed"
    return f"signed again: {how}"


def _metadata_value(content: bytes, rng: random.Random) -> bytes:
    return next(d for d in SAFETENSORS if d.__name__ == "metadata")(content, rng)


def _signed_tensors(content: bytes) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    said = header.get("__metadata__") or {}
    if "digest" in said:
        names = _order([n for n in said if n not in ("format", "schema_version", "digest")])
        said["digest"] = digest("".join(said[n] for n in names), load_bytes(content))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _order(names: list[str]) -> list[str]:
    """Keys as their kinds have them."""
    known = (
        ("provenance", "closed_loop"),
        ("provenance", "readout"),
        ("provenance", "adapters"),
        ("layers", "reports"),
        ("made_by", "seconds"),
    )
    return next(([*k] for k in known if {*k} == {*names}), names)


def _signed_json(content: bytes) -> bytes:
    found = json.loads(content)
    if isinstance(found, dict) and "digest" in found:
        del found["digest"]
        found["digest"] = digest(json_text(found), {})
    return json.dumps(found).encode()


def _update(manifest: Path, victim: Path) -> None:
    found = json.loads(manifest.read_bytes())
    name = victim.relative_to(manifest.parent).as_posix()
    if isinstance(found, dict) and name in (found.get("files") or {}):
        found["files"][name] = hashlib.sha256(victim.read_bytes()).hexdigest()
        manifest.write_bytes(_signed_json(json.dumps(found).encode()))
