"""normflows: AffineCouplingBlock, and so GlowBlock, whose coupling is one.

    forward, latent to data   y = m e^s + t            exp
                              y = m / sigmoid(s+2) + t  sigmoid, a Glow block's
                              y = m sigmoid(s+2) + t    sigmoid_inv
    params of the kept half, t and s interleaved; z -> (z, log_det [B])

The block's three modules, split, coupling and merge, are one here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.affine_coupling import split_sizes
from ..scale_maps import ScaleMap
from .adapter import Adapter, Draw, Options, Plan, Stub, Unfit
from .couple import couple, described
from .identity import changed_method, defined_as
from .tail import ADDITIVE, Side, Split, Tail

__all__ = ["ADAPTER"]


def _sigmoid(raw: Tensor) -> Tensor:
    return torch.sigmoid(raw + 2)


_TAILS = {
    "exp": Tail(lambda s: s, "interleaved", ScaleMap("exp")),
    "sigmoid": Tail(_sigmoid, "interleaved", ScaleMap("sigmoid"), gives="reciprocal"),
    "sigmoid_inv": Tail(_sigmoid, "interleaved", ScaleMap("sigmoid"), gives="scale"),
}
_MOVES = {"channel": "second", "channel_inv": "first"}


def _plan(block: Any, options: Options) -> Plan:
    split, coupling, merge = block.flows
    if not (
        defined_as(split, "normflows.flows.reshape", "Split")
        and defined_as(coupling, "normflows.flows.affine.coupling", "AffineCoupling")
        and defined_as(merge, "normflows.flows.reshape", "Merge")
    ):
        raise Unfit("its flows are not split, affine coupling, merge")
    for module in block.flows:
        changed = changed_method(module, ("forward", "inverse"))
        if changed is not None:
            raise Unfit(f"the {changed} of its {type(module).__name__} was replaced: not the library's own")
    if split.mode not in _MOVES or merge.mode != split.mode:
        raise Unfit(f"split mode {split.mode!r}: only {', '.join(_MOVES)}")
    if coupling.scale and coupling.scale_map not in _TAILS:
        raise Unfit(f"scale map {coupling.scale_map!r}")
    what = f"affine coupling, {coupling.scale_map}" if coupling.scale else "additive coupling"
    return Plan(described(what, [_side(block)]))


def _couple(block: Any, z: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    y, log_det = couple(z, _side(block), inverse)
    return y, log_det.to(z.dtype)  # in which the library adds it up, whatever its parameters are


def _side(block: Any) -> Side:
    coupling = block.flows[1]
    return Side(
        Split("halves", _MOVES[block.flows[0].mode]),
        _TAILS[coupling.scale_map] if coupling.scale else ADDITIVE,
        coupling.param_map,
        block,
        (coupling.param_map,),
    )


def _probe(block: Any, draw: Draw) -> Sequence[Tensor]:
    outputs: list[Tensor] = []
    coupling = block.flows[1]
    for channels in (6, 5):
        kept, moved = split_sizes(channels) if block.flows[0].mode == "channel" else split_sizes(channels)[::-1]
        coupling._modules["param_map"] = Stub(kept, moved * (1 + bool(coupling.scale)), draw)
        for shape in ((3, channels), (2, channels, 4, 3)):
            outputs += [*block.forward(draw(*shape)), *block.inverse(draw(*shape))]
    return outputs


ADAPTER = Adapter(
    library="normflows",
    where="normflows.flows.affine.coupling",
    name="AffineCouplingBlock",
    methods={
        "forward": lambda block, z: _couple(block, z, inverse=False),
        "inverse": lambda block, z: _couple(block, z, inverse=True),
    },
    plan=_plan,
    probe=_probe,
    inner=lambda block: tuple(block.flows),
    conditioners=lambda block: (block.flows[1].param_map,),
    sides=lambda block, layout: (_side(block),),
    vectors=lambda block, draw, features: (*block.forward(draw(3, features)), *block.inverse(draw(3, features))),
)
