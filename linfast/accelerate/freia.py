"""FrEIA: the coupling blocks GLOW, RNVP and one-sided, and AllInOneBlock's permutations.

    y1 = x1 e^s + t with (s, t) of x2, then y2 = x2 e^s + t with (s, t) of y1;  s = clamp f_clamp(raw)
    GLOW: one subnet a side gives [raw | t]; RNVP: one for raw and one for t; one-sided: y2 only, of x1
    m((x,), c=[...], rev=) -> ((y,), log_det [B])

AllInOneBlock multiplies by its permutation matrix; where that is a hard permutation, it is an index here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..scale_maps import ScaleMap
from .adapter import Adapter, Draw, Options, Plan, Stub, Unfit
from .tail import Params, Split, Tail, couple, couple_both

__all__ = ["ADAPTERS"]

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
    return Plan(f"affine coupling, {scale_map.kind if scale_map else 'own f_clamp'}", layout=scale_map)


def _tail(block: Any, layout: str) -> Tail:
    return Tail(lambda raw: block.clamp * block.f_clamp(raw), layout, block._linfast_plan.layout)


def _forward_glow(block: Any, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> tuple[Any, Any]:
    def given(subnet: nn.Module) -> Callable[[Tensor], Params]:
        return lambda kept: subnet(_with_condition(block, kept, c))

    params_of = given(block.subnet2), given(block.subnet1)
    y, log_det = couple_both(x[0], block.split_len1, params_of, _tail(block, "raw_first"), rev)
    return (y,), log_det


def _forward_rnvp(block: Any, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> tuple[Any, Any]:
    def given(raw: nn.Module, shift: nn.Module) -> Callable[[Tensor], Params]:
        def params(kept: Tensor) -> Params:
            condition = _with_condition(block, kept, c)
            r = raw(condition)
            return shift(condition), r

        return params

    params_of = given(block.subnet_s2, block.subnet_t2), given(block.subnet_s1, block.subnet_t1)
    y, log_det = couple_both(x[0], block.split_len1, params_of, _tail(block, "pair"), rev)
    return (y,), log_det


def _forward_one_sided(block: Any, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> tuple[Any, Tensor]:
    split = Split("halves", "second", block.split_len1)

    def params_of(kept: Tensor) -> Params:
        return block.subnet(_with_condition(block, kept, c))

    y, log_det = couple(x[0], params_of, split, _tail(block, "raw_first"), rev)
    return (y,), log_det


def _with_condition(block: Any, kept: Tensor, c: Sequence[Tensor]) -> Tensor:
    return torch.cat([kept, *c], 1) if block.conditional else kept


_SUBNETS = {
    "GLOWCouplingBlock": (_forward_glow, ("subnet1", "subnet2")),
    "RNVPCouplingBlock": (_forward_rnvp, ("subnet_s1", "subnet_t1", "subnet_s2", "subnet_t2")),
    "AffineCouplingOneSided": (_forward_one_sided, ("subnet",)),
}


def _adapter(name: str) -> Adapter:
    forward, subnets = _SUBNETS[name]
    double = 1 if name.startswith("RNVP") else 2

    def probe(block: Any, draw: Draw) -> Sequence[Tensor]:
        first, second, extra = block.split_len1, block.split_len2, block.condition_length
        for subnet in subnets:
            kept, moved = (second, first) if subnet.endswith("2") else (first, second)
            block._modules[subnet] = Stub(kept + extra, double * moved, draw)
        return _run_both_ways(block, draw, block.channels, extra, block.ndims - 1)

    return Adapter(
        library="FrEIA",
        where="FrEIA.modules.coupling_layers",
        name=name,
        methods={"forward": forward},
        plan=_plan,
        probe=probe,
        assumes=() if name == "AffineCouplingOneSided" else ("_coupling1", "_coupling2"),
        conditioners=lambda block: tuple(getattr(block, subnet) for subnet in subnets),
    )


def _run_both_ways(block: Any, draw: Draw, channels: int, extra: int, positions: int) -> list[Tensor]:
    shape = (2, 3, 2)[:positions]
    outputs: list[Tensor] = []
    for rev in (False, True):
        c = [draw(3, extra, *shape)] if extra else []
        (y,), log_det = block.forward((draw(3, channels, *shape),), c, rev=rev)
        outputs += [y, log_det]
    return outputs


def _plan_all_in_one(block: Any, options: Options) -> Plan:
    if block.householder:
        raise Unfit("its permutation is learned: a full matrix")
    matrix = block.w_perm.flatten(1)
    ones = (matrix == 1).sum(0), (matrix == 1).sum(1), (matrix != 0).sum(1)
    if not all(bool((count == 1).all()) for count in ones) or not torch.equal(
        block.w_perm_inv.flatten(1), matrix.T
    ):
        raise Unfit("its permutation is soft: a full matrix")
    return Plan("permutation by index")


def _permute(block: Any, x: Tensor, rev: bool = False) -> tuple[Tensor, Tensor | float]:
    scale: Any = 1.0
    log_det: Any = 0.0
    if not block.GIN:
        scale = block.global_scale_activation(block.global_scale)
        log_det = scale.log().sum()
    if rev:
        return (_pre_permute(block, x) - block.global_offset) / scale, log_det
    moved = x + block.global_offset if block.GIN else torch.addcmul(block.global_offset, x, scale)
    return _pre_permute(block, moved, rev=True), log_det


def _pre_permute(block: Any, x: Tensor, rev: bool = False) -> Tensor:
    """Channel i of the result is channel p(i) of x, w[i, p(i)] = 1 in the matrix that is applied."""
    matrix = block.w_perm if rev else block.w_perm_inv
    return x.index_select(1, matrix.flatten(1).argmax(1))


def _probe_all_in_one(block: Any, draw: Draw) -> Sequence[Tensor]:
    first, second = block.splits
    block._modules["subnet"] = Stub(first + block.condition_channels, 2 * second, draw)
    return _run_both_ways(block, draw, block.in_channels, block.condition_channels, block.input_rank)


ADAPTERS = (
    *(_adapter(name) for name in _SUBNETS),
    Adapter(
        library="FrEIA",
        where="FrEIA.modules.all_in_one_block",
        name="AllInOneBlock",
        methods={"_permute": _permute, "_pre_permute": _pre_permute},
        plan=_plan_all_in_one,
        probe=_probe_all_in_one,
        conditioners=lambda block: (block.subnet,),
    ),
)
