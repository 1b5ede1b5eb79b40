"""A masked autoregressive transform, affine, additive or a spline, by the parameters that a masked network gives.

    y_i = x_i e^{s_i} + t_i   or   (x_i + t_i) e^{s_i}     (t_i, r_i) = net_i(x_1 .. x_{i-1}), s_i = scale_map(r_i)
    log|det| = sum_i s_i                                   inverse: x_1, then x_2 from x_1, ..

in any order of the features; or y_i = S(x_i; net_i(x_1 .. x_{i-1})), S the spline of ``linfast.ops.rq_spline``.
Sources: MADE (arXiv 1502.03509), masked autoregressive flows (1705.07057).

| runs      | where                                                                                       |
|-----------|---------------------------------------------------------------------------------------------|
| reference | a CPU, float64: forward, the network in plain torch; inverse, a walk over the degrees that  |
|           | uses every weight once (linfast.ops.masked_walk)                                            |
| kernel    | a GPU: either direction in one launch, linfast.kernels.masked_autoregressive; a spline      |
|           | runs as above, with one launch for the splines of all features, or of one degree            |

The op saves x, y and the weights for its backward, which evaluates the network once. The gradient of the inverse is
a walk as well. Second derivatives of the inverse differentiate D evaluations of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_choice, check_flag, check_kind, check_tensor
from ..dispatch import uses_triton, without_autocast
from ..kernels.masked_spec import MASKED_SCHEMA
from ..kernels.spline_spec import Spline
from ..kernels.stack_configs import mode_on, target_of
from ..kernels.stack_spec import N_PARTS
from ..precision import half_dtype, resolve_precision
from ..scale_maps import ScaleMap
from .affine_coupling import ORDERS
from .autoregressive_masks import AutoregressiveMasks
from .masked_plain import MASKED_ACTIVATIONS, NUMBERS, differentiable, plain, plain_backward
from .register import RawOp, define_op
from .rq_spline import spline_transform
from .stack_weights import rounded

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
    masked: bool = False,
    spline: Spline | None = None,
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
        masked: whether the weights are zero wherever the masks are, so that they need not be multiplied by them.
        spline: a linfast.kernels.spline_spec.Spline in place of scale and shift, where ``scale_map`` is None.

    The state, shift, scale and sums are fp32 or wider; y has x's dtype.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an option is unknown, or a shape does not fit.
    """
    _check(x, masks, weights, biases, activation, scale_map, order, extras, spline)
    check_flag("inverse", inverse)
    check_flag("log_det", log_det)
    check_flag("masked", masked)
    mode = mode_on(target_of(x), resolve_precision(x, precision))
    given = extras or ((None, None),) * len(masks.activated)
    if not inverse and (spline is not None or not uses_triton(x, *weights)):
        # Outside autocast, as the inverse: both read the same network.
        options = (MASKED_ACTIVATIONS[activation], scale_map, order, given, log_det, masked, spline)
        return without_autocast(x.device.type, _forward, x, masks, weights, biases, *options)
    weight = masks.pack(weights, biases) if packed is None else packed
    columns, kinds = masks.pack_extras(given)
    kind, bound, floor = (0, 1.0, 0.0) if scale_map is None else (scale_map.constexpr_id, *scale_map.constants)
    numbers = () if spline is None else tuple(map(float, spline))
    constants = (NUMBERS[activation], kind, bound, floor, order == "scale_first", inverse, mode, numbers)
    spec = masks.spec(kinds, *constants)
    check_tensor("packed", weight, x)
    if weight.shape != (spec.total,):
        raise ValueError(f"packed must be [{spec.total}], from masks.pack; got {tuple(weight.shape)}")
    operands = weight.new_empty(0)
    if spline is None and uses_triton(x, weight):
        operands = _operands(weight.detach()[: spec.n_matrices], mode, half_dtype(x))
    y, total = _masked_autoregressive(x, weight, operands, columns, *spec.constants)
    return y, total if log_det else None


