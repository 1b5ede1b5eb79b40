"""FrEIA: the coupling blocks GLOW, RNVP, NICE and one-sided.

y1 = x1 e^s + t with (s, t) of x2, then y2 = x2 e^s + t with (s, t) of y1;  s = clamp f_clamp(raw)
GLOW: one subnet a side gives [raw | t]; RNVP: one for raw and one for t; NICE: t alone, s = 0;
one-sided: y2 only, of x1
m((x,), c=[...], rev=) -> ((y,), log_det [B])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..scale_maps import ScaleMap
from .adapter import Adapter, Draw, Options, Plan, Stub, Unfit
from .couple import couple, couple_both, described
from .identity import original_class
from .tail import ADDITIVE, Params, Side, Split, Tail

__all__ = ["ADAPTERS", "run_both_ways"]

_ATAN = 0.636  # FrEIA's 2 / pi


def _scale_map(block: Any) -> ScaleMap | None:
    """The kernels' map for this clamp; f_clamp is recognised by its values, as it is often a lambda."""
    points = torch.linspace(-6, 6, 49, dtype=torch.float64)
    known = (
        (points.tanh(), ScaleMap("tanh", block.clamp)),
        (_ATAN * points.atan(), ScaleMap("arctan", block.clamp * _ATAN * math.pi / 2)),
    )
    try:
        values = block.f_clamp(points)
        return next((m for expected, m in known if torch.allclose(expected, values, 1e-13, 1e-15)), None)
    except Exception as error:
        raise Unfit(f"its f_clamp raised {type(error).__name__}: {error}") from error


def _plan(block: Any, options: Options) -> Plan:
    if not block.clamp > 0:
        raise Unfit(f"its clamp is {block.clamp}: not positive")
    scale_map = _scale_map(block)
    what = f"affine coupling, {scale_map.kind if scale_map else 'own f_clamp'}"
    return Plan(described(what, _sides(block, scale_map, ())), layout=scale_map)


def _plan_additive(block: Any, options: Options) -> Plan:
    return Plan(described("additive coupling", _sides(block, None, ())))


def _sides(block: Any, scale_map: ScaleMap | None, c: Sequence[Tensor]) -> list[Side]:
    """What moves the first channels, and the second; of the one-sided block the second alone."""

    def side(moves: str, names: tuple[str, ...]) -> Side:
        nets = tuple(getattr(block, name) for name in names)

        def run(kept: Tensor) -> Params:
            given = torch.cat([kept, *c], 1) if block.conditional else kept
            if len(nets) == 1:
                params: Tensor = nets[0](given)
                return params
            raw = nets[1](given)  # in the library's order, as it may draw
            return nets[0](given), raw

        split = Split("halves", moves, block.split_len1, block.channels)
        return Side(split, tail, run, block, () if block.conditional else nets)

    kind = _BLOCKS[original_class(block).__name__]
    tail = ADDITIVE
    if kind.layout != "shift":
        tail = Tail(lambda raw: block.clamp * block.f_clamp(raw), kind.layout, scale_map)
    return [side(moves, names) for moves, names in kind.sides]


def _forward(block: Any, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> tuple[Any, Any]:
    y, log_det = couple_both(x[0], _sides(block, block._linfast_plan.layout, c), rev)
    return (y,), log_det


def _forward_additive(block: Any, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> tuple[Any, Any]:
    return (couple_both(x[0], _sides(block, None, c), rev, log_det=False)[0],), 0.0


def _forward_one_sided(block: Any, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> tuple[Any, Tensor]:
    (side,) = _sides(block, block._linfast_plan.layout, c)
    y, log_det = couple(x[0], side, rev)
    return (y,), log_det


@dataclass(frozen=True)
class _Block:
    """A class: its forward; of each side that moves, which half that is and its subnets; their outputs' layout."""

    forward: Callable[..., Any]
    layout: str
    sides: tuple[tuple[str, tuple[str, ...]], ...]


_BLOCKS = {
    "GLOWCouplingBlock": _Block(_forward, "raw_first", (("first", ("subnet2",)), ("second", ("subnet1",)))),
    "RNVPCouplingBlock": _Block(
        _forward, "pair", (("first", ("subnet_t2", "subnet_s2")), ("second", ("subnet_t1", "subnet_s1")))
    ),
    "AffineCouplingOneSided": _Block(_forward_one_sided, "raw_first", (("second", ("subnet",)),)),
    "NICECouplingBlock": _Block(_forward_additive, "shift", (("first", ("F",)), ("second", ("G",)))),
}


def _adapter(name: str) -> Adapter:
    kind = _BLOCKS[name]
    double = 2 if kind.layout == "raw_first" else 1

    def probe(block: Any, draw: Draw) -> Sequence[Tensor]:
        for moves, subnets in kind.sides:
            kept, moved = Split("halves", moves, block.split_len1).sizes(block.channels)
            for subnet in subnets:
                block._modules[subnet] = Stub(kept + block.condition_length, double * moved, draw)
        return run_both_ways(block, draw, block.channels, block.condition_length, block.ndims - 1)

    return Adapter(
        library="FrEIA",
        where="FrEIA.modules.coupling_layers",
        name=name,
        methods={"forward": kind.forward},
        plan=_plan_additive if kind.layout == "shift" else _plan,
        probe=probe,
        settings=("clamp", "f_clamp"),
        assumes=() if len(kind.sides) == 1 else ("_coupling1", "_coupling2"),
        conditioners=lambda block: tuple(getattr(block, net) for _, nets in kind.sides for net in nets),
        sides=lambda block, layout: _sides(block, layout, ()),
        vectors=lambda block, draw, features: run_both_ways(block, draw, features, 0, 0),
    )


def run_both_ways(block: Any, draw: Draw, channels: int, extra: int, positions: int) -> list[Tensor]:
    shape = (2, 3, 2)[:positions]
    outputs: list[Tensor] = []
    for rev in (False, True):
        c = [draw(3, extra, *shape)] if extra else []
        (y,), log_det = block.forward((draw(3, channels, *shape),), c, rev=rev)
        outputs += [y, log_det] if isinstance(log_det, Tensor) else [y]
    return outputs


ADAPTERS = tuple(_adapter(name) for name in _BLOCKS)
