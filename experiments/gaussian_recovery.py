"""Share of the lost marginal that Q-Drift and exact drift bring back where their assumption holds.

Gaussian data (standard deviation 0.5), exact score, white error of variance 0.05 on the noise (on v for
flow matching), 20 steps, through the real schedulers; exact, no sampling. 0 is nothing, 1 is all, more
than 1 is too much. The same functions are asserted on in tests/test_gaussian_marginals.py.

    python experiments/gaussian_recovery.py > experiments/GAUSSIAN.md
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from test_gaussian_marginals import SAMPLERS, recovered

from evenkeel.corrections import ExactDrift, QDrift


def main() -> None:
    print("# Recovered share of the marginal, Gaussian data with white error\n")
    print("`python experiments/gaussian_recovery.py`: exact propagation, no sampling error.\n")
    print("| sampler, 20 steps | Q-Drift | exact drift |\n|---|---|---|")
    for name in SAMPLERS:
        print(f"| {name} | {recovered(name, QDrift):.2f} | {recovered(name, ExactDrift):.2f} |")
    along = recovered("flow", QDrift, along="epsilon")
    print(f"| flow, Q-Drift along the noise | {along:.2f} | |")


if __name__ == "__main__":
    main()