def _forward(
    x: Tensor, masks: AutoregressiveMasks, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
    activate: Callable[[Tensor], Tensor], scale_map: ScaleMap | None, order: str, extras: Extras, log_det: bool,
    masked: bool, spline: Spline | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The transform after the network in plain, differentiable torch."""
    dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, weights[0].dtype))
    params = masked_network(x, masks, weights, biases, activate, extras, masked)
    params = params.unflatten(1, (masks.features, masks.per_feature))
    if spline is not None:
        y, total = spline_transform(x, params, spline, False, log_det)
        return y.to(dtype), total
    params = params.to(torch.promote_types(params.dtype, torch.float32))
    shift = params[..., int(masks.raw_first and scale_map is not None)]
    if scale_map is None:
        return (x + shift).to(dtype), shift.new_zeros(x.shape[0]) if log_det else None
    raw = params[..., int(not masks.raw_first)]
    scale = scale_map.scale_function(raw)
    y = torch.addcmul(shift, x, scale) if order == "scale_first" else (x + shift) * scale
    return y.to(dtype), scale_map.log_scale_function(raw).sum(1) if log_det else None


def masked_network(
    x: Tensor, masks: AutoregressiveMasks, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
    activate: Callable[[Tensor], Tensor], extras: Extras, masked: bool = False,
) -> Tensor:  # fmt: skip
    """The parameters [B, P D] in plain, differentiable torch; ``masked``: the weights have been masked before."""
    used = weights if masked else masks.apply(weights)
    values, read = [x], x
    for i, (weight, bias) in enumerate(zip(used, biases, strict=True)):
        value = F.linear(read, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        if i == len(used) - 1:
            break
        term, gate = extras[i]
        value = value if term is None else value + term
        value = value if gate is None else value * gate
        value = value + values[masks.adds[i]] if masks.adds[i] else value
        values.append(value)
        read = activate(value) if masks.activated[i] else value
    return value


def _fake(
    x: Tensor, weights: Tensor, operands: Tensor, extras: Tensor | None, *constants: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


def _fake_operands(matrices: Tensor, precision: str, dtype: torch.dtype) -> Tensor:
    dtype = torch.float32 if precision == "tf32" else dtype
    return matrices.new_empty(N_PARTS[precision], matrices.shape[0], dtype=dtype)


# An op, because Inductor does not round intermediate values to half precision: the second part would be 0.
_operands = RawOp(
    "masked_operands",
    "(Tensor matrices, str precision, ScalarType dtype) -> Tensor",
    _fake_operands,
    lambda matrices, precision, dtype: rounded(matrices.float(), precision, dtype),
    None,
).define()


_masked_autoregressive = define_op(
    "masked_autoregressive(Tensor x, Tensor weights, Tensor operands, Tensor? extras, "
    f"{MASKED_SCHEMA}) -> (Tensor y, Tensor log_det)",
    _fake,
    differentiable,
    saves="x weights extras y",
    plain=plain,
    plain_backward=plain_backward,
    backward_launch=None,
    is_plain=lambda x, weights, operands, *_: operands.shape[0] == 0,  # packed for no kernel
)


def _check(
    x: Tensor, masks: AutoregressiveMasks, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
    activation: str, scale_map: ScaleMap | None, order: str, extras: Extras | None, spline: Spline | None,
) -> None:  # fmt: skip
    check_tensor("x", x)
    check_kind("masks", masks, AutoregressiveMasks)
    check_choice("activation", activation, tuple(MASKED_ACTIVATIONS))
    check_choice("order", order, ORDERS)
    if x.ndim != 2 or x.shape[1] != masks.features:
        raise ValueError(f"x must be [B, {masks.features}]; got {tuple(x.shape)}")
    if scale_map is not None:
        check_kind("scale_map", scale_map, ScaleMap)
    wanted, what = 1 if scale_map is None else 2, f"scale_map {scale_map}"
    if spline is not None:
        check_kind("spline", spline, Spline)
        if scale_map is not None:
            raise ValueError(f"scale_map must be None where spline is given; got {scale_map}")
        wanted, what = spline.per_feature, f"a spline of {spline.bins} bins"
    if masks.per_feature != wanted:
        raise ValueError(f"{what} needs {wanted} parameters per feature; the masks have {masks.per_feature}")
    for name, given in (("weights", weights), ("biases", biases)):
        check_kind(name, given, (list, tuple), "a list of tensors")
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
    check_kind("extras", extras, (list, tuple), "a list of pairs")
    if len(extras) != len(masks.activated):
        raise ValueError(f"extras must have one pair per hidden layer, {len(masks.activated)}; got {len(extras)}")
    for i, pair in enumerate(extras):
        check_kind(f"extras[{i}]", pair, (list, tuple), "a pair")
        if len(pair) != 2:
            raise ValueError(f"extras[{i}] must be (term, gate); got {len(pair)} entries")
        for name, each in zip(("term", "gate"), pair, strict=True):
            expected = (x.shape[0], masks.shapes[i][0])
            if each is not None:
                check_tensor(f"the {name} of extras[{i}]", each, x)
                if each.shape != expected:
                    got = f"got {tuple(each.shape)} for x {tuple(x.shape)}"
                    raise ValueError(f"the {name} of extras[{i}] must be {expected}; {got}")
