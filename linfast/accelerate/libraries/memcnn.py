"""memcnn: AffineCoupling and AdditiveCoupling, alone or inside InvertibleModuleWrapper.

    y1 = s x1 + t with (s, t) = Fm(x2), then y2 = s x2 + t with (s, t) = Gm(y1);  x -> y
    AffineAdapterSigmoid: s = sigmoid(raw + 2), t and raw interleaved; AffineAdapterNaive: s = e^t

The wrapper, which does not store its input, is not swapped: it runs the swapped couplings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...scale_maps import ScaleMap
from ..adapter import Adapter, Unfit
from ..coupling import coupling_adapter, two_methods
from ..identity import changed_method, defined_as
from ..sides import ADDITIVE, Params, Side, Split, Tail

_WHERE = "memcnn.models.affine"
_TAILS = {
    "AffineAdapterSigmoid": Tail("interleaved", ScaleMap("sigmoid")),
    "AffineAdapterNaive": Tail("pair", ScaleMap("exp")),
}
"""By memcnn's adapter class, which computes s and t from its module's output."""
_OWN = Tail("pair")


def _tail(block: Any) -> Tail:
    if not _is_affine(block):
        return ADDITIVE
    adapters = block.Fm, block.Gm
    for name, tail in _TAILS.items():
        if all(defined_as(a, _WHERE, name) and changed_method(a, ("forward",)) is None for a in adapters):
            return tail
    return _OWN


def _is_affine(block: Any) -> bool:
    return defined_as(block, _WHERE, "AffineCoupling")


def _find(block: Any) -> tuple[str, None]:
    if block.implementation_fwd != -1 or block.implementation_bwd != -1:
        raise Unfit("a deprecated implementation that rebuilds its input")
    if block.split_dim != 1:
        raise Unfit(f"split_dim {block.split_dim}: only 1")
    tail = _tail(block)
    if tail is _OWN:
        raise Unfit(f"its adapters are not both {' or '.join(_TAILS)}")
    assert tail.scale_map is not None
    return ("additive coupling" if tail is ADDITIVE else f"affine coupling, {tail.scale_map.kind}"), None


def _sides(block: Any, layout: None, context: Sequence[Any]) -> tuple[Side, Side]:
    """The side of Fm, which moves the first half, and that of Gm; no ``run`` where an adapter was changed since."""
    tail = _tail(block)

    def side(net: Any, moves: str) -> Side:
        def run(kept: Tensor) -> Params:
            params = net(kept.contiguous())
            return (params, params) if tail.layout == "pair" else params

        if tail is _OWN:
            return Side(Split("halves", moves), tail, None)
        return Side(Split("halves", moves), tail, run, (net, net) if tail.layout == "pair" else (net,))

    first, second = _nets(block)
    return side(first, "first"), side(second, "second")


def _nets(block: Any) -> tuple[nn.Module, ...]:
    sides = block.Fm, block.Gm
    return tuple(getattr(side, "f", side) for side in sides) if _is_affine(block) else sides


def _adapter(where: str, name: str) -> Adapter:
    return coupling_adapter(
        library="memcnn",
        where=where,
        name=name,
        find=_find,
        members=_sides,
        methods=two_methods(_sides, log_det=False),
        nets=_nets,
        shapes=lambda block: ((3, 6), (2, 6, 2, 3)),
        settings=("split_dim", "implementation_fwd", "implementation_bwd"),
        stored="memcnn's InvertibleModuleWrapper rebuilds inputs itself",
    )


ADAPTERS = (
    _adapter(_WHERE, "AffineCoupling"),
    _adapter("memcnn.models.additive", "AdditiveCoupling"),
)
