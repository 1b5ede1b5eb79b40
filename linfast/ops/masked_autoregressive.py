"""A masked autoregressive transform, affine or additive, whose parameters a masked network (MADE) computes; one op.

    y_i = x_i e^{s_i} + t_i   or   (x_i + t_i) e^{s_i}        (t_i, r_i) = net_i(x_1 .. x_{i-1}),  s_i = scale_map(r_i)
    log|det| = sum_i s_i                                      inverse: x_1, then x_2 from x_1, ..

in any order of the features. Sources: MADE (arXiv 1502.03509), masked autoregressive flows (1705.07057).

| runs      | where                                                                                       |
|-----------|---------------------------------------------------------------------------------------------|
| reference | a CPU, float64: forward, the network in plain torch; inverse, a walk over the degrees that  |
|           | uses every weight once (linfast.ops.masked_walk)                                            |
| kernel    | a GPU: either direction in one launch, linfast.kernels.masked_autoregressive                |

Nothing is saved for the backward but x and y; it evaluates the network once. The gradient of the inverse is a walk as
well. Second derivatives differentiate D evaluations of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_choice, check_flag, check_kind, check_tensor
from ..dispatch import uses_triton
from ..kernels.masked_spec import MASKED_SCHEMA, MaskedSpec, masked_spec_of
from ..kernels.stack_configs import mode_on, target_of
from ..precision import half_dtype, resolve_precision
from ..scale_maps import SCALE_MAP_KINDS, ScaleMap, log_scale_function, scale_function
from .activations import ACTIVATIONS
from .affine_coupling import ORDERS, couple_backward
from .autoregressive_masks import AutoregressiveMasks
from .masked_walk import Network, evaluate, walk, walk_backward
from .register import define_op
from .stack_weights import rounded

MASKED_ACTIVATIONS = {**ACTIVATIONS, "elu": F.elu}
"""The activations of masked networks; an index in it is the activation's number in the kernel."""
_NUMBERS = {name: number for number, name in enumerate(MASKED_ACTIVATIONS)}
_FUNCTIONS = tuple(MASKED_ACTIVATIONS.values())

Extras = Sequence[tuple[Tensor | None, Tensor | None]]


def masked_autoregressive(
    x: Tensor,
    masks: AutoregressiveMasks,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    activation: str,
    scale_map: ScaleMap | None,
    order: str = "scale_first",
    extras: Extras | None = None,
    inverse: bool = False,
    log_det: bool = False,
    precision: str | None = None,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(y, log|det| or None) of the transform or of its inverse.

    Args:
        x: [B, D], any strides.
        masks: the network's masks, with the order of the features that they imply.
        weights, biases: of the network's layers, [out, in] and [out] or None; masked weights are not used.
        activation: "relu", "silu", "tanh", "gelu" or "elu".
        scale_map: maps raw to s; None for an additive transform, y = x + t, where the masks have one parameter.
        order: "scale_first" x e^s + t, or "shift_first" (x + t) e^s.
        extras: for each hidden layer (term, gate), [B, H_l] or None: its value is (W h + b + term) gate. A context
            enters the network through them.
        inverse: apply the inverse.
        log_det: also return log|det| of the map that is applied, [B], in fp32 or wider.
        precision: of a kernel's products: "exact", "high", "tf32" or "fast"; None: as torch is set.
        packed: ``masks.pack(weights, biases)``, where it was computed before.

    The state, shift, scale and sums are fp32 or wider; y has x's dtype.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an option is unknown, or a shape does not fit.
    """
    _check(x, masks, weights, biases, activation, scale_map, order, extras)
    check_flag("inverse", inverse)
    check_flag("log_det", log_det)
    given = extras or ((None, None),) * len(masks.activated)
    if not (inverse or uses_triton(x, *weights)):
        return _forward(x, masks, weights, biases, activation, scale_map, order, given, log_det)
    weight = masks.pack(weights, biases) if packed is None else packed
    columns, kinds = masks.pack_extras(given)
    mode = mode_on(target_of(x), resolve_precision(x, precision))
    kind, bound, floor = (0, 1.0, 0.0) if scale_map is None else (scale_map.constexpr_id, *scale_map.constants)
    spec = masks.spec(kinds, _NUMBERS[activation], kind, bound, floor, order == "scale_first", inverse, mode)
    operands = weight.new_empty(0)
    if uses_triton(x, weight):
        operands = rounded(weight.detach()[: spec.n_matrices].float(), mode, half_dtype(x))
    y, total = _masked_autoregressive(x, weight, operands, columns, *spec.constants)
    return y, total if log_det else None


def _forward(
    x: Tensor, masks: AutoregressiveMasks, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
    activation: str, scale_map: ScaleMap | None, order: str, extras: Extras, log_det: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The transform in plain, differentiable torch."""
    dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, weights[0].dtype))
    params = masked_network(x, masks, weights, biases, MASKED_ACTIVATIONS[activation], extras)
    wide = torch.promote_types(params.dtype, torch.float32)
    params = params.to(wide).unflatten(1, (masks.features, masks.per_feature))
    shift = params[..., int(masks.raw_first and scale_map is not None)]
    if scale_map is None:
        return (x + shift).to(dtype), shift.new_zeros(len(x)) if log_det else None
    raw = params[..., int(not masks.raw_first)]
    scale = scale_function(scale_map)(raw)
    y = torch.addcmul(shift, x, scale) if order == "scale_first" else (x + shift) * scale
    return y.to(dtype), log_scale_function(scale_map)(raw).sum(1) if log_det else None


