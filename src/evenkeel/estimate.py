"""A measured number never travels without its uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value, its standard error and 95 % interval over ``n`` independent units (images, prompts).

    ``stderr``, ``low`` and ``high`` are NaN where the data cannot say (n < 2): 0 would be a lie.

    >>> Estimate(1.0, 0.1, 0.8, 1.2, 50).as_dict()["n"]
    50
    """

    value: float
    stderr: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int | None]:
        """For JSON, which knows neither infinity nor NaN: both become ``None``."""

        def finite(x: float) -> float | None:
            return x if math.isfinite(x) else None

        return {
            "value": finite(self.value),
            "stderr": finite(self.stderr),
            "low": finite(self.low),
            "high": finite(self.high),
            "n": self.n,
        }
