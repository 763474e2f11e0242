"""Every entry of the catalogue of corrections, made from drawn evidence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import diffusers as d
import numpy as np
import torch

from evenkeel.corrections import (
    DCNC,
    DNS,
    TAC,
    Composite,
    Correction,
    HeadFit,
    Readout,
    RecoveryAdapters,
    StepbaQ,
)
from evenkeel.corrections.catalogue import ALL, EVIDENCE
from evenkeel.corrections.head_table import HeadTable
from evenkeel.low_rank.factors import LayerAdapter, rounded
from evenkeel.statistics.evidence import Evidence


def tac(evidence: Evidence) -> TAC:
    """K from the moments, B the mean error."""
    bias = evidence.pooled(per_channel=True).mean_d[..., None, None].float()
    return replace(TAC.open_loop(evidence), bias=bias)


def stepbaq(evidence: Evidence) -> StepbaQ:
    """The errors of the outputs stand for those of the states."""
    kept = d.DDIMScheduler(beta_schedule="linear").alphas_cumprod.double().numpy()
    return StepbaQ(
        evidence.alpha,
        evidence.sigma,
        evidence.pooled(per_channel=True).mean_d[..., None, None],
        evidence.by_step.dd[:, 0],
        np.sqrt(1 / kept - 1),
        source=evidence.source,
    )


def readout(evidence: Evidence) -> Readout:
    """A change of the tiny pipeline's head that grows with the error."""
    steps = len(evidence.alpha)
    size = evidence.by_step.dd[:, :1, None, None]
    weight = size * torch.linspace(-1, 1, 32 * 32).reshape(32, 32)
    active = size[:, :, 0, 0] > 0
    table = HeadTable.of(evidence.alpha, evidence.sigma, weight, weight[:, :, 0], active)
    fits = tuple(HeadFit(k, 0, 0.1, 0.5, 0.6, "") for k in range(steps))
    plain = replace(evidence, gram=None)
    assert evidence.source is not None
    return Readout(evidence.source, "proj_out_2", "per-step", table, fits, plain)


def adapters(evidence: Evidence) -> RecoveryAdapters:
    """Of rank 2 beside the tiny pipeline's head, as large as the error; none without one."""
    size = float(evidence.by_step.dd.mean()) ** 0.5
    rows = torch.linspace(-1, 1, 64).reshape(2, 32)
    layer = LayerAdapter("proj_out_2", rounded(size * rows, 4), rounded(rows.flip(0), 4))
    assert evidence.source is not None
    return RecoveryAdapters(evidence.source, "output", 4, (layer,) if size else ())


def dcnc(evidence: Evidence) -> DCNC:
    """With the plain variance: no histogram is drawn."""
    return DCNC(evidence, estimator="std")


MADE: dict[str, Callable[[Evidence], Correction]] = {
    **{name: entry.make for name, entry in ALL.items() if entry.source == EVIDENCE},
    "dcnc": dcnc,
    "dcnc+dns": lambda evidence: Composite((dcnc(evidence), DNS(evidence))),
    "tac": tac,
    "tac-ibc": lambda evidence: replace(tac(evidence), gain=None, reconstruction=None),
    "stepbaq": stepbaq,
    "readout": readout,
    "adapters": adapters,
    "readout+drift": lambda evidence: readout(evidence).with_drift(),
}
