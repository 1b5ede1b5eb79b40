"""One case per op that runs whole networks: coupling stacks and masked networks; and for rq_spline."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import linfast as lf
from linfast import ops
from linfast.scale_maps import ScaleMap

from ..harness import Options, Size
from . import common
from .common import BACKWARD, BOTH, DTYPES, FORWARD, FP32, INVERSE, Function, Source, grid, ints, op_case

Shapes = Sequence[tuple[int, ...]]
"""The shapes of the weights and biases of all layers, in turn."""


def _with_weights(source: Source, size: Size, shapes: Shapes, gain: float = 1.0) -> tuple[Tensor, ...]:
    """x [batch, D], and the weights and biases."""
    x = source.normal(*ints(size, "batch", "D"))
    return x, *(gain * source.normal(*shape) / shape[-1] ** 0.5 for shape in shapes)


def _operations(x: Tensor, shapes: Shapes) -> int:
    """Those of the matrix products."""
    return 2 * len(x) * sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)


# A stack of couplings with MLP conditioners as one op, whose weights are packed at every call. A reference in fp32
# gives no allowance for the modes "tf32" and "high", so only "exact" and "fast" are checked and timed.

_N_LINEAR = 3


def _stack_shapes(size: Size) -> Shapes:
    """The shapes of the weights and biases of all layers, in turn."""
    n, depth, hidden = ints(size, "D", "depth", "hidden")
    widths = (n // 2, hidden, hidden, n)
    return depth * [s for i in range(_N_LINEAR) for s in ((widths[i + 1], widths[i]), (widths[i + 1],))]


def _stack(size: Size, precision: str | None = None) -> Function:
    from linfast.ops.stack_weights import CouplingLayer

    options = {"activation": "silu", "scale_map": ScaleMap("smooth", bound=0.5), "log_det": True}
    options |= {"inverse": size["direction"] == INVERSE, "precision": precision or str(size["precision"])}
    step = 2 * _N_LINEAR

    def stack(x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        groups = [tensors[i : i + step] for i in range(0, len(tensors), step)]
        return ops.coupling_stack(x, [CouplingLayer(g[::2], g[1::2]) for g in groups], **options)  # type: ignore[arg-type]

    return stack


_STACK: Size = {"direction": FORWARD, "precision": "exact", "D": 64, "depth": 8, "hidden": 128, "batch": 1024}
_coupling_stack = op_case(
    "coupling_stack",
    lambda source, size: _with_weights(source, size, _stack_shapes(size)),
    _stack,
    lambda size, x: _operations(x, _stack_shapes(size)),
    tiny=[{**_STACK, "direction": BACKWARD, "D": 6, "depth": 2, "hidden": 8, "batch": 4}],
    quick=[{**_STACK, "batch": 256}],
    gpu=[_STACK, *grid({**_STACK, "batch": 2**16}, direction=BOTH, precision=("exact", "fast"))],
    full=grid(_STACK, direction=(FORWARD, INVERSE, BACKWARD), batch=(2**6, 2**10, 2**14)),
    truth=lambda size: _stack(size, "exact"),
    reference=_stack,
)


# A masked autoregressive transform, affine, with two hidden layers; its weights are packed at every call. "D
# passes" is the usual inverse, which evaluates the network once per feature.


@functools.cache
def _masks(features: int, hidden: int) -> Any:
    """Degrees 1 .. D, and 1 .. D - 1 in turn for hidden units, as in nflows."""
    from linfast.ops import AutoregressiveMasks

    of_features, units = torch.arange(1, features + 1), torch.arange(hidden) % max(features - 1, 1) + 1
    outer = of_features.repeat_interleave(2)[:, None] > units
    return AutoregressiveMasks([units[:, None] >= of_features, units[:, None] >= units, outer])


def _masked(size: Size) -> Function:
    options: dict[str, Any] = {"activation": "relu", "scale_map": ScaleMap("sigmoid"), "log_det": True}
    options |= {"inverse": size["direction"] == INVERSE, "precision": str(size["precision"])}
    masks = _masks(*ints(size, "D", "hidden"))

    def masked(x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        return ops.masked_autoregressive(x, masks, tensors[::2], tensors[1::2], **options)

    return masked


def _passes(size: Size) -> Function:
    """The formula in plain torch, without linfast's ops."""
    masks, inverse = _masks(*ints(size, "D", "hidden")), size["direction"] == INVERSE

    def passes(x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        used, y = masks.masks(x.device, x.dtype), torch.zeros_like(x) if inverse else x
        for _ in range(x.shape[1] if inverse else 1):
            read = y
            for i, mask in enumerate(used):
                read = F.linear(F.relu(read) if i else read, tensors[2 * i] * mask, tensors[2 * i + 1])
            shift, log_s = read[:, 0::2], ScaleMap("sigmoid").log_scale(read[:, 1::2])
            y = (x - shift) * (-log_s).exp() if inverse else x * log_s.exp() + shift
        return y, -log_s.sum(1) if inverse else log_s.sum(1)

    return passes


def _masked_shapes(size: Size) -> Shapes:
    """The shapes of the weights and biases of all layers, in turn."""
    return [each for shape in _masks(*ints(size, "D", "hidden")).shapes for each in (shape, shape[:1])]


_MASKED: Size = {"direction": INVERSE, "precision": "exact", "D": 16, "hidden": 128, "batch": 1024}
_masked_autoregressive = op_case(
    "masked_autoregressive",
    lambda source, size: _with_weights(source, size, _masked_shapes(size), 0.5),
    _masked,
    lambda size, x: _operations(x, _masked_shapes(size)),
    tiny=[{**_MASKED, "D": 4, "hidden": 8, "batch": 4}],
    quick=[_MASKED],
    gpu=grid({**_MASKED, "batch": 2**20}, direction=(FORWARD, INVERSE), precision=("exact", "fast")),
    full=grid(_MASKED, direction=(FORWARD, INVERSE), batch=(2**6, 2**10, 2**14)),
    truth=_passes,
    rivals=lambda size, options: {"D passes": _passes(size)} if size["direction"] == INVERSE else {},
    baseline="D passes",
)


# The rational-quadratic spline with linear tails, by parameters [B, D, 3 K - 1] as a network returns them. nflows'
# function takes views of them. On a CPU "linfast" is the code in planes, and "eager" the reference.

_SPLINE_BIN, _SPLINE_FOUND = 22, 120  # operations per bin, and for the bin that a value is in


def _spline(size: Size) -> Function:
    from linfast.kernels.spline_spec import Spline

    from linfast.ops.rq_spline import spline_transform

    spline, inverse = Spline(int(size["K"])), size["direction"] == INVERSE
    return lambda x, params: spline_transform(x, params, spline, inverse, True)


def _other_splines(size: Size, options: Options) -> Mapping[str, Function]:
    (K,), inverse, found = ints(size, "K"), size["direction"] == INVERSE, {}

    def in_planes(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        with lf.backend("auto"):
            return _spline(size)(x, params)

    def of_nflows(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline as spline

        y, logs = spline(x, *params.split((K, K, K - 1), -1), inverse=inverse, tail_bound=3.0)
        return y, logs.sum(1)

    if options.device.type == "cpu" and not (options.kernels or common.has_kernels(options.device)):
        found["linfast"] = in_planes
    if importlib.util.find_spec("nflows") is not None:
        found["nflows"] = of_nflows
    return found


_SPLINE: Size = {**FP32, "D": 8, "K": 8, "batch": 4096}
_rq_spline = op_case(
    "rq_spline",
    lambda source, size: (
        source.normal(*ints(size, "batch", "D")),
        source.normal(*ints(size, "batch", "D"), 3 * int(size["K"]) - 1),
    ),
    _spline,
    lambda size, x: (_SPLINE_BIN * int(size["K"]) + _SPLINE_FOUND) * x.numel(),
    tiny=[{**_SPLINE, "direction": BACKWARD, "D": 2, "K": 3, "batch": 5}],
    quick=[_SPLINE],
    gpu=[
        *grid({**_SPLINE, "batch": 2**16}, direction=(FORWARD, INVERSE, BACKWARD), dtype=DTYPES),
        {**_SPLINE, "batch": 8192},
    ],
    full=grid(_SPLINE, direction=(FORWARD, INVERSE, BACKWARD), batch=(2**6, 2**9, 2**12, 2**16)),
    rivals=_other_splines,
    baseline="nflows",
)

CASES = [_coupling_stack, _masked_autoregressive, _rq_spline]
