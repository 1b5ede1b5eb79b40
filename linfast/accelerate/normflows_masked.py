"""normflows: MaskedAffineFlow, its RealNVP and, without s, its NICE layer.

    forward, latent to data   y = b z + (1 - b) (z e^s + t),  s and t two nets of b z, both full width
    z -> (y, log_det [B]);  a net's value that is not finite counts as NaN

What b zeroes and what 1 - b drops is not computed here: of an MLP the columns that meet zeros and the
rows that nobody looks at are left out. A kernel gives what e^s gives where s is infinite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..scale_maps import ScaleMap
from .adapter import Adapter, Draw, Options, Plan, Stub, Unfit
from .couple import couple, described
from .mlp import find_mlp
from .tail import ADDITIVE, Side, Split, Tail, split_of
from .whole import narrowed

__all__ = ["ADAPTER"]

_TAIL = Tail(lambda raw: raw, "pair", ScaleMap("exp"))


def _plan(flow: Any, options: Options) -> Plan:
    if flow.b.ndim != 2:
        raise Unfit(f"its mask is {list(flow.b.shape[1:])}: only vectors")
    if set(flow.b[0].tolist()) != {0.0, 1.0}:
        raise Unfit("its mask is not zeros and ones, of each at least one")
    if not isinstance(flow.t, nn.Module):
        raise Unfit("it has no translation")
    split = split_of(flow.b[0] == 1)
    what = "affine coupling, exp" if isinstance(flow.s, nn.Module) else "additive coupling"
    return Plan(described(f"{what}, mask {split.kind}", [_side(flow, split)]), layout=split)


def _couple(flow: Any, z: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """In the dtypes that the library's products with its mask have, of integers or halves too."""
    z = z.to(torch.promote_types(z.dtype, flow.b.dtype))
    y, log_det = couple(z, _side(flow, flow._linfast_plan.layout), inverse)
    return y, log_det.to(torch.promote_types(log_det.dtype, flow.b.dtype))


def _side(flow: Any, split: Split) -> Side:
    nets = (flow.t, flow.s) if isinstance(flow.s, nn.Module) else (flow.t,)

    def run(kept: Tensor) -> Any:
        given = tuple(_run(flow, net, kept, side) for net in nets[::-1])  # s first, as the library does
        return given[::-1] if len(given) == 2 else given[0]

    side = Side(split, _TAIL if len(nets) == 2 else ADDITIVE, run, flow, nets, full=True)
    return side


def _run(flow: Any, net: nn.Module, kept: Tensor, side: Side) -> Tensor:
    """What the net gives for the moved features."""
    mlp = find_mlp(net)
    if mlp is None:
        zeros = kept.new_zeros(kept.shape[0], flow.b.shape[1])
        split = side.split
        full = (
            split.put(zeros, kept, split.take(zeros)[1])
            if split.indices is None
            else zeros.index_copy(1, split.indices_on(kept.device)[0], kept)
        )
        out = side.split.take(net(full))[1]
    else:
        first, *rest = narrowed(mlp, side)
        out = F.linear(kept, *first)
        for part in mlp.parts[1:-1]:
            out = part(out)
        if rest:
            out = F.linear(out, *rest[-1])
    return torch.nan_to_num(out, torch.nan, torch.nan, torch.nan)


def _probe(flow: Any, draw: Draw) -> Sequence[Tensor]:
    features = flow.b.shape[1]
    for name in ("s", "t"):
        if name in flow._modules:
            flow._modules[name] = Stub(features, features, draw)
    return _both_ways(flow, draw, features)


def _both_ways(flow: Any, draw: Draw, features: int) -> Sequence[Tensor]:
    return (*flow.forward(draw(3, features)), *flow.inverse(draw(3, features)))


ADAPTER = Adapter(
    library="normflows",
    where="normflows.flows.affine.coupling",
    name="MaskedAffineFlow",
    methods={
        "forward": lambda flow, z: _couple(flow, z, inverse=False),
        "inverse": lambda flow, z: _couple(flow, z, inverse=True),
    },
    plan=_plan,
    probe=_probe,
    masks=lambda flow: (flow.b,),
    conditioners=lambda flow: tuple(flow._modules[name] for name in ("t", "s") if name in flow._modules),
    sides=lambda flow, split: (_side(flow, split),),
    vectors=_both_ways,
)
