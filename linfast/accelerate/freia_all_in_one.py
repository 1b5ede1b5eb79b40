"""FrEIA: AllInOneBlock.

    y2 = x2 e^s + t,  (raw, t) = subnet(x1) / 10,  s = clamp tanh(raw)
    then, or in reverse first, the learned scale and offset and the permutation

The block multiplies by its permutation matrix; where that is a hard permutation, it is an index here: under
autocast, which rounds a product's operands, y keeps its dtype.
Of a GIN block, which takes the mean off s, the coupling is the library's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..scale_maps import ScaleMap
from .adapter import Adapter, Draw, Options, Plan, Stub, Unfit
from .couple import couple, described
from .freia import run_both_ways
from .identity import original_class
from .tail import Side, Split, Tail

__all__ = ["ADAPTER"]

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
    return Plan(described("affine coupling, tanh, permutation by index", [_side(block, ())]))


def _side(block: Any, c: Sequence[Tensor]) -> Side:
    def run(kept: Tensor) -> Tensor:
        params: Tensor = block.subnet(torch.cat([kept, *c], 1) if block.conditional else kept)
        params *= _FACTOR  # in place, as the library does
        return params

    tail = Tail(lambda raw: block.clamp * torch.tanh(raw), "raw_first", ScaleMap("tanh", block.clamp))
    nets = () if block.conditional else (block.subnet,)
    return Side(
        Split("halves", "second", block.splits[0], block.in_channels), tail, run, block, nets, factor=_FACTOR
    )


def _forward(block: Any, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> tuple[Any, Tensor]:
    if block.GIN:
        given: tuple[Any, Tensor] = original_class(block).forward(block, x, c, rev, jac)  # type: ignore[attr-defined]
        return given
    z = x[0]
    if rev:
        z, scaling = _permute(block, z, rev=True)
    elif block.reverse_pre_permute:
        z = _pre_permute(block, z)
    z, log_det = couple(z, _side(block, c), rev)
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
    return run_both_ways(block, draw, block.in_channels, block.condition_channels, block.input_rank)


ADAPTER = Adapter(
    library="FrEIA",
    where="FrEIA.modules.all_in_one_block",
    name="AllInOneBlock",
    methods={"forward": _forward, "_permute": _permute, "_pre_permute": _pre_permute},
    plan=_plan_all_in_one,
    probe=_probe_all_in_one,
    masks=lambda block: (block.w_perm, block.w_perm_inv),
    settings=("clamp", "GIN", "householder"),
    assumes=("_affine",),
    conditioners=lambda block: (block.subnet,),
    sides=lambda block, layout: () if block.GIN else (_side(block, ()),),
    vectors=lambda block, draw, features: run_both_ways(block, draw, features, 0, 0),
)
