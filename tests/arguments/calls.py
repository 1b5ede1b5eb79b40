"""The description of a valid call, and the small tensors and models that the calls use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import linfast as lf


@dataclass(frozen=True)
class Good:
    """A valid call.

    Args:
        make: returns (the callable, every argument by name), newly made at each call.
        dims: the names of a tensor's dimensions; one in lower case that is named once has any size; *: any more.
        follows: the argument that determines the dtype of the first result.
        allowed: argument -> labels of ``wrong`` that the docstring allows.
        symbol: whether its error names an operator's symbol instead of the argument.
    """

    make: Callable[[], tuple[Callable[..., Any], dict[str, Any]]]
    dims: dict[str, str] = field(default_factory=dict)
    follows: str | None = None
    allowed: dict[str, set[str]] = field(default_factory=dict)
    symbol: bool = False


def x(*shape: int) -> Tensor:
    return torch.linspace(-1.0, 1.5, torch.Size(shape).numel()).cos().reshape(shape)


def method(make: Callable[[], Any], of: str, dims: dict[str, str] | None = None, /, **arguments: Any) -> Good:
    return Good(lambda: (getattr(make(), of), dict(arguments)), dims or {}, next(iter(dims)) if dims else None)


def made(cls: Callable[..., Any], /, **arguments: Any) -> Good:
    return Good(lambda: (cls, dict(arguments)))


def flow(**options: Any) -> lf.Flow:
    return lf.coupling_flow(4, 1, (4,), **options)


def linearizer(A: lf.LatentOperator | None = None) -> lf.Linearizer:
    return lf.Linearizer(flow(), lf.Dense(4) if A is None else A)


def timed() -> lf.Linearizer:
    return linearizer(lf.TimeLowRank(4, 1, 1.0, 4, 4))
