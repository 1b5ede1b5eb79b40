"""A case of an op, and the dtypes, modes and directions in which it runs.

An op of linfast.ops is found by its name there, its modes and directions by its parameters: a new one without a
case is reported by ``uncovered``.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from linfast import ops
from linfast.precision import PRECISIONS
from tests.machine_code.target import CAPABILITIES

__all__ = ["DTYPES", "Case", "Outputs", "Variant", "in_short_run", "uncovered", "variants"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Outputs = Sequence[Tensor | None]


@dataclass(frozen=True)
class Case:
    """An op at one size.

    Args:
        op: its name in linfast.ops.
        label: distinguishes it from the op's other cases.
        inputs: fresh random fp32 tensors, x first; all are differentiated.
        call: (*inputs, and ``inverse`` and ``precision`` where the op has them) -> outputs.
        smoke: whether it is in the short run.
        x_alone: weights and intermediate values stay fp32 beside a half-precision x; else all are cast.
        cancels: a gradient that is zero is a difference of terms that many times as large as the largest output.
        dtypes: those in which x can be.
        modes: those that run, where the op has modes.
    """

    op: str
    label: str
    inputs: Callable[[], list[Tensor]]
    call: Callable[..., Outputs]
    smoke: bool = False
    x_alone: bool = False
    cancels: float = 1.0
    dtypes: Sequence[str] = tuple(DTYPES)
    modes: Sequence[str] = PRECISIONS


@dataclass(frozen=True)
class Variant:
    """A case in one dtype, mode and direction; the last two are "" where the op has none.

    ``turn`` is the number of the case among those of its op that run, or None where there are no others.
    """

    case: Case
    dtype: str
    mode: str
    direction: str
    turn: int | None = None

    @property
    def options(self) -> dict[str, object]:
        options: dict[str, object] = {"precision": self.mode} if self.mode else {}
        return options | ({"inverse": self.direction == "inverse"} if self.direction else {})

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.case.op, self.case.label, self.dtype, self.mode, self.direction)))


def _parameters(op: str) -> frozenset[str]:
    return frozenset(inspect.signature(getattr(ops, op)).parameters)


def variants(cases: Sequence[Case], smoke: bool) -> Iterator[Variant]:
    """Every dtype, mode and direction of the cases; in the short run only "fast" where x is 16 bits wide."""
    run = [case for case in cases if case.smoke or not smoke]
    several, turns = Counter(case.op for case in run), Counter[str]()
    for case in run:
        has, turn = _parameters(case.op), turns[case.op] if several[case.op] > 1 else None
        turns[case.op] += 1
        for dtype in case.dtypes:
            modes = ("fast",) if smoke and dtype != "fp32" else case.modes
            for mode in modes if "precision" in has else ("",):
                for direction in ("forward", "inverse") if "inverse" in has else ("",):
                    yield Variant(case, dtype, mode, direction, turn)


def in_short_run(variant: Variant, target: str) -> bool:
    """Whether the short run contains this variant of a case that it contains.

    Of an op with directions one target runs the forward of a dtype and mode, and the other the inverse: so each
    dtype and each mode is run on each target and in each direction, and each target runs both directions. An op
    without directions is run whole on both targets if it has modes, whose products differ there, or a single case;
    else the targets take its cases in turn, in another order for each dtype.
    """
    if not variant.direction and (variant.mode or variant.turn is None):
        return True
    turns = (
        list(DTYPES).index(variant.dtype),
        PRECISIONS.index(variant.mode) if variant.mode else 0,
        variant.direction == "inverse" if variant.direction else variant.turn,
        list(CAPABILITIES).index(target),
    )
    return sum(turns) % 2 == 0


def uncovered(cases: Sequence[Case], smoke: bool) -> list[str]:
    """Functions of linfast.ops without a case."""
    covered = {variant.case.op for variant in variants(cases, smoke)}
    return [name for name in ops.__all__ if inspect.isfunction(getattr(ops, name)) and name not in covered]
