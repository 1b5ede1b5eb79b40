"""The monotonic rational-quadratic spline of neural spline flows, for every value of x by parameters of its own.

K bins divide an interval [l, r] of length L = r - l, in x and in y. Raw parameters u (widths), v (heights), w
(derivatives at the knots) of one value x:

    W = L (m_w + (1 - m_w K) softmax(u / T))      x_k = l + W_1 + .. + W_k      H and y_k likewise, from v
    d = m_d + softplus(w + o)                     1 at both ends with tails "linear", equal there with "circular"

In bin k, with t = (x - x_k) / W, s = H / W, e = d_k + d_{k+1} - 2 s and q = t (1 - t):

    y = y_k + H (s t^2 + d_k q) / (s + e q)
    log dy/dx = log(s^2 (d_{k+1} t^2 + 2 s q + d_k (1 - t)^2) / (s + e q)^2)

where o is 0, or the value with which w = 0 gives d = 1 (flows.splines). Outside the interval y = x. The inverse,
from p = (y - y_k) / H, solves a quadratic equation in t:

    m = d_k (1 - p) - d_{k+1} p,  v = 4 s^2 p (1 - p),  r = sqrt(m^2 + v),  t = 2 s p / (2 s p + m + r)

in which m + r = v / (r - m) where m < 0, so that nothing cancels and no root is of a negative number.

With ``parameters="soft_clip"`` u, v and w are first bounded smoothly, C(u; c) = u / (1 + |u| / c): widths and
heights with c = log(1 / m_d) / 2, and d = exp(C(w; log(1 / m_d))).

Per value the op reads x and P parameters, P = 2 K + K - 1, K or K + 1, and writes y: about 4 (P + 2) bytes in fp32.
Only x and the parameters are saved for the backward, which computes the bins again.

| runs      | where                                                                                   |
|-----------|-----------------------------------------------------------------------------------------|
| plain     | a CPU: bins are planes, and rows are cut to fit the cache (``spline_plain``)            |
| kernel    | a GPU: each direction, and the backward of both, in one launch (kernels/rq_spline.py)   |
| reference | ``backend("reference")``, float64 on a GPU                                              |

Sources: Neural Spline Flows (arXiv 1906.04032); circular tails: 2002.02428; soft-clipped parameters: zuko.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, check_count, check_flag, check_kind, check_number, check_tensor
from ..dispatch import cat, chosen_backend, is_forward_mode, records_gradients, uses_triton, without_autocast
from ..kernels.spline_spec import SPLINE_SCHEMA, TAILS, Spline
from .register import define_op
from .spline_plain import plain, wide_type
from .spline_plain_backward import plain_backward
from .spline_reference import rq_spline_reference

PARAMETERS = ("softmax", "soft_clip")


def rq_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    *,
    tails: str = "linear",
    interval: tuple[float, float] = (-3.0, 3.0),
    min_width: float = 1e-3,
    min_height: float = 1e-3,
    min_derivative: float = 1e-3,
    temperature: float = 1.0,
    parameters: str = "softmax",
    inverse: bool = False,
    log_det: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(y, log|det| or None) of the spline that ``linfast.ops.rq_spline`` defines, or of its inverse.

    Args:
        x: [B, ...], any strides.
        widths, heights: [B, ..., K], raw; the shape of x and the bins. The first dimension may be 1: the same
            parameters for all samples.
        derivatives: [B, ..., K - 1], raw, at the inner knots. With tails "circular" K, the first one at both ends;
            with tails "bounded" K + 1.
        tails: "linear", "circular" or "bounded". In every case y = x outside the interval, in fp32 or wider.
        interval: (l, r), which the spline maps to itself, from -1e6 to 1e6. Positions are counted from l: values
            that differ by less than eps max(|l|, |r|) are the same.
        min_width, min_height: least size of a bin as a fraction of the interval, at most 1 / K.
        min_derivative: least derivative at a knot.
        temperature: T, at least 1e-6, which divides the raw widths and heights; nflows takes the root of a
            network's width.
        parameters: "softmax", or "soft_clip" as in zuko, which has no least sizes and no temperature.
        inverse: apply the inverse.
        log_det: also return log|det| of the map that is applied, [B], in fp32 or wider.

    y has x's dtype and is contiguous; all arithmetic is fp32 or wider. From finite x and raw values within +-1e8 no
    result and no gradient is NaN. On a CPU a NaN in x is a value outside: y has it, all else is finite.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an option is unknown, out of its range, or not used with these parameters; a shape does not fit.
    """
    check_tensor("x", x)
    if x.ndim < 1:
        raise ValueError("x must be [B, ...]; got ()")
    for name, given in (("widths", widths), ("heights", heights), ("derivatives", derivatives)):
        check_tensor(name, given, x)
        if given.ndim != x.ndim + 1 or given.shape[1:-1] != x.shape[1:] or given.shape[0] not in (1, x.shape[0]):
            shape = ", ".join([f"{x.shape[0]} or 1", *map(str, x.shape[1:]), _LAST[name]])
            raise ValueError(f"{name} must be [{shape}] for x {tuple(x.shape)}; got {tuple(given.shape)}")
    if widths.shape[-1] < 2:
        raise ValueError(f"widths must have at least 2 values in their last dimension; got {tuple(widths.shape)}")
    check_flag("inverse", inverse)
    check_flag("log_det", log_det)
    spline = spline_of(
        widths.shape[-1], tails=tails, interval=interval, min_width=min_width, min_height=min_height,
        min_derivative=min_derivative, temperature=temperature, parameters=parameters,
    )  # fmt: skip
    for name, given, wanted in (
        ("heights", heights, spline.bins),
        ("derivatives", derivatives, spline.derivatives),
    ):
        if given.shape[-1] != wanted:
            got = f"{given.shape[-1]} for {spline.bins} widths and tails={tails!r}"
            raise ValueError(f"{name} must have {wanted} values in their last dimension; got {got}")
    parts: list[Tensor] = [widths, heights, derivatives]
    if not widths.shape[0] == heights.shape[0] == derivatives.shape[0]:
        parts = [part.expand(x.shape[0], *part.shape[1:]) for part in parts]
    if not _runs_planes(x, *parts):
        return spline_transform(x, cat(parts, -1), spline, inverse, log_det)
    y, total = _rq_spline_planes(_flat(x), *[_flat(part, 2) for part in parts], *spline, inverse, log_det)
    return _like(y, x), total if log_det else None


