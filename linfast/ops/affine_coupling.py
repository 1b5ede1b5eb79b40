"""Affine coupling: one half of the channels is scaled and shifted, the other half is copied.

m is the half of x that is scaled and shifted. The conditioner outputs the shift t and raw; log_s = scale_map(raw):

    order "shift_first":  y = (m + t) exp(log_s)      m = y exp(-log_s) - t
    order "scale_first":  y = m exp(log_s) + t        m = (y - t) exp(-log_s)
    log|det| = +sum(log_s) forward, -sum(log_s) inverse

The first half has ceil(C / 2) of the C channels. On a CPU and in float64 the op runs in plain torch; on a GPU each
direction is one kernel (linfast.kernels.affine_coupling), and y is saved for the backward, not x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, check_flag, check_kind, check_tensor
from ..dispatch import cat, uses_triton
from ..kernels.launch import COUPLING_SCHEMA, CouplingSpec, like
from ..scale_maps import SCALE_MAP_KINDS, ScaleMap
from .register import define_op

ORDERS = ("shift_first", "scale_first")
LAYOUTS = ("halves", "interleaved")
HALVES = ("first", "second")


def split_sizes(features: int) -> tuple[int, int]:
    """Channels of the first and of the second half: ceil(C / 2), floor(C / 2)."""
    return (features + 1) // 2, features // 2


def affine_coupling(
    x: Tensor,
    params: Tensor,
    scale_map: ScaleMap,
    *,
    order: str = "shift_first",
    layout: str = "halves",
    moves: str = "first",
    inverse: bool = False,
    log_det: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(y, log|det| or None): y = (m + t) exp(log_s) or m exp(log_s) + t, or the inverse, on one half m of x.

    Args:
        x: [B, C, ...], C >= 2.
        params: [B, 2 C_moved, ...], the conditioner's output: [shift | raw] along
            dim 1 (layout "halves"), or shift_i, raw_i alternating (layout "interleaved").
        scale_map: maps raw to log_s.
        order: "shift_first" (the Linearizer paper) or "scale_first" (RealNVP).
        moves: which half is the moved one, "first" or "second".
        inverse: apply the inverse.
        log_det: also return log|det| of the map that is applied, [B], in fp32 or wider.

    The other half of x is copied. Shift, scale and log|det| are computed in fp32 or wider; y has x's dtype.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an option is unknown, or the shape of x or params does not fit.
    """
    check_coupling(x, params, scale_map, order, layout, moves, inverse, log_det)
    return coupled(x, params, scale_map, coupling_constants(scale_map, order, layout, moves, inverse, log_det))


def coupled(x: Tensor, params: Tensor, scale_map: ScaleMap, spec: CouplingSpec) -> tuple[Tensor, Tensor | None]:
    """``affine_coupling`` without checks of the arguments."""
    if not uses_triton(x, params):
        return affine_coupling_reference(x, params, scale_map, spec)
    y, total = _affine_coupling(x, params, *spec)
    return y, total if spec.log_det else None


def affine_coupling_reference(
    x: Tensor, params: Tensor, scale_map: ScaleMap, spec: CouplingSpec
) -> tuple[Tensor, Tensor | None]:
    """``affine_coupling`` in plain torch."""
    first, second = x.split(split_sizes(x.shape[1]), dim=1)
    moved = second if spec.moves_second else first
    shift, raw = spec.shift_and_raw(params)
    value = moved
    if not x.dtype == params.dtype == torch.float32:
        compute = torch.promote_types(moved.dtype, torch.float32)
        value, shift, raw = moved.to(compute), shift.to(compute), raw.to(compute)
    log_s = scale_map.log_scale(raw)
    out = couple(value, shift, log_s, ORDERS[spec.scale_first], spec.inverse)
    if out.dtype != x.dtype:
        out = out.to(x.dtype)
    y = cat((first, out) if spec.moves_second else (out, second), dim=1)
    if not spec.log_det:
        return y, None
    total = log_s.sum(dim=tuple(range(1, log_s.ndim)))
    return y, -total if spec.inverse else total


def couple(value: Tensor, shift: Tensor, log_s: Tensor, order: str, inverse: bool) -> Tensor:
    """The coupling, or its inverse, of the moved half ``value``."""
    scale = (-log_s if inverse else log_s).exp()
    if inverse:
        return value * scale - shift if order == "shift_first" else (value - shift) * scale
    return (value + shift) * scale if order == "shift_first" else value * scale + shift