def masked_network(
    x: Tensor, masks: AutoregressiveMasks, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
    activate: Callable[[Tensor], Tensor], extras: Extras,
) -> Tensor:  # fmt: skip
    """The parameters [B, P D] in plain, differentiable torch."""
    used = masks.masks(x.device, weights[0].dtype)
    values, read = [x], x
    for i, (weight, mask, bias) in enumerate(zip(weights, used, biases, strict=True)):
        value = F.linear(read, weight * mask, bias)
        if i == len(used) - 1:
            break
        term, gate = extras[i]
        value = value if term is None else value + term
        value = value if gate is None else value * gate
        value = value + values[masks.adds[i]] if masks.adds[i] else value
        values.append(value)
        read = activate(value) if masks.activated[i] else value
    return value


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
    return all([i == at for i, at in enumerate(order)])


def _parameters(params: Tensor, spec: MaskedSpec) -> tuple[Tensor, Tensor, Tensor]:
    """(shift, e^s, s) from the parameters [P n, B] of n features; s = 0 without a scale."""
    if spec.per_feature == 1:
        zero = torch.zeros_like(params)
        return params, zero + 1, zero
    scale, log_scale = _scales(spec)
    return params[0::2], scale(params[1::2]), log_scale(params[1::2])


def _scale_map(spec: MaskedSpec) -> ScaleMap:
    return ScaleMap(SCALE_MAP_KINDS[spec.kind], spec.bound, spec.floor)


def _scales(spec: MaskedSpec) -> tuple[Elementwise, Elementwise]:
    """Functions from raw to e^s and to s."""
    return scale_function(_scale_map(spec)), log_scale_function(_scale_map(spec))


def _affine(x: Tensor, shift: Tensor, scale: Tensor, scale_first: bool, inverse: bool) -> Tensor:
    if inverse:
        return (x - shift) / scale if scale_first else x / scale - shift
    return torch.addcmul(shift, x, scale) if scale_first else (x + shift) * scale


def _differentiable(
    x: Tensor, weights: Tensor, operands: Tensor, extras: Tensor | None, *constants: Any
) -> tuple[Tensor, Tensor]:
    """The raw op in plain, differentiable torch; the inverse evaluates the network once per degree."""
    spec = masked_spec_of(*constants)
    net, y = _network(weights, extras, spec), _sorted(x, spec)
    out = torch.zeros_like(y) if spec.inverse else y
    for _ in range(spec.degrees if spec.inverse else 1):
        shift, scale, log_s = _parameters(evaluate(net, out)[2], spec)
        out = _affine(y, shift, scale, spec.scale_first, spec.inverse)
    total = log_s.sum(0)
    return _unsorted(out, spec, x.dtype), -total if spec.inverse else total


def _plain(
    x: Tensor, weights: Tensor, operands: Tensor, extras: Tensor | None, *constants: Any
) -> tuple[Tensor, Tensor]:
    """The raw op in plain torch; the inverse walks over the degrees."""
    spec = masked_spec_of(*constants)
    if not spec.inverse:
        return _differentiable(x, weights, operands, extras, *constants)
    scale, log_scale = (None, None) if spec.per_feature == 1 else _scales(spec)
    return invert_affine(_network(weights, extras, spec), x, scale, log_scale, spec.scale_first)


Elementwise = Callable[[Tensor], Tensor]


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


