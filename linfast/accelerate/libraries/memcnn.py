"""memcnn: AffineCoupling and AdditiveCoupling, as they are and inside InvertibleModuleWrapper.

    y1 = s x1 + t with (s, t) = Fm(x2), then y2 = s x2 + t with (s, t) = Gm(y1);  x -> y
    AffineAdapterSigmoid: s = sigmoid(raw + 2), t and raw interleaved; AffineAdapterNaive: s = e^t

memcnn's wrapper, which keeps no input, stays: it runs these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...scale_maps import ScaleMap
from ..adapter import Adapter, Draw, Stub, Unfit
from ..coupling import coupling_adapter
from ..identity import changed_method, defined_as
from ..sides import ADDITIVE, Side, Split, Tail

__all__ = ["ADAPTERS"]

_WHERE = "memcnn.models.affine"
_SIGMOID = Tail("interleaved", ScaleMap("sigmoid"))
_NAIVE = Tail("pair", ScaleMap("exp"))
_OWN = Tail("pair")


def _find(block: Any) -> tuple[str, None]:
    if block.implementation_fwd != -1 or block.implementation_bwd != -1:
        raise Unfit("a deprecated implementation that rebuilds its input")
    if block.split_dim != 1:
        raise Unfit(f"split_dim {block.split_dim}: only 1")
    return (f"affine coupling, {_kind(block)}" if _is_affine(block) else "additive coupling"), None


def _is_affine(block: Any) -> bool:
    return defined_as(block, _WHERE, "AffineCoupling")


def _is(adapter: Any, name: str) -> bool:
    """Whether this is the adapter of this name, whose parameters are its module's outputs."""
    return defined_as(adapter, _WHERE, name) and changed_method(adapter, ("forward",)) is None


def _kind(block: Any) -> str:
    kinds = {"sigmoid": "AffineAdapterSigmoid", "exp": "AffineAdapterNaive"}
    return next((k for k, name in kinds.items() if all(_is(a, name) for a in (block.Fm, block.Gm))), "own scale")


def _sides(block: Any, layout: None, context: Sequence[Any]) -> tuple[Side, Side]:
    """What moves the first half, by Fm, and the second, by Gm."""

    def side(adapter: Any, moves: str) -> Side:
        split = Split("halves", moves)
        if not _is_affine(block):
            return Side(split, ADDITIVE, None, (adapter,))
        if kind == "sigmoid":
            return Side(split, _SIGMOID, lambda kept: adapter.f(kept.contiguous()), (adapter.f,))
        if kind == "exp":
            return Side(split, _NAIVE, lambda kept: (adapter.f(kept.contiguous()),) * 2, (adapter.f,) * 2)
        return Side(split, _OWN, None)

    kind = _kind(block)
    return side(block.Fm, "first"), side(block.Gm, "second")


class _Pair(Stub):
    def forward(self, x: Tensor, *context: Any, **named: Any) -> Any:
        shift, raw = super().forward(x).chunk(2, 1)
        return raw.exp(), shift


def _stubbed(block: Any, draw: Draw) -> list[tuple[int, ...]]:
    double = 1 + _is_affine(block)
    for side in ("Fm", "Gm"):
        if _is_affine(block) and block._modules[side].__class__.__name__.startswith("AffineAdapter"):
            width = 6 if _is(block._modules[side], "AffineAdapterSigmoid") else 3
            block._modules[side]._modules["f"] = Stub(3, width, draw)
        else:
            block._modules[side] = (_Pair if _is_affine(block) else Stub)(3, 3 * double, draw)
    return [(3, 6), (2, 6, 2, 3)]


def _nets(block: Any) -> tuple[nn.Module, ...]:
    return tuple(side.f if _is_affine(block) and hasattr(side, "f") else side for side in (block.Fm, block.Gm))


def _adapter(where: str, name: str) -> Adapter:
    return coupling_adapter(
        library="memcnn",
        where=where,
        name=name,
        find=_find,
        sides_of=_sides,
        nets=_nets,
        stubbed=_stubbed,
        log_det=False,
        settings=("split_dim", "implementation_fwd", "implementation_bwd"),
        stored="memcnn's InvertibleModuleWrapper rebuilds inputs itself",
    )


ADAPTERS = (
    _adapter(_WHERE, "AffineCoupling"),
    _adapter("memcnn.models.additive", "AdditiveCoupling"),
)
