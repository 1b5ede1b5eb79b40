"""The raw op masked_autoregressive in plain torch: both directions, and their backward.

x and y are [B, D]. Inside, tensors are [units, B], and the features are in the order of their degrees.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import records_gradients
from ..kernels.masked_spec import MaskedSpec, masked_spec_of
from ..kernels.spline_spec import Spline, spline_of_numbers
from ..scale_maps import SCALE_MAP_KINDS, ScaleMap
from .activations import ACTIVATIONS
from .affine_coupling import ORDERS, couple, couple_backward
from .masked_walk import Network, evaluate, walk
from .masked_walk_backward import pass_backward, walk_backward
from .rq_spline import rq_spline_reference, spline_backward, spline_transform

MASKED_ACTIVATIONS = {**ACTIVATIONS, "elu": F.elu}
"""The activations of masked networks; an index in it is the activation's number in the kernel."""
BY_NUMBER = tuple(MASKED_ACTIVATIONS.values())
NUMBERS: dict[str | None, int] = {name: number for number, name in enumerate(MASKED_ACTIVATIONS)}

Elementwise = Callable[[Tensor], Tensor]


def _network(weights: Tensor, extras: Tensor | None, spec: MaskedSpec) -> Network:
    wide = torch.promote_types(weights.dtype, torch.float32)
    weights = weights.to(wide)
    pairs = spec.split_extras(None if extras is None else extras.t().to(wide))
    return Network(spec, spec.matrices(weights), spec.biases(weights), pairs, BY_NUMBER[spec.activation])


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
    return _scale_map(spec).scale_function, _scale_map(spec).log_scale_function


def differentiable(
    x: Tensor, weights: Tensor, operands: Tensor, extras: Tensor | None, *constants: Any
) -> tuple[Tensor, Tensor]:
    """The raw op in plain, differentiable torch; the inverse evaluates the network once per degree."""
    spec = masked_spec_of(*constants)
    net, y = _network(weights, extras, spec), _sorted(x, spec)
    out, transform = torch.zeros_like(y) if spec.inverse else y, _spline if spec.spline else _affine
    for degree in range(1, spec.degrees + 1) if spec.inverse else (spec.degrees,):
        known = spec.cut(0, degree + 1)  # features of higher degrees stay 0: their values would not be right yet
        found, total = transform(y[:known], evaluate(net, out)[2][: known * spec.per_feature], spec)
        out = torch.cat((found, out[known:]))
    return _unsorted(out, spec, x.dtype), total


def _affine(y: Tensor, params: Tensor, spec: MaskedSpec) -> tuple[Tensor, Tensor]:
    """(the transform, or its inverse, of features y [n, B], log|det| [B]) by their parameters [P n, B]."""
    shift, log_s = _parameters(params, spec)
    total = log_s.sum(0)
    return couple(y, shift, log_s, ORDERS[spec.scale_first], spec.inverse), -total if spec.inverse else total


def _spline(y: Tensor, params: Tensor, spec: MaskedSpec) -> tuple[Tensor, Tensor]:
    """``_affine`` of a spline."""
    spline = spline_of_numbers(spec.spline)
    out, total = rq_spline_reference(y.t(), _of_values(params, spec), *spline, spec.inverse, True)
    assert total is not None
    return out.t(), total


def _of_values(params: Tensor, spec: MaskedSpec) -> Tensor:
    """[B, n, P] from parameters [P n, B]."""
    return params.unflatten(0, (params.shape[0] // spec.per_feature, spec.per_feature)).permute(2, 0, 1)


def plain(
    x: Tensor, weights: Tensor, operands: Tensor, extras: Tensor | None, *constants: Any
) -> tuple[Tensor, Tensor]:
    """The raw op in plain torch; the inverse walks over the degrees."""
    spec = masked_spec_of(*constants)
    # Gradients are recorded here where torch.export has kept the op without its backward.
    if not spec.inverse or records_gradients(x, weights, extras):
        return differentiable(x, weights, operands, extras, *constants)
    net = _network(weights, extras, spec)
    if spec.spline:
        return invert_elementwise(net, x, functools.partial(_invert_spline, spline_of_numbers(spec.spline)))
    scale, log_scale = (None, None) if spec.per_feature == 1 else _scales(spec)
    return invert_affine(net, x, scale, log_scale, spec.scale_first)


def _invert_spline(spline: Spline, y: Tensor, params: Tensor, _: list[int]) -> tuple[Tensor, Tensor]:
    x, total = spline_transform(y, params, spline, True, True)
    assert total is not None
    return x, total[:, None]


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
    log|dx / dy|, [B, n] or its sum [B, 1].
    """
    spec, columns, parts = net.spec, _sorted(y, net.spec), []

    def solve(features: slice, params: Tensor, out: Tensor) -> None:
        x, part = inverse(columns[features].t(), _of_values(params, spec), list(spec.order[features]))
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
    net, given = _network(weights, extras, spec), _sorted(x, spec)
    x = _sorted(y, spec) if spec.inverse else given
    evaluated = evaluate(net, x)
    of_out, of_input = torch.zeros_like(x) if grad is None else _sorted(grad, spec), torch.empty_like(x)
    pull_transform = (_pull_spline if spec.spline else _pull_affine)(given, x, evaluated[2], grad_log_det, spec)

    def pull(features: slice, a: Tensor, into: Tensor) -> None:
        of_input[features] = pull_transform(features, a, into)

    if spec.inverse:
        found = walk_backward(net, evaluated, of_out, pull)
    else:
        of_params = torch.empty_like(evaluated[2])
        pull(slice(None), of_out, of_params)
        found = pass_backward(net, evaluated, of_input, of_params)
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


def _pull_affine(
    given: Tensor, x: Tensor, params: Tensor, grad_log_det: Tensor | None, spec: MaskedSpec
) -> Callable[[slice, Tensor, Tensor], Tensor]:
    """(features, the gradients of their output, where to write those of their parameters) -> those of their input.

    ``given`` is the transform's input, x the network's.
    """
    (shift, log_s), order = _parameters(params, spec), ORDERS[spec.scale_first]
    out = x if spec.inverse else couple(x, shift, log_s, order, False)
    slope = None if spec.per_feature == 1 else _scale_map(spec).derivative(params[1::2])
    of_log_det = 0.0 if grad_log_det is None else grad_log_det

    def pull(features: slice, a: Tensor, into: Tensor) -> Tensor:
        of_value, of_shift, of_log_s = couple_backward(
            out[features], shift[features], log_s[features], a, of_log_det, order, spec.inverse
        )
        into[:: spec.per_feature] = of_shift
        if slope is not None:
            torch.mul(of_log_s, slope[features], out=into[1::2])
        return of_value

    return pull


def _pull_spline(
    given: Tensor, x: Tensor, params: Tensor, grad_log_det: Tensor | None, spec: MaskedSpec
) -> Callable[[slice, Tensor, Tensor], Tensor]:
    """``_pull_affine`` of a spline."""
    spline, of_values = spline_of_numbers(spec.spline), _of_values(params, spec)

    def pull(features: slice, a: Tensor, into: Tensor) -> Tensor:
        of_value, of_params = spline_backward(
            given[features].t(), of_values[:, features], a.t(), grad_log_det, spline, spec.inverse
        )
        into.copy_(of_params.permute(1, 2, 0).flatten(0, 1))
        return of_value.t()

    return pull
