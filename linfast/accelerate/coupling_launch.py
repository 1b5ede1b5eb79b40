"""A coupling and its MLP conditioner in one launch of ``ops.coupling_stack``.

The library's parameters are brought to the op's form in the graph at every call, and kept only inside
``lf.freeze``: [raw | shift] rows swapped, one net's rows used twice, a shift without a raw value given
zeros, two nets laid side by side (block-diagonal weights), masked columns left out. A mask that is
no two runs is a gather before and a scatter after the launch.

    m / s + t, given s = sigmoid(..), undoes (m - t) s: the op's inverse with the shift negated
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..dispatch import uses_triton
from ..freeze import derived
from ..kernels.stack_configs import config_for, mode_on, target_of
from ..ops.activations import ACTIVATION_NAMES
from ..ops.affine_coupling import LAYOUTS, split_sizes
from ..ops.coupling_stack import coupling_stack
from ..ops.stack_weights import CouplingLayer, PackedStack, pack_stack
from ..precision import half_dtype, resolve_precision
from .coupling_side import Side
from .identity import PLAN, has_global_hook
from .mlp import MLP, find_mlp

__all__ = ["arranged", "fits_whole", "narrowed", "takes_launch", "whole_here", "whole_layer", "widest"]

_MAX_LINEAR = 4  # layers of a conditioner that the kernel knows
_WHOLE_WEIGHTS = (Tensor, nn.Parameter)

Layers = list[tuple[Tensor, Tensor | None]]


def whole_layer(x: Tensor, side: Side) -> Callable[[Tensor, bool], tuple[Tensor, Tensor]] | None:
    """(x, inverse) -> (y, log_det) in one launch; None where there is none for this x [B, D]."""
    if x.ndim != 2 or not side.nets or has_global_hook():
        return None
    mlps = _mlps(side)
    if mlps is None or _features(mlps, side) != x.shape[1] or not _has_tile(mlps, side, x):
        return None
    return functools.partial(_run, mlps, side)


def whole_here(sides: Sequence[Side], like: Tensor) -> int | None:
    """How many features the vectors have that run whole on both sides, on like's device; None where none do."""
    if not sides or not uses_triton(like):
        return None
    features = {fits_whole(side, like) for side in sides}
    return features.pop() if len(features) == 1 else None


def fits_whole(side: Side, like: Tensor) -> int | None:
    """How many features the vectors have that run whole on this device, or, where it is a CPU, on a GPU.

    None where none do.
    """
    mlps = _mlps(side) if side.nets and side.tail.scale_map is not None else None
    if mlps is None or like.dtype == torch.float64:
        return None
    features = _features(mlps, side)
    return features if features is not None and _has_tile(mlps, side, like) else None


def takes_launch(side: Side) -> bool:
    """Whether the op has this side's formula and conditioner, in the direction that the library calls forward."""
    return side.tail.scale_map is not None and side.tail.gives != "reciprocal" and _mlps(side) is not None


def widest(side: Side) -> int | None:
    """Values of the nets' widest layer, where they are MLPs of any kind; else None."""
    if not side.nets or has_global_hook():
        return None
    mlps = [find_mlp(net) for net in side.nets]
    return None if None in mlps else max(width for mlp in mlps if mlp is not None for width in mlp.sizes)


def _mlps(side: Side) -> tuple[MLP, ...] | None:
    """The nets as MLPs that the op takes, whatever their sizes."""
    found = [find_mlp(net) for net in side.nets]
    mlps = tuple(mlp for mlp in found if mlp is not None)
    if len(mlps) < len(found) or len({len(mlp.layers) for mlp in mlps}) > 1:
        return None
    kinds = {(mlp.activation, mlp.constants) for mlp in mlps}
    name, constants = kinds.pop()
    known = name in ACTIVATION_NAMES or len(mlps[0].layers) == 1
    if kinds or not known or constants not in ((), ("none",)) or len(mlps[0].layers) > _MAX_LINEAR:
        return None
    tensors = (t for mlp in mlps for layer in mlp.layers for t in layer if t is not None)
    return mlps if all(type(t) in _WHOLE_WEIGHTS for t in tensors) else None


