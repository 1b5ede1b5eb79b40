"""The raw op masked_autoregressive in plain torch: both directions, and their backward.

x and y are [B, D]. Inside, tensors are [units, B], and the features are in the order of their degrees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.masked_spec import MaskedSpec, masked_spec_of
from ..scale_maps import SCALE_MAP_KINDS, ScaleMap, log_scale_function, scale_function
from .activations import ACTIVATIONS
from .affine_coupling import ORDERS, couple, couple_backward
from .masked_walk import Network, evaluate, walk
from .masked_walk_backward import pass_backward, walk_backward

MASKED_ACTIVATIONS = {**ACTIVATIONS, "elu": F.elu}
"""The activations of masked networks; an index in it is the activation's number in the kernel."""
_FUNCTIONS = tuple(MASKED_ACTIVATIONS.values())

Elementwise = Callable[[Tensor], Tensor]


def _network(weights: Tensor, extras: Tensor | None, spec: MaskedSpec) -> Network:
    wide = torch.promote_types(weights.dtype, torch.float32)
    weights = weights.to(wide)
    pairs = spec.split_extras(None if extras is None else extras.t().to(wide))
    return Network(spec, spec.matrices(weights), spec.biases(weights), pairs, _FUNCTIONS[spec.activation])


def _sorted(x: Tensor, spec: MaskedSpec) -> Tensor:
    """[D, B] in fp32 or wider, the features in the order of their degrees."""
    columns = x.t().to(torch.promote_types(x.dtype, torch.float32))
    return columns.contiguous() if _is_identity(spec.order) else columns[list(spec.order)]


def _unsorted(columns: Tensor, spec: MaskedSpec, dtype: torch.dtype) -> Tensor:
    """[B, D] contiguous, from the features in the order of their degrees."""
    if not _is_identity(spec.order):
        columns = columns[sorted(range(len(spec.order)), key=spec.order.__getitem__)]
    return columns.t().to(dtype, memory_format=torch.contiguous_format, copy=True)


def _is_identity(order: Sequence[int]) -> bool:
    return all(i == at for i, at in enumerate(order))


def _parameters(params: Tensor, spec: MaskedSpec) -> tuple[Tensor, Tensor]:
    """(shift, s) from the parameters [P n, B] of n features; s = 0 without a scale."""
    if spec.per_feature == 1:
        return params, torch.zeros_like(params)
    return params[0::2], _scales(spec)[1](params[1::2])


def _scale_map(spec: MaskedSpec) -> ScaleMap:
    return ScaleMap(SCALE_MAP_KINDS[spec.kind], spec.bound, spec.floor)


def _scales(spec: MaskedSpec) -> tuple[Elementwise, Elementwise]:
    """Functions from raw to e^s and to s."""
    return scale_function(_scale_map(spec)), log_scale_function(_scale_map(spec))


def differentiable(
    x: Tensor, weights: Tensor, operands: Tensor, extras: Tensor | None, *constants: Any
) -> tuple[Tensor, Tensor]:
    """The raw op in plain, differentiable torch; the inverse evaluates the network once per degree."""
    spec = masked_spec_of(*constants)
    net, y = _network(weights, extras, spec), _sorted(x, spec)
    out = torch.zeros_like(y) if spec.inverse else y
    for degree in range(1, spec.degrees + 1) if spec.inverse else (spec.degrees,):
        known = spec.cut(0, degree + 1)  # features of higher degrees stay 0: their values would not be right yet
        shift, log_s = _parameters(evaluate(net, out)[2][: known * spec.per_feature], spec)
        out = torch.cat((couple(y[:known], shift, log_s, ORDERS[spec.scale_first], spec.inverse), out[known:]))
    total = log_s.sum(0)
    return _unsorted(out, spec, x.dtype), -total if spec.inverse else total


def plain(
    x: Tensor, weights: Tensor, operands: Tensor, extras: Tensor | None, *constants: Any
) -> tuple[Tensor, Tensor]:
    """The raw op in plain torch; the inverse walks over the degrees."""
    spec = masked_spec_of(*constants)
    wants_graph = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weights, extras))
    if not spec.inverse or wants_graph:  # the second, where torch.export has kept the op without its backward
        return differentiable(x, weights, operands, extras, *constants)
    scale, log_scale = (None, None) if spec.per_feature == 1 else _scales(spec)
    return invert_affine(_network(weights, extras, spec), x, scale, log_scale, spec.scale_first)


