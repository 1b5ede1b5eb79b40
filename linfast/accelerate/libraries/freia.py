"""FrEIA: the coupling blocks GLOW, RNVP, NICE and one-sided; AllInOneBlock; SequenceINN.

    y1 = x1 e^s + t with (s, t) of x2, then y2 = x2 e^s + t with (s, t) of y1;  s = clamp f_clamp(raw)
    GLOW: one subnet a side gives [raw | t]; RNVP: one for raw and one for t; NICE: t alone, s = 0;
    one-sided: y2 only, of x1
    AllInOneBlock: y2 = x2 e^s + t,  (raw, t) = subnet(x1) / 10,  s = clamp tanh(raw)
        then, or in reverse first, the learned scale and offset and the permutation
    m((x,), c=[...], rev=) -> ((y,), log_det [B])

AllInOneBlock multiplies by its permutation matrix; where that is a hard permutation, it is an index here: under
autocast, which rounds a product's operands, y keeps its dtype. Of a GIN block, which takes the mean off s, the
coupling is the library's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...flows.undo import Outputs
from ...scale_maps import ScaleMap
from ..adapter import Adapter, Draw, Options, Plan, Stub, Unfit
from ..chain import (
    Context,
    Part,
    chain_adapter,
    is_known,
    part_of,
    parts_to_invert,
    per_sample,
    put_stubs,
    run_inverting,
)
from ..coupling import couple, couple_both, described
from ..coupling_side import ADDITIVE, Params, Side, Split, Tail
from ..identity import original_class

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
        return _both_ways(block, draw, block.channels, block.condition_length, block.ndims - 1)

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
        vectors=lambda block, draw, features: _both_ways(block, draw, features, 0, 0),
    )


def _both_ways(block: Any, draw: Draw, channels: int, extra: int, positions: int) -> list[Tensor]:
    shape = (2, 3, 2)[:positions]
    outputs: list[Tensor] = []
    for rev in (False, True):
        c = [draw(3, extra, *shape)] if extra else []
        (y,), log_det = block.forward((draw(3, channels, *shape),), c, rev=rev)
        outputs += [y, log_det] if isinstance(log_det, Tensor) else [y]
    return outputs


# AllInOneBlock

_FACTOR = 0.1


def _plan_all_in_one(block: Any, options: Options) -> Plan:
    if block.householder:
        raise Unfit("its permutation is learned: a full matrix")
    matrix = block.w_perm.flatten(1)
    ones = (matrix == 1).sum(0), (matrix == 1).sum(1), (matrix != 0).sum(1)
    if not all(bool((count == 1).all()) for count in ones) or not torch.equal(
        block.w_perm_inv.flatten(1), matrix.T
    ):
        raise Unfit("its permutation is soft: a full matrix")
    if not block.clamp > 0:
        raise Unfit(f"its clamp is {block.clamp}: not positive")
    if block.GIN:
        return Plan("permutation by index")
    return Plan(described("affine coupling, tanh, permutation by index", [_side_all_in_one(block, ())]))


def _side_all_in_one(block: Any, c: Sequence[Tensor]) -> Side:
    def run(kept: Tensor) -> Tensor:
        params: Tensor = block.subnet(torch.cat([kept, *c], 1) if block.conditional else kept)
        params *= _FACTOR  # in place, as the library does
        return params

    tail = Tail(lambda raw: block.clamp * torch.tanh(raw), "raw_first", ScaleMap("tanh", block.clamp))
    nets = () if block.conditional else (block.subnet,)
    return Side(
        Split("halves", "second", block.splits[0], block.in_channels), tail, run, block, nets, factor=_FACTOR
    )


def _forward_all_in_one(block: Any, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> tuple[Any, Tensor]:
    if block.GIN:
        given: tuple[Any, Tensor] = original_class(block).forward(block, x, c, rev, jac)  # type: ignore[attr-defined]
        return given
    z = x[0]
    if rev:
        z, scaling = _permute(block, z, rev=True)
    elif block.reverse_pre_permute:
        z = _pre_permute(block, z)
    z, log_det = couple(z, _side_all_in_one(block, c), rev)
    if not rev:
        z, scaling = _permute(block, z)
    elif block.reverse_pre_permute:
        z = _pre_permute(block, z, rev=True)
    positions = z.shape[2:].numel()
    return (z,), log_det + (-positions if rev else positions) * scaling


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
    return _both_ways(block, draw, block.in_channels, block.condition_channels, block.input_rank)


_ALL_IN_ONE = Adapter(
    library="FrEIA",
    where="FrEIA.modules.all_in_one_block",
    name="AllInOneBlock",
    methods={"forward": _forward_all_in_one, "_permute": _permute, "_pre_permute": _pre_permute},
    plan=_plan_all_in_one,
    probe=_probe_all_in_one,
    masks=lambda block: (block.w_perm, block.w_perm_inv),
    settings=("clamp", "GIN", "householder"),
    assumes=("_affine",),
    conditioners=lambda block: (block.subnet,),
    sides=lambda block, layout: () if block.GIN else (_side_all_in_one(block, ()),),
    vectors=lambda block, draw, features: _both_ways(block, draw, features, 0, 0),
)


# SequenceINN

_INVERTIBLE = (
    "ActNorm",
    "Fixed1x1Conv",
    "FixedLinearTransform",
    "Flatten",
    "HaarDownsampling",
    "HaarUpsampling",
    "IRevNetDownsampling",
    "IRevNetUpsampling",
    "PermuteRandom",
    "Reshape",
)
_KEEP_VOLUME = ("NICECouplingBlock", "PermuteRandom")  # whose log-determinant is the number 0


def _parts(chain: Any) -> list[Part]:
    return [
        part_of(
            f"module_list[{i}]",
            block,
            is_known(block, "FrEIA", _INVERTIBLE, ("forward",)),
            partial(_run_part, chain.conditions[i]),
        )
        for i, block in enumerate(chain.module_list)
    ]


def _run_part(condition: int | None, block: Any, x: Tensor, context: Context, inverse: bool) -> Outputs:
    named = {} if condition is None else {"c": [context["c"][condition]]}
    (y,), log_det = block((x,), rev=inverse, **named)
    return y, per_sample(log_det, x)


def _sequence(chain: Any, x_or_z: Any, c: Any = None, rev: bool = False, jac: bool = True) -> tuple[Any, Any]:
    x = x_or_z[0] if isinstance(x_or_z, (list, tuple)) else x_or_z
    parts = parts_to_invert(chain, x, _parts)
    if parts is None:
        return chain._linfast_original.forward(chain, x_or_z, c, rev, jac)
    y, log_det = run_inverting(chain, parts, x, {"c": c if c is None else list(c)}, rev)
    keeps_volume = all(is_known(block, "FrEIA", _KEEP_VOLUME, ("forward",)) for block in chain.module_list)
    return (y,) if chain.force_tuple_output else y, 0.0 if keeps_volume else log_det


def _probe_sequence(chain: Any, draw: Draw) -> Sequence[Tensor]:
    parts = _parts(chain)
    put_stubs(parts, draw)
    used = {where: block.dims_c[0] for block, where in zip(chain.module_list, chain.conditions, strict=True)
            if where is not None}  # fmt: skip
    outputs: list[Tensor] = []
    for rev, shape in ((False, chain.shapes[0]), (True, chain.shapes[-1])):
        c = [draw(2, *used.get(i, (1,))) for i in range(max(used, default=-1) + 1)]
        y, log_det = chain.forward(draw(2, *shape), c, rev=rev)
        outputs += [*(y if isinstance(y, tuple) else (y,)), torch.as_tensor(log_det)]
    return outputs


_SEQUENCE = chain_adapter(
    "FrEIA",
    "FrEIA.framework.sequence_inn",
    "SequenceINN",
    _parts,
    lambda chain: ((str(i), block) for i, block in enumerate(chain.module_list)),
    methods={"forward": _sequence},
    probe=_probe_sequence,
    hollow=lambda chain: [net for part in _parts(chain) for net in part.conditioners],
)

ADAPTERS = (*(_adapter(name) for name in _BLOCKS), _ALL_IN_ONE, _SEQUENCE)
