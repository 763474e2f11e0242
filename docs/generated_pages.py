"""The pages that the code itself writes: one per method, samplers, errors, API reference."""

from __future__ import annotations

import importlib
import inspect
import re
import shutil
from pathlib import Path
from typing import Any

import evenkeel
from evenkeel import errors
from evenkeel.corrections.catalogue import ALL, CLOSED_LOOP, EVIDENCE, FORMS, root_of
from evenkeel.errors import EvenkeelError
from evenkeel.quantizers import METHODS
from evenkeel.testing import LINEAR, NONLINEAR, SOME, drawn_evidence, law_of

MODULES = {
    "evenkeel": "what most people need",
    "evenkeel.corrections": "corrections, and the base class of one's own",
    "evenkeel.quantizers": "methods, and what they leave behind",
    "evenkeel.metrics": "measures, each with its interval",
    "evenkeel.record": "records",
    "evenkeel.record.lora_file": "adapters for other programs",
    "evenkeel.storage.hub": "the hub",
    "evenkeel.reports": "tables, figures, pages",
    "evenkeel.zoo": "twins",
    "evenkeel.testing": "for whoever writes a correction",
    "evenkeel.hosts.backends.base": "for whoever adds a backend",
    "evenkeel.hosts.pipeline.pipelines": "what a pipeline is asked for",
}
COMES_FROM = {
    EVIDENCE: "the statistics of a record: `evenkeel calibrate`, `evenkeel.calibrate`",
    CLOSED_LOOP: "a record that was measured in closed loop: `evenkeel calibrate --closed-loop`",
    "file": "a file of its own: `evenkeel readout` or `evenkeel restore`",
}


SAMPLERS = """\
# Samplers

A correction of the sampler, and a readout, needs to know what a step does. No list says it: a copy of the
scheduler is run on impulses, which gives its step law,

    x_next = a x + sum over outputs of w_j output_j + noise

or shows that there is none, and then it is refused. Fitted adapters ask nothing of the sampler.

The schedulers of diffusers in the configurations that the tests go through (`evenkeel.testing.LINEAR`,
`NONLINEAR`), asked while this page was made:

"""


def write(folder: Path) -> None:
    """Everything, anew; a file whose text is the same stays as it is."""
    pages = {"samplers.md": samplers(), "errors.md": errors_page()}
    for kind, made in (("corrections", corrections()), ("quantizers", quantizers())):
        pages |= {f"{kind}/{place(name)}.md": text for name, text in made.items()}
        pages[f"{kind}/index.md"] = index(kind.capitalize(), [*made])
    made = {name: api(name, said) for name, said in MODULES.items()}
    pages |= {f"api/{name}.md": text for name, text in made.items()}
    pages["api/index.md"] = index("API reference", [*made])
    known = {folder / name for name in pages}
    if folder.is_dir() and not known >= {p for p in folder.rglob("*.md")}:
        shutil.rmtree(folder)
    for name, text in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)


def place(name: str) -> str:
    """A file's name for it."""
    return re.sub(r"[^a-z0-9._-]", "-", name)


def index(title: str, names: list[str]) -> str:
    """A list of pages."""
    lines = "\n".join(place(name) for name in names)
    return f"# {title}\n\n```{{toctree}}\n:maxdepth: 1\n\n{lines}\n```\n"


def documented(*lines: str) -> str:
    """Directives of Sphinx inside a page in Markdown."""
    return "\n".join(["```{eval-rst}", *lines, "```"])


# ---- corrections


def corrections() -> dict[str, str]:
    """Name in the catalogue -> page."""
    evidence = drawn_evidence(law_of(SOME[0]), 0.1)
    return {name: correction(name, evidence) for name in ALL}


def correction(name: str, evidence: Any) -> str:
    """What it is, from where, made of what, with which settings, and where it was measured."""
    entry = ALL[name]
    example = entry.make(evidence) if entry.source == EVIDENCE else None
    maker: Any = ALL.get(
        entry.source, entry
    ).make  # of what it is made from, where that is another one
    kind: type[Any] = type(example) if example is not None else maker.__self__
    said = example if example is not None else kind
    references = said.references if isinstance(said.references, tuple) else ()
    rows = [
        ("class", f"`{kind.__module__.rpartition('.')[0]}.{kind.__name__}`"),
        ("source", "; ".join(references) or "ours"),
        ("made from", COMES_FROM[root_of(name)]),
        ("acts on", ", ".join(said.stages) if isinstance(said.stages, tuple) else "see below"),
        ("command", f"`evenkeel compare ... --corrections {name}`"),
    ]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    text = f"# {name}\n\n| | |\n|---|---|\n{table}\n\n"
    text += presets(name, example, evidence)
    text += (
        "Measured in [Choosing a correction](../../choosing-a-correction.md), "
        "[Results](../../results.md) and [all rows](../../../experiments/CORRECTIONS.md).\n\n"
    )
    target = f"evenkeel.corrections.{kind.__name__}"
    return text + documented(f".. autoclass:: {target}", "   :no-index:") + "\n"