@torch.no_grad()
def affine_coupling_undo(
    y: Tensor, params: Tensor, grad: Tensor, grad_log_det: Tensor | None, scale_map: ScaleMap, *, order: str,
    layout: str, moves: str, inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The backward from the output: (x, dx, dparams) for y, log_det = affine_coupling(x, params, ...).

    For training that does not store x. ``grad`` and ``grad_log_det`` are the gradients of y and log_det; dx, in new
    memory, and dparams are those of x and params.
    """
    spec = coupling_constants(scale_map, order, layout, moves, inverse, grad_log_det is not None)
    if not uses_triton(y, params):
        return _undo_reference(y, params, grad, grad_log_det, *spec)
    x, _ = affine_coupling(y, params, scale_map, order=order, layout=layout, moves=moves, inverse=not inverse)
    return x, *torch.ops.linfast.affine_coupling_backward(y, params, grad, grad_log_det, *spec)


def _undo_reference(
    y: Tensor, params: Tensor, grad: Tensor | None, grad_log_det: Tensor | None, *constants: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """``affine_coupling_undo`` in plain torch; the formulas are in linfast.kernels.affine_coupling."""
    spec = CouplingSpec(*constants)
    scale_map, order = _scale_map(spec), ORDERS[spec.scale_first]
    compute = torch.promote_types(y.dtype, torch.float32)
    grad = torch.zeros_like(y) if grad is None else grad
    sizes, index = split_sizes(y.shape[1]), int(spec.moves_second)
    halves, grads = (list(tensor.split(sizes, dim=1)) for tensor in (y, grad))
    out, g = halves[index].to(compute), grads[index].to(compute)
    shift, raw = (part.to(compute) for part in spec.shift_and_raw(params))
    log_s = scale_map.log_scale(raw)
    h = 0.0 if grad_log_det is None else grad_log_det.reshape(-1, *(1,) * (y.ndim - 1))
    halves[index] = couple(out, shift, log_s, order, not spec.inverse).to(y.dtype)
    dvalue, dshift, dlog_s = couple_backward(out, shift, log_s, g, h, order, spec.inverse)
    grads[index] = dvalue.to(y.dtype)
    draw = dlog_s * scale_map.derivative(raw)
    joined = torch.stack((dshift, draw), 2).flatten(1, 2) if spec.interleaved else torch.cat((dshift, draw), 1)
    return torch.cat(halves, dim=1), torch.cat(grads, dim=1), joined.to(params.dtype)


def couple_backward(
    out: Tensor, shift: Tensor, log_s: Tensor, g: Tensor, h: Tensor | float, order: str, inverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (value, shift, log_s) from ``out``, the moved half of y; g = dL/d out, h = dL/d log_det."""
    dvalue = g * (-log_s if inverse else log_s).exp()
    if order == "shift_first":
        return (dvalue, -g, -g * (out + shift) - h) if inverse else (dvalue, dvalue, g * out + h)
    return (dvalue, -dvalue, -g * out - h) if inverse else (dvalue, g, g * (out - shift) + h)


def coupling_constants(
    scale_map: ScaleMap, order: str, layout: str, moves: str, inverse: bool, log_det: bool
) -> CouplingSpec:
    """The raw op's constants for these options."""
    flags = (order == "scale_first", layout == "interleaved", moves == "second", inverse, log_det)
    return CouplingSpec(scale_map.constexpr_id, *scale_map.constants, *flags)


def _scale_map(spec: CouplingSpec) -> ScaleMap:
    return ScaleMap(SCALE_MAP_KINDS[spec.kind], spec.bound, spec.floor)


def raw_coupling_reference(x: Tensor, params: Tensor, *constants: Any) -> tuple[Tensor, Tensor | None]:
    """``affine_coupling_reference``, given the raw op's constants."""
    spec = CouplingSpec(*constants)
    return affine_coupling_reference(x, params, _scale_map(spec), spec)


def _fake(x: Tensor, params: Tensor, *constants: Any) -> tuple[Tensor, Tensor]:
    return like(x), x.new_empty(x.shape[0] if constants[-1] else 0, dtype=torch.float32)


_affine_coupling = define_op(
    f"affine_coupling(Tensor x, Tensor params, {COUPLING_SCHEMA}) -> (Tensor y, Tensor log_det)",
    _fake,
    raw_coupling_reference,
    saves="y params",
    gradients=lambda y, params, *_: (like(y), like(params)),
    backward=lambda *arguments: _undo_reference(*arguments)[1:],
    has_needs=False,
)


def check_coupling(
    x: Tensor, params: Tensor, scale_map: ScaleMap, order: str, layout: str, moves: str, inverse: bool,
    log_det: bool,
) -> None:  # fmt: skip
    check_tensor("x", x)
    check_tensor("params", params, x)
    check_kind("scale_map", scale_map, ScaleMap)
    check_choice("order", order, ORDERS)
    check_choice("layout", layout, LAYOUTS)
    check_choice("moves", moves, HALVES)
    check_flag("inverse", inverse)
    check_flag("log_det", log_det)
    if x.ndim < 2 or x.shape[1] < 2:
        raise ValueError(f"x must be [B, C, ...] with C >= 2; got {tuple(x.shape)}")
    channels = split_sizes(x.shape[1])[HALVES.index(moves)]
    expected = (x.shape[0], 2 * channels, *x.shape[2:])
    if params.shape != expected:
        raise ValueError(
            f"params must be {expected} for x {tuple(x.shape)} with moves={moves!r}; got {tuple(params.shape)}"
        )
