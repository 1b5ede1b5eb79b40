"""What a good call is, and the small tensors and models that the calls are of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import linfast as lf


@dataclass(frozen=True)
class Good:
    """A call that works.

    Args:
        make: (what is called, every argument by name), anew each time.
        dims: of a tensor argument the names of its dimensions; lower case and named once: of any size; *: any more.
        follows: the argument whose dtype the first result has.
        allowed: argument -> labels of ``wrong`` that the docstring lets through.
        symbol: whether its error need not name the argument: an operator's, which says its symbol.
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
