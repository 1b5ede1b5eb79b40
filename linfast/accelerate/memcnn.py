"""memcnn: AffineCoupling and AdditiveCoupling, as they are and inside InvertibleModuleWrapper.

    y1 = s x1 + t with (s, t) = Fm(x2), then y2 = s x2 + t with (s, t) = Gm(y1);  x -> y
    AffineAdapterSigmoid: s = sigmoid(raw + 2), t and raw interleaved; AffineAdapterNaive: s = e^t

memcnn's wrapper, which keeps no input, stays: it runs these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..scale_maps import ScaleMap
from .adapter import Adapter, Draw, Options, Plan, Stub, Unfit
from .identity import changed_method, defined_as
from .tail import Params, Tail, couple_both

__all__ = ["ADAPTERS"]

_WHERE = "memcnn.models.affine"
_SIGMOID = Tail(lambda raw: torch.sigmoid(raw + 2), "interleaved", ScaleMap("sigmoid"), gives="scale")
_PAIR = Tail(lambda scale: scale, "pair", gives="scale")


def _plan(block: Any, options: Options) -> Plan:
    if block.implementation_fwd != -1 or block.implementation_bwd != -1:
        raise Unfit("a deprecated implementation that rebuilds its input")
    if block.split_dim != 1:
        raise Unfit(f"split_dim {block.split_dim}: only 1")
    if not _is_affine(block):
        return Plan("additive coupling")
    known = all(_is_sigmoid(adapter) for adapter in (block.Fm, block.Gm))
    return Plan(f"affine coupling, {'sigmoid' if known else 'own scale'}", layout=known)


def _is_affine(block: Any) -> bool:
    return defined_as(block, _WHERE, "AffineCoupling")


def _is_sigmoid(adapter: Any) -> bool:
    """Whether this is the sigmoid adapter, whose parameters are its module's outputs."""
    return defined_as(adapter, _WHERE, "AffineAdapterSigmoid") and changed_method(adapter, ("forward",)) is None


def _affine(block: Any, x: Tensor, inverse: bool) -> Tensor:
    first = (x.shape[1] + 1) // 2
    if block._linfast_plan.layout:
        params_of: Sequence[Callable[[Tensor], Params]] = (block.Fm.f, block.Gm.f)
        return couple_both(x, first, params_of, _SIGMOID, inverse, log_det=False)[0]

    def of(adapter: nn.Module) -> Callable[[Tensor], Params]:
        def params(kept: Tensor) -> Params:
            scale, shift = adapter.forward(kept.contiguous())
            return shift, scale

        return params

    return couple_both(x, first, (of(block.Fm), of(block.Gm)), _PAIR, inverse, log_det=False)[0]


def _additive(block: Any, x: Tensor, inverse: bool) -> Tensor:
    x1, x2 = x.chunk(2, 1)
    if inverse:
        x2 = x2 - block.Gm.forward(x1.contiguous())
        return torch.cat((x1 - block.Fm.forward(x2), x2), 1)
    x1 = x1 + block.Fm.forward(x2.contiguous())
    return torch.cat((x1, x2 + block.Gm.forward(x1)), 1)


class _Pair(Stub):
    def forward(self, x: Tensor, *context: Any, **named: Any) -> Any:
        shift, raw = super().forward(x).chunk(2, 1)
        return raw.exp(), shift


def _probe(block: Any, draw: Draw) -> Sequence[Tensor]:
    double = 1 + _is_affine(block)
    for side in ("Fm", "Gm"):
        if _is_affine(block) and block._modules[side].__class__.__name__.startswith("AffineAdapter"):
            width = 6 if _is_sigmoid(block._modules[side]) else 3
            block._modules[side]._modules["f"] = Stub(3, width, draw)
        else:
            block._modules[side] = (_Pair if _is_affine(block) else Stub)(3, 3 * double, draw)
    return [run(draw(*shape)) for run in (block.forward, block.inverse) for shape in ((3, 6), (2, 6, 2, 3))]


def _nets(block: Any) -> tuple[nn.Module, ...]:
    return tuple(side.f if _is_affine(block) and hasattr(side, "f") else side for side in (block.Fm, block.Gm))


def _adapter(where: str, name: str, run: Callable[..., Tensor]) -> Adapter:
    return Adapter(
        library="memcnn",
        where=where,
        name=name,
        methods={
            "forward": lambda block, x: run(block, x, inverse=False),
            "inverse": lambda block, y: run(block, y, inverse=True),
        },
        plan=_plan,
        probe=_probe,
        conditioners=_nets,
        stored="memcnn's InvertibleModuleWrapper rebuilds inputs itself",
    )


ADAPTERS = (
    _adapter(_WHERE, "AffineCoupling", _affine),
    _adapter("memcnn.models.additive", "AdditiveCoupling", _additive),
)
