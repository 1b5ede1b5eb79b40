"""No grid exceeds the limits of a GPU: 2^31 - 1 programs on the first axis, 65,535 on the others."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from linfast.kernels.spline_spec import Spline
from torch import Tensor


class _Kernel:
    """Stands in for a kernel: records the grid, and runs nothing."""

    def __init__(self, grids: list[tuple[int, ...]]) -> None:
        self._grids = grids

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self._grids.append(grid)
        return lambda *_, **__: None


def _wide(*shape: int) -> Tensor:
    """A tensor of this shape that holds one number."""
    return torch.zeros(()).expand(shape)


def _depthwise_conv() -> tuple[Any, ...]:
    x = torch.empty(1, 32, 1500, 1500, memory_format=torch.channels_last)  # never touched, so never in memory
    return x, torch.zeros(32, 3, 3), x, False, [True, True]


def _low_rank() -> tuple[Any, ...]:
    n, rank = 2_200_000, 33
    return (
        _wide(1, n),
        _wide(1, n, rank),
        _wide(1, n, rank),
        torch.zeros(1, rank),
        _wide(1, n),
        None,
        1.0,
        [True] * 3,
    )


def _affine_coupling() -> tuple[Any, ...]:
    n = 68_000_000
    return _wide(1, 2, n), _wide(1, 2, n), _wide(1, 2, n), None, 2, 0.5, 0.0, False, False, False, False, False


def _group_norm_silu() -> tuple[Any, ...]:
    x, mean = _wide(1, 70_000, 2), torch.zeros(1, 70_000)
    return x, None, None, None, None, mean, mean, x, None, None, 70_000, 1e-5, True, [True] + [False] * 4


def _rq_spline() -> tuple[Any, ...]:
    x, options = _wide(9_000_000, 1), (*Spline(2), False, True)
    return x, torch.zeros(1, 1, 5), x, _wide(9_000_000), *options, [True, True]


def _norm_activate() -> tuple[Any, ...]:
    x, none = _wide(2_000_000, 2), torch.zeros(0)
    return none, x, *[None] * 6, none, none, None, x, None, None, 0, 1e-5, 0, False, [True] + [False] * 7


# op: (arguments of the backward's launcher, and which of them the forward's launcher takes)
_CALLS: dict[str, tuple[Callable[[], tuple[Any, ...]], list[int]]] = {
    "depthwise_conv": (_depthwise_conv, [0, 1, 3]),
    "low_rank": (_low_rank, [0, 1, 2, 6]),
    "affine_coupling": (_affine_coupling, [0, 1, *range(4, 12)]),
    "group_norm_silu": (_group_norm_silu, [*range(5), 10, 11, 12]),
    "rq_spline": (_rq_spline, [0, 1, *range(4, 15)]),
    "norm_activate": (_norm_activate, [*range(1, 9), *range(14, 18)]),
}


@pytest.mark.parametrize("op", _CALLS)
def test_many_tiles_fit_the_grid(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, grids = importlib.import_module(f"linfast.kernels.{op}"), []  # type: ignore[var-annotated]
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        monkeypatch.setattr(module, name, _Kernel(grids))
    make, forward = _CALLS[op]
    arguments = make()
    getattr(module, f"launch_{op}")(*(arguments[i] for i in forward))
    getattr(module, f"launch_{op}_backward")(*arguments)
    assert len(grids) >= 2
    assert all(grid[0] < 2**31 and max(grid[1:], default=1) <= 65_535 for grid in grids), grids
    assert max(grid[0] for grid in grids) > 65_535  # sizes that exceed the limit of a second axis
