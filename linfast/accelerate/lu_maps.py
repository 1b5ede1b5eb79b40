"""The LU maps of a chain, y = L U x + b, together: their factors are taken from all entries in one pass.

    U_ii = softplus(u_i) + eps      L_ii = 1      log|det| = sum_i log U_ii

The library makes each factor by four indexed writes, whose indices the host sends at every call. Here the entries
of all maps are one vector and the factors one selection from it. A permutation beside a map permutes L's rows or
U's columns, which is another selection.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import cat, uploaded
from .adapter import Unfit
from .spline_curves import Other


@dataclass(eq=False)
class LUMap:
    """An LU map, whose output column i is its feature ``rows[i]``, of input columns of its features ``columns``."""

    module: Any
    rows: list[int]
    columns: list[int]


@dataclass(frozen=True, eq=False)
class LUMaps:
    """All LU maps of a chain; a call gives their weights [D, D] and biases, or their inverses', and log|det|.

    Raises Other where a tensor is not of the dtype of x: the library's own code then runs, or raises its error.
    """

    steps: list[LUMap]
    features: int
    _on_devices: dict[tuple[torch.device, bool], tuple[Tensor, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        modules = [step.module for step in self.steps]
        kinds = {(m.eps, m.features, m.bias.dtype, m.bias.device) for m in modules}
        if len(kinds) > 1 or any(module.features != self.features for module in modules):
            raise Unfit("its LU maps differ in their size or options")

    def __call__(self, x: Tensor, inverse: bool) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
        if not self.steps:
            return [], None
        n, d = len(self.steps), self.features
        modules = [step.module for step in self.steps]
        raw = cat([module.unconstrained_upper_diag for module in modules])
        diagonal = F.softplus(raw) + modules[0].eps
        entries = [entry for module in modules for entry in (module.lower_entries, module.upper_entries)]
        shifts = [module.bias for module in modules]
        if any(tensor.dtype != x.dtype for tensor in (raw, *entries, *shifts)):
            raise Other
        factors, of_biases, of_inverse = self._on(x.device, inverse)
        source = cat([raw.new_zeros(1), raw.new_ones(1), *entries, diagonal])
        lower, upper = source.index_select(0, factors).view(2, n, d, d).unbind()
        biases = cat(shifts).index_select(0, of_biases).view(n, d)
        log_det = diagonal.log().sum()
        if not inverse:
            return [*zip(torch.bmm(lower, upper).unbind(), biases.unbind(), strict=True)], log_det
        eye = torch.eye(d, dtype=x.dtype, device=x.device).expand(n, d, d)
        undone = torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True)
        undone = torch.linalg.solve_triangular(upper, undone, upper=True)
        weights = undone.flatten().index_select(0, of_inverse).view(n, d, d)
        back = torch.bmm(weights, -biases[..., None]).squeeze(-1)
        return [*zip(weights.unbind(), back.unbind(), strict=True)], -log_det

    def _on(self, device: torch.device, inverse: bool) -> tuple[Tensor, ...]:
        """The tables on the device: copied once, because a copy at every call would wait for it."""
        if (device, inverse) not in self._on_devices:
            with torch.inference_mode(False), torch.device("cpu"):  # whatever the default device is
                tables = self._built(inverse)
                self._on_devices[device, inverse] = tuple(uploaded(table.flatten(), device) for table in tables)
        return self._on_devices[device, inverse]

    def _built(self, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Where the source of ``__call__`` has L and U [2, n, D, D]; where the biases and the inverses are."""
        n, d = len(self.steps), self.features
        below, above = torch.tril_indices(d, d, -1), torch.triu_indices(d, d, 1)
        size, at = below.shape[1], torch.arange(d)
        factors, inverses = torch.zeros(2, n, d, d, dtype=torch.long), torch.empty(n, d, d, dtype=torch.long)
        biases = torch.empty(n, d, dtype=torch.long)
        for i, step in enumerate(self.steps):
            first, (lower, upper) = 2 + 2 * size * i, factors[:, i]
            lower[at, at] = 1
            lower[below[0], below[1]] = torch.arange(first, first + size)
            upper[above[0], above[1]] = torch.arange(first + size, first + 2 * size)
            upper[at, at] = 2 + 2 * size * n + d * i + at
            rows, columns = torch.tensor(step.rows), torch.tensor(step.columns)
            if not inverse:
                factors[0, i], factors[1, i] = lower[rows], upper[:, columns]
            biases[i] = d * i + rows
            inverses[i] = d * d * i + d * columns[:, None] + rows
        return factors, biases, inverses
