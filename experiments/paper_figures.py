"""The figures of the papers, each on the cell of the zoo that stands for the paper's.

    python experiments/paper_figures.py q-drift                 # all that are not drawn yet
    python experiments/paper_figures.py q-drift fig-5 fig-6     # these
    python experiments/paper_figures.py q-drift fig-5 --again   # measured once more
    python experiments/paper_figures.py q-drift --draw          # drawn once more from what was measured
    python experiments/paper_figures.py q-drift --page          # figures.md from what is on disk

Quantized denoisers, images and outputs are kept in reproduced/PAPER, where ``evenkeel reproduce`` keeps
its own; a run that was stopped goes on there.
"""

from __future__ import annotations

import argparse

from figures import dcnc_dns, q_drift, tac
from figures.figure import Figures

PAPERS: dict[str, Figures] = {f.paper: f for f in (q_drift.FIGURES, dcnc_dns.FIGURES, tac.FIGURES)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("paper", choices=PAPERS)
    parser.add_argument("figures", nargs="*", help="all without")
    parser.add_argument("--again", action="store_true", help="measure, whatever is there")
    parser.add_argument("--draw", action="store_true", help="draw from what was measured")
    parser.add_argument("--page", action="store_true", help="write the page alone")
    options = parser.parse_args()
    whole = PAPERS[options.paper]
    chosen = [whole.named(name) for name in options.figures] or list(whole.all)
    for figure in [] if options.page else chosen:
        print(f"{whole.paper} {figure.name}", flush=True)
        if options.draw:
            whole.draw(figure)
        else:
            whole.make(figure, again=options.again)
        whole.write_page()
    whole.write_page()


if __name__ == "__main__":
    main()