def spline_of(
    bins: int, *, tails: str, interval: tuple[float, float], min_width: float, min_height: float,
    min_derivative: float, temperature: float = 1.0, parameters: str = "softmax", offset: float = 0.0,
) -> Spline:  # fmt: skip
    """The checked options as a Spline; ``offset`` is added to raw derivatives."""
    check_choice("tails", tails, TAILS)
    check_choice("parameters", parameters, PARAMETERS)
    bins = check_count("bins", bins, least=2)
    check_kind("interval", interval, (tuple, list), "a pair of numbers")
    if len(interval) != 2:
        raise ValueError(f"interval must be (l, r); got {interval}")
    low, high = (check_number("each of interval", end, -MOST_BOUND, MOST_BOUND) for end in interval)
    if not low < high:
        raise ValueError(f"interval must be (l, r) with l < r; got {interval}")
    clips = parameters == "soft_clip"
    sizes = {"min_width": min_width, "min_height": min_height, "temperature": temperature}
    for name, value in sizes.items() if clips else ():
        usual = Spline._field_defaults[name]
        if check_number(name, value) != usual:
            raise ValueError(f"{name} must be {usual} for parameters='soft_clip', which has none; got {value!r}")
    least = {
        name: 0.0 if clips else check_number(name, value, least=_LEAST, most=1.0 / bins)
        for name, value in (("min_width", min_width), ("min_height", min_height))
    }
    check_number("min_derivative", min_derivative, least=_LEAST, most=1.0, below=True)
    check_number("temperature", temperature, least=_LEAST)
    return Spline(
        bins,
        low,
        high,
        *least.values(),
        float(min_derivative),
        float(temperature),
        TAILS.index(tails),
        clips,
        offset,
    )


_LEAST = 1e-6  # smaller bins or slopes make ratios whose squares overflow in fp32
MOST_BOUND = 1e6  # of an interval: beyond it fp32 hardly resolves x
_LAST = {"widths": "K", "heights": "K", "derivatives": "K - 1 to K + 1"}


def spline_transform(
    x: Tensor, params: Tensor, spline: Spline, inverse: bool, log_det: bool
) -> tuple[Tensor, Tensor | None]:
    """(y, log|det| or None) of x [B, ...]; params [B or 1, ..., P] are widths, heights and derivatives."""
    flat, params, constants = _flat(x), _flat(params, 2), (*spline, inverse, log_det)
    if uses_triton(flat, params):
        y, total = _rq_spline(flat, params, *constants)
    elif _runs_planes(flat, params):
        y, total = _rq_spline_planes(flat, params, None, None, *constants)
    else:
        y, total = without_autocast(x.device.type, rq_spline_reference, flat, params, *constants)
    return _like(y, x), total if log_det else None