def _features(mlps: tuple[MLP, ...], side: Side) -> int | None:
    """D, where the nets' sizes and the split's are those of two halves."""
    n_in, n_out = mlps[0].sizes[0], mlps[0].sizes[-1]
    if any((mlp.sizes[0], mlp.sizes[-1]) != (n_in, n_out) for mlp in mlps):
        return None
    double = 1 if side.tail.layout in ("pair", "shift") else 2
    if n_out % double or (side.full and n_in != n_out):
        return None
    kept, moved = side.split.sizes(n_in) if side.full else (n_in, n_out // double)
    first, second = (kept, moved) if _moves(side, kept, moved) == "second" else (moved, kept)
    fits = moved > 0 and first - second in (0, 1) and side.split.first in (None, first)
    return kept + moved if fits else None


def _moves(side: Side, kept: int, moved: int) -> str:
    """The half that moves in the op's order of the features; gathered ones come as two halves best do."""
    return side.split.moves if side.split.indices is None else "second" if kept >= moved else "first"


def _has_tile(mlps: tuple[MLP, ...], side: Side, like: Tensor) -> bool:
    """Whether one program holds the layer on like's device, in its mode."""
    together = 1 if len(set(map(id, side.nets))) == 1 else len(mlps)
    hidden = together * max((1, *(width for mlp in mlps for width in mlp.sizes[1:-1])))
    features, n_linear = _features(mlps, side), len(mlps[0].layers)
    return (
        features is not None
        and config_for(features, hidden, n_linear, _mode(side, like), target_of(like)) is not None
    )


def _mode(side: Side, like: Tensor) -> str:
    """The precision that accelerate was asked for, else, and while a plan is only being made, as torch is set."""
    plan = vars(side.owner).get(PLAN)
    return mode_on(target_of(like), resolve_precision(like, None if plan is None else plan.options.precision))


def _run(mlps: tuple[MLP, ...], side: Side, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    precision, tail = _mode(side, x), side.tail
    assert tail.scale_map is not None

    def pack() -> tuple[CouplingLayer, PackedStack]:
        layer = arranged(mlps, side)
        return layer, pack_stack([layer], x.shape[1], inverse=False, precision=precision, dtype=half_dtype(x))

    key = ("whole layer", side.nets, precision, half_dtype(x))
    layer, packed = derived(side.owner, key, pack)
    undo = tail.gives == "reciprocal"
    kept, moved = side.split.take(x)
    moves = _moves(side, kept.shape[1], moved.shape[1])
    apart = side.split.kind != "halves"
    y, log_det = coupling_stack(
        (torch.cat((kept, moved) if moves == "second" else (moved, kept), 1)) if apart else x,
        [layer],
        activation=mlps[0].activation if mlps[0].activation in ACTIVATION_NAMES else "relu",  # of a lone layer
        scale_map=tail.scale_map,
        order="shift_first" if undo else tail.order,
        moves=moves,
        inverse=inverse != undo,
        log_det=True,
        precision=precision,
        packed=packed,
    )
    assert log_det is not None
    if apart:
        first, second = y.split(split_sizes(x.shape[1]), 1)
        y = side.split.put(x, first, second) if moves == "second" else side.split.put(x, second, first)
    return y, log_det.to(x.dtype)


def arranged(mlps: tuple[MLP, ...], side: Side) -> CouplingLayer:
    """The nets as one layer of the op."""
    tail = side.tail
    nets: list[Layers] = [narrowed(mlp, side) if side.full else list(mlp.layers) for mlp in mlps]
    twice = len(nets) == 2 and side.nets[0] is side.nets[1]
    layers = _side_by_side(nets[0], nets[1]) if len(nets) == 2 and not twice else nets[0]
    as_given = tail.layout in LAYOUTS or (tail.layout == "pair" and not twice)
    layout = "interleaved" if tail.layout == "interleaved" else "halves"
    if not as_given or tail.gives == "reciprocal" or side.factor != 1:
        layers[-1] = _rows(*layers[-1], side, twice)
        layout = "halves"
    return CouplingLayer([weight for weight, _ in layers], [bias for _, bias in layers], layout)


def _rows(weight: Tensor, bias: Tensor | None, side: Side, twice: bool) -> tuple[Tensor, Tensor]:
    """The last layer with its rows as [shift | raw], times the factor; the shift negated where the op undoes."""
    tail = side.tail
    sign = -side.factor if tail.gives == "reciprocal" else side.factor
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    rows = []
    for tensor in (weight, bias):
        if tail.layout == "shift":
            shift, raw = tensor, torch.zeros_like(tensor)
        elif twice:
            shift, raw = tensor, tensor
        else:
            shift, raw = (part[0] for part in tail.shift_and_raw(tensor[None], tensor.shape[0] // 2))
        rows.append(
            torch.cat((shift if sign == 1 else sign * shift, raw if side.factor == 1 else side.factor * raw))
        )
    return rows[0], rows[1]


def _side_by_side(one: Layers, two: Layers) -> Layers:
    """One net that gives [one(k) | two(k)]."""
    layers: Layers = []
    for (a, a_bias), (b, b_bias) in zip(one, two, strict=True):
        weight = torch.block_diag(a, b) if layers else torch.cat((a, b))
        biases = [w.new_zeros(len(w)) if bias is None else bias for w, bias in ((a, a_bias), (b, b_bias))]
        layers.append((weight, torch.cat(biases)))
    return layers


def narrowed(mlp: MLP, side: Side) -> Layers:
    """Without the columns of what is zero and the rows of what is not looked at."""
    layers = list(mlp.layers)
    weight, bias = layers[0]
    layers[0] = side.split.take(weight)[0], bias
    weight, bias = layers[-1]
    layers[-1] = side.split.take(weight.mT)[1].mT, None if bias is None else side.split.take(bias[None])[1][0]
    return layers
