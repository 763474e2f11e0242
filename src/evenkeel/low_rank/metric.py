"""The error of the final sample that one layer's wrong weight makes, as a quadratic form."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from evenkeel.errors import CalibrationError
from evenkeel.low_rank.moment import Moment, times

_EXTRA, _PASSES = 16, 3  # of the subspace iteration


@dataclass(frozen=True)
class Components:
    """A map of low rank in order of what each part is worth: ``sum_i up_i down_i^T``.

    Attributes:
        down: (r, F), a row per component.
        up: (r, O), a row per component. Both of a component have the same norm.
        gain: (r,) by how much the quadratic form falls with this component, decreasing.
        error: of the zero map.

    """

    down: Tensor
    up: Tensor
    gain: Tensor
    error: float

    def __len__(self) -> int:
        return len(self.gain)

    def left(self) -> Tensor:
        """(r + 1,) the form's value with the first 0, 1, ..., r components."""
        left = self.error - torch.cat([self.gain.new_zeros(1), self.gain.cumsum(0)])
        return left.clamp_min(0)


@dataclass(frozen=True)
class OutputMetric:
    """``|E|^2 = tr(G E S E^T)``: what a wrong weight E (O, F) does to the denoiser's output.

    With x what enters the layer and g the gradient of a random probe of the output with respect to what
    leaves it, the output's squared error is, to second order and with x and g independent (K-FAC, Martens
    & Grosse 2015, arXiv:1503.05671), ``E[(g^T E x)^2] = tr(G E S E^T)``, S = E[x x^T], G = E[g g^T]. In
    this unit layers can be compared. Without G the layer's own output error is meant, tr(E S E^T): the
    metric of QERA (arXiv:2410.06040) and EoRA (arXiv:2410.21271).

    Args:
        inputs: S, (F, F) symmetric, positive definite (see ``second_moment``).
        outputs: G, (O, O), likewise; None is the identity.

    Raises:
        CalibrationError: not positive definite.

    >>> metric = OutputMetric(torch.diag(torch.tensor([4.0, 1.0])), None)
    >>> change = torch.tensor([[1.0, 1.0]])
    >>> metric.error(change), metric.components(change, 1).error
    (5.0, 5.0)

    """

    inputs: Moment
    outputs: Moment | None

    @cached_property
    def roots(self) -> tuple[Tensor, Tensor | None] | None:
        """Cholesky factors L of S and C of G; None where one of them is no matrix."""
        if not isinstance(self.inputs, Tensor):
            return None
        if self.outputs is None:
            return _root(self.inputs), None
        if not isinstance(self.outputs, Tensor):
            return None
        return _root(self.inputs), _root(self.outputs)

    def working(self, change: Tensor) -> Tensor:
        """The same values as this metric computes with."""
        return change.to(self.inputs if isinstance(self.inputs, Tensor) else self.inputs.diagonal)

    def error(self, change: Tensor) -> float:
        """The form's value for a change of the weight, (O, F)."""
        change = self.working(change)
        return float((self._felt(change) * times(self.inputs, change.T).T).sum())

    def gained(self, change: Tensor, down: Tensor, up: Tensor) -> float:
        """By how much the form falls from ``change`` (O, F) to ``change - up^T down``.

        ``2 tr(G up^T down S change^T) - tr(G up^T down S down^T up)``: no product as large as the change's
        own error takes. Negative where the map does harm.
        """
        change, down, up = map(self.working, (change, down, up))
        weighted, felt = times(self.inputs, down.T), self._felt(up.T)
        return float((felt * (2 * change @ weighted - up.T @ (down @ weighted))).sum())

    def components(self, change: Tensor, limit: int, error: float | None = None) -> Components:
        """The best map of every rank up to ``limit`` towards ``change`` (O, F), in this metric.

        With ``C^T D L = U diag(s) V^T`` the best map of rank r is ``C^-T U_r diag(s_r) V_r^T L^-1``
        (Eckart and Young), and component i is worth s_i^2.

        Args:
            change: D, what the map should be.
            limit: at most so many components.
            error: of ``change``, where it is known.

        """
        change = self.working(change)
        limit = min(limit, *change.shape)
        total = self.error(change) if error is None else error
        if self.roots is None:
            up, down, gain = self._iterated(change, limit)
        else:
            inputs, outputs = self.roots
            white = change @ inputs
            u, s, v = _largest(white if outputs is None else outputs.T @ white, limit)
            gain, root = s.square(), s.sqrt()
            up = u * root
            if outputs is not None:
                up = torch.linalg.solve_triangular(outputs.T, up, upper=True)
            down = torch.linalg.solve_triangular(inputs, (v * root).T, upper=False, left=False)
        balance = (up.norm(dim=0) / down.norm(dim=1).clamp_min(1e-30)).clamp_min(1e-30).sqrt()
        return Components(down * balance[:, None], (up / balance).T, gain, total)

    def best_up(self, change: Tensor, down: Tensor) -> Tensor:
        """(r, O): the up that belongs to a given down (r, F); the metric of the outputs cancels."""
        weighted = times(self.inputs, down.T)
        return _solve(down @ weighted, (change @ weighted).T)

    def best_down(self, change: Tensor, up: Tensor) -> Tensor:
        """(r, F): the down that belongs to a given up (r, O); the metric of the inputs cancels."""
        weighted = self._felt(up.T).T
        return _solve(weighted @ up.T, weighted @ change)

    def _felt(self, change: Tensor) -> Tensor:
        """G times columns (O, n)."""
        return change if self.outputs is None else times(self.outputs, change)

    def _iterated(self, change: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
        """Up (O, r), down (r, F) and gains by products with S and G alone.

        The columns of up are the eigenvectors of ``D S D^T G`` that are orthonormal in G, found by
        subspace iteration; down is ``up^T G D``.
        """

        def orthonormal(basis: Tensor) -> Tensor:
            basis = torch.linalg.qr(basis)[0]
            root = torch.linalg.cholesky(basis.T @ self._felt(basis))
            found: Tensor = torch.linalg.solve_triangular(root, basis.T, upper=False).T
            return found

        def towards(basis: Tensor) -> Tensor:
            return change.T @ self._felt(basis)

        generator = torch.Generator().manual_seed(0)
        size = min(limit + _EXTRA, *change.shape)
        basis = orthonormal(torch.randn(len(change), size, generator=generator).to(change))
        for _ in range(_PASSES):
            basis = orthonormal(change @ times(self.inputs, towards(basis)))
        seen = towards(basis)
        gain, turn = torch.linalg.eigh(seen.T @ times(self.inputs, seen))
        up = basis @ turn.flip(1)[:, :limit]
        return up, towards(up).T, gain.flip(0)[:limit].clamp_min(0)


def _root(moment: Tensor) -> Tensor:
    root, info = torch.linalg.cholesky_ex(moment)
    if int(info):
        raise CalibrationError(
            "a second moment is not positive definite: there are fewer rows than features, or rows that "
            "are all zero. Give more prompts, or a larger ridge."
        )
    found: Tensor = root
    return found


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    limits = torch.finfo(gram.dtype)
    floor = 10 * limits.eps * gram.diagonal().mean().clamp_min(limits.tiny)
    gram = gram + floor * torch.eye(len(gram)).to(gram)
    found: Tensor = torch.linalg.solve(gram, right)
    return found


def _largest(matrix: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest singular values with their vectors, as columns; U (O, k), s (k,), V (F, k)."""
    if 4 * (k + _EXTRA) >= min(matrix.shape):
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :k], s[:k], vt[:k].T
    # Subspace iteration (Halko, Martinsson & Tropp 2011, algorithm 4.4): a whole decomposition of a
    # layer of thousands takes minutes.
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], k + _EXTRA, generator=generator)
    basis = torch.linalg.qr(matrix @ start.to(matrix))[0]
    for _ in range(_PASSES):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
    u, s, vt = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ u)[:, :k], s[:k], vt[:k].T