def spline_backward(
    x: Tensor, params: Tensor, grad: Tensor, grad_log_det: Tensor | None, spline: Spline, inverse: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x [B, ...] and params [B, ..., P] of ``spline_transform``, from those of y and log|det|."""
    flat, of_flat, tensors = _flat(x), _flat(grad), _flat(params, 2)
    constants = (*spline, inverse, grad_log_det is not None)
    if uses_triton(flat, tensors):
        backward = torch.ops.linfast.rq_spline_backward
        found = backward(flat, tensors, of_flat, grad_log_det, *constants, [True, True])
    else:
        needs = [True, True, False, False]
        # Elsewhere by formula too: a derivative of the reference does not work in a TorchDispatchMode.
        run = torch.ops.linfast.rq_spline_planes_backward if _runs_planes(flat, tensors) else plain_backward
        given = (flat, tensors, None, None, of_flat, grad_log_det, *constants, needs)
        found = without_autocast(x.device.type, run, *given)
    return found[0].reshape(x.shape), found[1].reshape(params.shape)


def _flat(t: Tensor, kept: int = 1) -> Tensor:
    """[B, ...] as [B, D], or [B, ..., n] as [B, D, n] with ``kept`` 2."""
    if t.ndim == kept + 1:
        return t
    return t.reshape(t.shape[0], math.prod(t.shape[1 : t.ndim - kept + 1]), *t.shape[t.ndim - kept + 1 :])


def _like(y: Tensor, x: Tensor) -> Tensor:
    return y if x.ndim == 2 else y.reshape(x.shape)


def _runs_planes(x: Tensor, *given: Tensor) -> bool:
    """Whether the code for a CPU runs. It has no forward-mode derivative, which the reference has."""
    if is_forward_mode():
        return False
    return x.is_cpu and chosen_backend() != "reference" and not uses_triton(x, *given)


def _fake(x: Tensor, params: Tensor, *constants: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0] if constants[-1] else 0, dtype=wide_type(x, params))


def _gradients(x: Tensor, params: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Laid out as the backward returns them: in planes of bins where they are planes in params."""
    if params.stride(0) == 1:
        return x.new_empty(x.shape), _new_planes(params)
    return x.new_empty(x.shape), params.new_empty(params.shape)


def _new_planes(params: Tensor) -> Tensor:
    """Empty, like params [B, D, P], with rows innermost."""
    return params.new_empty(*params.shape[1:], params.shape[0]).permute(2, 0, 1)


_rq_spline = define_op(
    f"rq_spline(Tensor x, Tensor params, {SPLINE_SCHEMA}, bool inverse, bool log_det)"
    " -> (Tensor y, Tensor log_det)",
    _fake,
    rq_spline_reference,
    saves="x params",
    gradients=_gradients,
)


def _planes_reference(
    x: Tensor, params: Tensor, heights: Tensor | None, derivatives: Tensor | None, *constants: Any
) -> tuple[Tensor, Tensor | None]:
    params = params if heights is None or derivatives is None else torch.cat((params, heights, derivatives), -1)
    return rq_spline_reference(x, params, *constants)


def _plain(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor | None]:
    if records_gradients(x, *arguments[:3]):
        return _planes_reference(x, *arguments)  # torch.export has kept the op without its backward
    return plain(x, *arguments)


def _fake_planes(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    total = x.new_empty(x.shape[0] if arguments[-1] else 0, dtype=wide_type(x, *arguments[:3]))
    return x.new_empty(x.shape), total


def _gradients_in_planes(x: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    return x.new_empty(x.shape), *(None if each is None else _new_planes(each) for each in arguments[:3])


# On a CPU: params as above, or raw widths in its place, with heights and derivatives.
_rq_spline_planes = define_op(
    "rq_spline_planes(Tensor x, Tensor params, Tensor? heights, Tensor? derivatives, "
    f"{SPLINE_SCHEMA}, bool inverse, bool log_det) -> (Tensor y, Tensor log_det)",
    _fake_planes,
    _planes_reference,
    saves="x params heights derivatives",
    gradients=_gradients_in_planes,
    plain=_plain,
    plain_backward=plain_backward,
    backward_launch=None,
    is_plain=lambda *_: True,
)