def invert_affine(
    net: Network, y: Tensor, scale: Elementwise | None, log_scale: Elementwise | None, scale_first: bool
) -> tuple[Tensor, Tensor]:
    """(x [B, D], log|dx / dy| [B]) of an affine transform by a walk, without a graph.

    ``scale`` and ``log_scale`` map raw to e^s and to s; None for an additive transform.
    """
    spec, columns = net.spec, _sorted(y, net.spec)

    def solve(features: slice, params: Tensor, out: Tensor) -> None:
        if scale is None:
            torch.sub(columns[features], params, out=out)
        elif scale_first:
            torch.div(columns[features] - params[0::2], scale(params[1::2]), out=out)
        else:
            torch.sub(columns[features] / scale(params[1::2]), params[0::2], out=out)

    x, params = walk(net, y.shape[0], solve)
    total = params.new_zeros(y.shape[0]) if log_scale is None else -log_scale(params[1::2]).sum(0)
    return _unsorted(x, spec, y.dtype), total


def invert_elementwise(
    net: Network, y: Tensor, inverse: Callable[[Tensor, Tensor, list[int]], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """(x [B, D], log|dx / dy| [B]) of any elementwise transform by a walk, without a graph.

    ``inverse`` takes y [B, n] of n features, their parameters [B, n, P] and their indices, and returns x [B, n] and
    log|dx / dy|, [B, n].
    """
    spec, columns, parts = net.spec, _sorted(y, net.spec), []

    def solve(features: slice, params: Tensor, out: Tensor) -> None:
        of_features = params.unflatten(0, (-1, spec.per_feature)).permute(2, 0, 1)
        x, part = inverse(columns[features].t(), of_features, list(spec.order[features]))
        out.copy_(x.t())
        parts.append(part)

    x, _ = walk(net, y.shape[0], solve)
    return _unsorted(x, spec, y.dtype), torch.cat(parts, 1).sum(1)


def plain_backward(
    x: Tensor, weights: Tensor, extras: Tensor | None, y: Tensor, grad: Tensor | None, grad_log_det: Tensor | None,
    *rest: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The backward in plain torch, without a graph; of an inverse, a walk from the last degree to the first."""
    *constants, needs = rest
    spec = masked_spec_of(*constants)
    net, x = _network(weights, extras, spec), _sorted(y if spec.inverse else x, spec)
    evaluated = evaluate(net, x)
    shift, log_s = _parameters(evaluated[2], spec)
    out = x if spec.inverse else couple(x, shift, log_s, ORDERS[spec.scale_first], False)
    of_out = torch.zeros_like(x) if grad is None else _sorted(grad, spec)
    slope = None if spec.per_feature == 1 else _scale_map(spec).derivative(evaluated[2][1::2])
    of_log_det = 0.0 if grad_log_det is None else grad_log_det
    order = ORDERS[spec.scale_first]

    def gradients(a: Tensor, rows: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """Of the input, shift and s, from the gradient ``a`` of the output; the walk's formulas for an inverse."""
        return couple_backward(out[rows], shift[rows], log_s[rows], a, of_log_det, order, spec.inverse)

    def pull(features: slice, a: Tensor, into: Tensor) -> None:
        _, of_shift, of_log_s = gradients(a, features)
        into[:: spec.per_feature] = of_shift
        if slope is not None:
            torch.mul(of_log_s, slope[features], out=into[1::2])

    if spec.inverse:
        found = walk_backward(net, evaluated, of_out, pull)
        of_input = gradients(found.x)[0]
    else:
        of_params = torch.empty_like(evaluated[2])
        pull(slice(None), of_out, of_params)
        found = pass_backward(net, evaluated, gradients(of_out)[0], of_params)
        of_input = found.x
    of_weights = weights.new_zeros(weights.shape, dtype=x.dtype)
    for into, gradient in zip(
        (*spec.matrices(of_weights), *spec.biases(of_weights)), (*found.matrices, *found.biases), strict=True
    ):
        into.copy_(gradient)
    of_extras = [each for pair in found.extras for each in pair if each is not None]
    return (
        _unsorted(of_input, spec, y.dtype) if needs[0] else None,
        of_weights.to(weights.dtype) if needs[1] else None,
        None,
        torch.cat(of_extras).t().to(extras.dtype).contiguous() if extras is not None and needs[3] else None,
    )
