"""What every correction declares. Whoever applies, saves or compares one asks nothing else of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar

from torch import Tensor

from evenkeel.corrections.digest import Digested, digest
from evenkeel.corrections.head_table import HeadTable
from evenkeel.corrections.plan import STAGES, OutputEdit, SamplerPlan, plain_plan
from evenkeel.errors import CalibrationError, Incompatible
from evenkeel.sampling.step_law import StepLaw
from evenkeel.statistics.evidence import Evidence
from evenkeel.statistics.provenance import Provenance


@dataclass(frozen=True)
class Tables:
    """A correction as a file holds it.

    Attributes:
        described: everything that is not a tensor, JSON-safe.
        tensors: by name.

    """

    described: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Heads:
    """A change of the denoiser's output head that depends on the noise level.

    Attributes:
        layer: the head's name in the denoiser.
        table: what is added to it.

    """

    layer: str
    table: HeadTable


class Correction(Digested, ABC):
    """Fitted evidence plus a rule: ``plan(law)`` turns it into numbers for one sampling run.

    Subclasses declare ``name``, ``references``, ``stages``, ``made_for`` (``FromEvidence`` does) and
    ``plan``; the rest has a meaning already. Everything that decides what a correction does is an
    attribute of it, most simply the field of a frozen dataclass: ``digest`` tells two corrections
    apart by nothing else. ``evenkeel.testing.check_correction`` tests a new one.

    Example::

        @dataclass(frozen=True)
        class Gain(Correction):
            gain: float
            name = "gain"
            references = ("a paper, Eq. 1",)
            stages = ("output",)
            made_for = None

            def plan(self, law, *, allow_range=False):
                gain = torch.full((law.steps, 1), self.gain, dtype=torch.float64)
                return plain_plan(law, edit=OutputEdit.of(gain))

    """

    @property
    @abstractmethod
    def name(self) -> str:
        """As in tables and on the command line, for example ``q-drift``."""

    @property
    @abstractmethod
    def references(self) -> tuple[str, ...]:
        """Papers, with equation numbers."""

    @property
    @abstractmethod
    def stages(self) -> tuple[str, ...]:
        """Which of ``STAGES`` its plans may change; decides who carries them out."""

    @property
    @abstractmethod
    def made_for(self) -> Provenance | None:
        """What it was measured on, so that another model or scheduler is refused; None: on nothing."""

    @abstractmethod
    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        """Numbers for one run.

        Args:
            law: of the run.
            allow_range: leave steps at noise levels that were not calibrated alone.

        Raises:
            OutOfRange: a step's noise level was not calibrated and ``allow_range`` is False.
            UnsupportedSampler: the run cannot be corrected this way.

        """

    def plan_after(
        self, law: StepLaw, edit: OutputEdit, *, allow_range: bool = False
    ) -> SamplerPlan:
        """As ``plan``, where another correction has edited the outputs before.

        The same plan, unless the correction says what an edit does to the error that it was made for.
        """
        del edit
        return self.plan(law, allow_range=allow_range)

    @property
    def options(self) -> dict[str, Any]:
        """Its knobs by name, without what was measured: by default all fields but the evidence."""
        if not is_dataclass(self):
            return {}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "evidence"}

    @property
    def parts(self) -> tuple[Correction, ...]:
        """The corrections that it is composed of; what comes after its own rule is one of them."""
        return ()

    @property
    def heads(self) -> Heads | None:
        """How the stage ``head`` is changed; None where ``stages`` lacks it."""
        return None

    @property
    def beside(self) -> tuple[Any, ...]:
        """What stands beside which layer (``LayerAdapter``); nothing where ``stages`` lacks ``layers``."""
        return ()

    @property
    def report(self) -> str:
        """What a summary says beside the factors of the plan."""
        return ""

    def description(self) -> dict[str, Any]:
        """What it says of itself as plain, JSON-safe values."""
        made_for = None if self.made_for is None else asdict(self.made_for)
        return {"correction": text_of(self), "provenance": made_for}

    def tables(self) -> Tables | None:
        """What a file holds of it; None: it is made anew from a record's evidence."""
        return None

    @classmethod
    def from_tables(cls, tables: Tables, made_for: Provenance) -> Correction:
        """From what ``tables`` gave and what it was measured on.

        Raises:
            CalibrationError: this correction has no tables.
            ValueError: these are not its tables.

        """
        del tables, made_for
        raise CalibrationError(f"{cls.__name__} is made from a record's evidence, not from tables.")


@dataclass(frozen=True)
class FromEvidence(Correction):
    """A correction whose numbers follow from the evidence of a record.

    Attributes:
        evidence: from ``Record.evidence``.

    """

    evidence: Evidence

    @property
    def made_for(self) -> Provenance | None:
        """Where the evidence was measured."""
        return self.evidence.source


@dataclass(frozen=True)
class Identity(Correction):
    """The correction that changes nothing, bit for bit."""

    name: str = "identity"
    references: tuple[str, ...] = ()
    stages: ClassVar[tuple[str, ...]] = ()
    made_for: ClassVar[None] = None

    def plan(self, law: StepLaw, *, allow_range: bool = False) -> SamplerPlan:
        """Every step inactive."""
        del allow_range
        return plain_plan(law, ["identity"] * law.steps)


def stages_of(corrections: Iterable[Correction]) -> tuple[str, ...]:
    """Which of ``STAGES`` some of these change, in that order."""
    found = {stage for correction in corrections for stage in correction.stages}
    return tuple(s for s in STAGES if s in found)


def text_of(correction: Correction | None) -> str:
    """Name and knobs on one line, "" for no correction."""
    if correction is None:
        return ""
    refuse_foreign(correction)
    knobs = (f"{k}={v!r}" for k, v in sorted(correction.options.items()))
    return f"{correction.name}({', '.join(knobs)})"


def digest_of(correction: Correction | None) -> str:
    """Tells any two corrections apart, and from none."""
    if correction is None:
        return digest(None)
    refuse_foreign(correction)
    return correction.digest()


def refuse_foreign(correction: object) -> None:
    """Refuse what only looks like a correction: half of what one must declare would be guessed.

    Raises:
        Incompatible: not an object of a subclass of ``Correction``.

    """
    if isinstance(correction, Correction):
        return
    kind = type(correction).__name__
    found = f"the class {correction.__name__}" if isinstance(correction, type) else f"a {kind}"
    raise Incompatible(
        f"expected a correction, found {found}. A correction is an object of a subclass of "
        f"evenkeel.corrections.Correction, which declares what it acts on, what it was made for, and "
        f"what it holds; let the class inherit from it."
    )