def presets(name: str, example: Any, evidence: Any) -> str:
    """The forms of its authors beside our defaults, as settings."""
    if example is None or not example.options:
        return ""
    made = {name: example}
    for form, entry in FORMS.items():
        if form.startswith(f"{name}:"):
            try:
                made[form] = entry.make(evidence)
            except EvenkeelError:  # needs histograms; its docstring says so
                continue
    keys = list(dict.fromkeys(key for one in made.values() for key in one.options))
    head = "| setting | " + " | ".join(f"`{form}`" for form in made) + " |"
    rows = [
        f"| `{key}` | "
        + " | ".join(f"`{one.options.get(key, '')!r}`" for one in made.values())
        + " |"
        for key in keys
    ]
    rule = "|---" * (len(made) + 1) + "|"
    return "\n".join(["## Settings", "", head, rule, *rows]).replace("`''`", "") + "\n\n"


# ---- quantizers


def quantizers() -> dict[str, str]:
    """Name of a method -> page."""
    return {name: quantizer(name, kind) for name, kind in METHODS.items()}


def quantizer(name: str, kind: type[Any]) -> str:
    """What it is and how it is asked for."""
    fields = [f for f in inspect.signature(kind).parameters.values() if f.kind is not f.VAR_KEYWORD]
    rows = "\n".join(f"| `{f.name}` | `{f.default!r}` |" for f in fields)
    return (
        f"# {name}\n\n`evenkeel quantize ... --method {name}`, in Python "
        f"`evenkeel.quantize(pipe, {kind.__name__}())`. What was measured: "
        f"[Quantizing](../../quantizers.md).\n\n## Settings\n\n| setting | default |\n|---|---|\n{rows}\n\n"
        + documented(f".. autoclass:: evenkeel.quantizers.{kind.__name__}", "   :no-index:")
        + "\n"
    )


# ---- samplers


def samplers() -> str:
    """Which schedulers of diffusers are corrected, and why others are not; each is asked, here and now."""
    rows: dict[str, list[tuple[str, str]]] = {}
    for case in (*LINEAR, *NONLINEAR):
        scheduler = type(case.ready()).__name__
        try:
            law = law_of(case)
            memory = "of several outputs" if law.has_history else "of one output"
            noise = ", with noise of its own" if law.is_stochastic else ""
            found = f"corrected: steps {memory}{noise}"
        except EvenkeelError as error:
            found = f"refused: {str(error).splitlines()[0]}"
        rows.setdefault(scheduler, []).append((case.name, found))
    table = ["| scheduler | configuration | |", "|---|---|---|"]
    for scheduler in sorted(rows):
        together: dict[str, list[str]] = {}
        for case, found in rows[scheduler]:
            together.setdefault(found.replace("|", "\\|"), []).append(case)
        for found, cases in together.items():
            table.append(f"| {scheduler} | {', '.join(cases)} | {found} |")
    return SAMPLERS + "\n".join(table) + "\n"


# ---- errors


def errors_page() -> str:
    """Every class: why it is raised, and what to do."""
    kinds = [
        kind
        for kind in vars(errors).values()
        if inspect.isclass(kind) and issubclass(kind, EvenkeelError)
    ]
    parts = [
        "# Errors\n\nWhatever the library raises on purpose is an `EvenkeelError`, with a sentence that says "
        "what was expected, what was found, and what to do. On the command line that sentence is all that is "
        "printed (`--traceback` adds where), and the exit code is 1.\n"
    ]
    for kind in kinds:
        bases = [b for b in kind.__bases__ if b is not object]
        is_a = ", ".join(f"`{b.__name__}`" for b in bases)
        said = inspect.cleandoc(kind.__doc__ or "").replace("``", "`")
        parts.append(f"## {kind.__name__}\n\nIs also: {is_a}.\n\n{said}\n")
    return "\n".join(parts)


# ---- API


def public(module: Any) -> list[str]:
    """What a module is for: its ``__all__``, or the classes and functions of this library in it."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    names = [name for name in vars(module) if not name.startswith("_")]
    found = []
    for name in names:
        thing = getattr(module, name)
        mine = str(getattr(thing, "__module__", "")).startswith(module.__name__)
        if mine and (inspect.isclass(thing) or inspect.isfunction(thing)):
            found.append(name)
    return found


def api(name: str, said: str) -> str:
    """All public names of a module."""
    module = importlib.import_module(name)
    lines = []
    known = {getattr(evenkeel, each) for each in evenkeel.__all__} if name != "evenkeel" else set()
    for each in public(module):
        thing = getattr(module, each)
        if callable(thing) and thing in known:  # on the page of the package itself
            continue
        if inspect.isclass(thing):
            lines += [f".. autoclass:: {name}.{each}", "   :members:", ""]
        elif callable(thing):
            lines += [f".. autofunction:: {name}.{each}", ""]
    return f"# {name}\n\n{said[0].upper()}{said[1:]}.\n\n" + documented(*lines) + "\n"