def _walk_back(
    x: Tensor, weights: Tensor, extras: Tensor | None, y: Tensor, grad: Tensor | None, grad_log_det: Tensor | None,
    *rest: Any,
) -> tuple[Tensor | None, ...] | None:  # fmt: skip
    """The backward of an inverse in plain torch, without a graph: a walk from the last degree to the first."""
    *constants, needs = rest
    spec = masked_spec_of(*constants)
    if not spec.inverse:
        return None
    net, x = _network(weights, extras, spec), _sorted(y, spec)
    evaluated = evaluate(net, x)
    shift, scale, log_s = _parameters(evaluated[2], spec)
    of_x = torch.zeros_like(x) if grad is None else _sorted(grad, spec)
    slope = None if spec.per_feature == 1 else _scale_map(spec).derivative(evaluated[2][1::2])
    of_log_det = 0.0 if grad_log_det is None else grad_log_det
    order = ORDERS[spec.scale_first]

    def gradients(a: Tensor, rows: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """Of y, shift and s, from ``a``, the gradient of x; the walk's formulas."""
        return couple_backward(x[rows], shift[rows], log_s[rows], a, of_log_det, order, True)

    def pull(features: slice, a: Tensor, into: Tensor) -> None:
        _, of_shift, of_log_s = gradients(a, features)
        into[:: spec.per_feature] = of_shift
        if slope is not None:
            torch.mul(of_log_s, slope[features], out=into[1::2])

    found = walk_backward(net, evaluated, of_x, pull)
    of_weights = weights.new_zeros(weights.shape, dtype=x.dtype)
    for into, gradient in zip(
        (*spec.matrices(of_weights), *spec.biases(of_weights)), (*found.matrices, *found.biases), strict=True
    ):
        into.copy_(gradient)
    of_extras = [each for pair in found.extras for each in pair if each is not None]
    return (
        _unsorted(gradients(found.x)[0], spec, y.dtype) if needs[0] else None,
        of_weights.to(weights.dtype) if needs[1] else None,
        None,
        torch.cat(of_extras).t().to(extras.dtype, memory_format=torch.contiguous_format)
        if extras is not None and needs[3]
        else None,
    )


def _fake(
    x: Tensor, weights: Tensor, operands: Tensor, extras: Tensor | None, *constants: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


_masked_autoregressive = define_op(
    "masked_autoregressive(Tensor x, Tensor weights, Tensor operands, Tensor? extras, "
    f"{MASKED_SCHEMA}) -> (Tensor y, Tensor log_det)",
    _fake,
    _differentiable,
    saves="x weights extras y",
    gradients=lambda x, weights, extras, *_: (x.new_empty(x.shape), weights, None, extras),
    plain=_plain,
    plain_backward=_walk_back,
    backward_launch=None,
    is_plain=lambda x, weights, operands, *_: operands.shape[0] == 0,  # packed for no kernel
)


def _check(
    x: Tensor, masks: AutoregressiveMasks, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
    activation: str, scale_map: ScaleMap | None, order: str, extras: Extras | None,
) -> None:  # fmt: skip
    check_tensor("x", x)
    check_kind("masks", masks, AutoregressiveMasks)
    check_choice("activation", activation, tuple(MASKED_ACTIVATIONS))
    check_choice("order", order, ORDERS)
    if x.ndim != 2 or x.shape[1] != masks.features:
        raise ValueError(f"x must be [B, {masks.features}]; got {tuple(x.shape)}")
    if scale_map is not None:
        check_kind("scale_map", scale_map, ScaleMap)
    wanted = 1 if scale_map is None else 2
    if masks.per_feature != wanted:
        raise ValueError(
            f"scale_map {scale_map} needs {wanted} parameters per feature; the masks have {masks.per_feature}"
        )
    for name, given in (("weights", weights), ("biases", biases)):
        if len(given) != len(masks.shapes):
            raise ValueError(f"{name} must have one entry per layer, {len(masks.shapes)}; got {len(given)}")
    for i, (weight, bias, shape) in enumerate(zip(weights, biases, masks.shapes, strict=True)):
        check_tensor(f"weights[{i}]", weight, x)
        if weight.shape != shape:
            raise ValueError(f"weights[{i}] must be {shape}, as its mask; got {tuple(weight.shape)}")
        if bias is not None:
            check_tensor(f"biases[{i}]", bias, x)
            if bias.shape != shape[:1]:
                raise ValueError(f"biases[{i}] must be {shape[:1]}; got {tuple(bias.shape)}")
    if extras is not None:
        _check_extras(x, masks, extras)


def _check_extras(x: Tensor, masks: AutoregressiveMasks, extras: Extras) -> None:
    if len(extras) != len(masks.activated):
        raise ValueError(f"extras must have one pair per hidden layer, {len(masks.activated)}; got {len(extras)}")
    for i, pair in enumerate(extras):
        for name, each in zip(("term", "gate"), pair, strict=True):
            expected = (x.shape[0], masks.shapes[i][0])
            if each is not None:
                check_tensor(f"the {name} of extras[{i}]", each, x)
                if each.shape != expected:
                    raise ValueError(f"the {name} of extras[{i}] must be {expected}; got {tuple(each.shape)}")
