"""One case per op. Images have C (or D) channels and ``side`` x ``side`` pixels; ``side`` 1 is a vector.

Ops are looked up when a case is built, so that ``--compare`` runs the others on a commit that lacks one of them.
"""

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
from .common import BACKWARD, FORWARD, INVERSE, Function, Source, grid, ints, op_case

_SMOOTH = ScaleMap("smooth")
_COUPLING = 8  # operations per transformed element: map 3, exp 1, (x + t) e^s 2, sum into log_det 1, negation 1
_GROUP_NORM = 12  # operations per element: mean and variance 4, normalise 2, two affine maps 4, SiLU 2
_MOST_GATHERED = 2**28  # elements: 1 GiB in fp32
_MOST_MATERIALISED = 2**29  # elements of the B matrices: 2 GiB in fp32, of which a call needs a few
_FP32: Size = {"direction": FORWARD, "dtype": "float32"}
_DTYPES = ("float32", "bfloat16")
_BOTH = (FORWARD, BACKWARD)


def _image(size: Size) -> tuple[int, ...]:
    batch, channels, side = ints(size, "batch", "C" if "C" in size else "D", "side")
    return (batch, channels, side, side) if side != 1 else (batch, channels)


# Affine coupling with its log-determinant: one half of the channels is transformed by given parameters.


def _couple(size: Size) -> Function:
    inverse = size["direction"] == INVERSE
    return lambda x, params: ops.affine_coupling(x, params, _SMOOTH, inverse=inverse, log_det=True)


_VECTOR: Size = {**_FP32, "D": 64, "side": 1, "batch": 4096}
_PICTURE: Size = {**_VECTOR, "D": 12, "side": 32, "batch": 64}
_affine_coupling = op_case(
    "affine_coupling",
    lambda source, size: (source.normal(*_image(size)), source.normal(*_image(size))),
    _couple,
    lambda size, x: _COUPLING * x.numel() // 2,
    tiny=[{**_VECTOR, "direction": BACKWARD, "batch": 8, "D": 6}],
    quick=grid(_VECTOR, batch=(64, 1024, 16384)),
    gpu=[
        *grid(_VECTOR, direction=_BOTH, dtype=_DTYPES, batch=[2**20]),
        {**_PICTURE, "batch": 4096},
    ],
    full=[
        *grid(_VECTOR, direction=_BOTH, batch=(2**6, 2**10, 2**14, 2**18, 2**22)),
        *grid(_PICTURE, direction=(FORWARD, INVERSE)),
    ],
)


# Channel mix: one C x C matrix and a bias over every pixel; alone, and behind a coupling.


def _mixed(source: Source, size: Size) -> tuple[Tensor, ...]:
    channels = int(size["C"])
    return source.normal(*_image(size)), source.normal(channels, channels), source.normal(channels)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The usual way to write a channel mix."""
    return F.conv2d(x, weight[:, :, None, None], bias)


_MIX: Size = {**_FP32, "C": 12, "side": 16, "batch": 64}
_MIX_SIZES: dict[str, Any] = {
    "tiny": [{**_MIX, "direction": BACKWARD, "C": 4, "side": 3, "batch": 2}],
    "quick": [_MIX],
    "gpu": grid({**_MIX, "side": 32, "batch": 2048}, direction=_BOTH, C=(4, 12, 64)),
    "full": [*grid(_MIX, direction=(FORWARD, INVERSE, BACKWARD), C=(4, 12, 48)), *grid(_MIX, batch=(2**8, 2**12))],
}
_NOT_INVERSE: dict[str, Any] = {
    scale: [size for size in sizes if size["direction"] != INVERSE] for scale, sizes in _MIX_SIZES.items()
}
_channel_mix = op_case(
    "channel_mix",
    _mixed,
    lambda size: ops.channel_mix,
    lambda size, x: 2 * int(size["C"]) * x.numel(),
    rivals=lambda size, options: {"conv2d 1x1": _convolve},
    **_NOT_INVERSE,
)


def _coupled_and_mixed(size: Size) -> Function:
    inverse = size["direction"] == INVERSE
    return lambda x, params, weight, bias: ops.coupling_mix(
        x, params, _SMOOTH, weight, bias, inverse=inverse, log_det=True
    )


def _two_ops(size: Size) -> Function:
    couple = _couple(size)

    def both(x: Tensor, params: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        u, log_det = couple(x, params)
        return ops.channel_mix(u, weight, bias), log_det

    return both


_coupling_mix = op_case(
    "coupling_mix",
    lambda source, size: (source.normal(*_image(size)), *_mixed(source, size)),
    _coupled_and_mixed,
    lambda size, x: (2 * int(size["C"]) + _COUPLING // 2) * x.numel(),
    truth=_two_ops,
    rivals=lambda size, options: {"two ops": _two_ops(size)} if options.device.type == "cuda" else {},
    **_MIX_SIZES,
)


# A stack of couplings with MLP conditioners as one op, whose weights are packed at every call. A reference in fp32
# gives no allowance for the modes "tf32" and "high", so only "exact" and "fast" are checked and timed.

_N_LINEAR = 3


def _stack_shapes(size: Size) -> Sequence[tuple[int, ...]]:
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
    lambda source, size: (
        source.normal(*ints(size, "batch", "D")),
        *(source.normal(*shape) / shape[-1] ** 0.5 for shape in _stack_shapes(size)),
    ),
    _stack,
    lambda size, x: 2 * len(x) * sum(s[0] * s[1] for s in _stack_shapes(size) if len(s) == 2),
    tiny=[{**_STACK, "direction": BACKWARD, "D": 6, "depth": 2, "hidden": 8, "batch": 4}],
    quick=[{**_STACK, "batch": 256}],
    gpu=[_STACK, *grid({**_STACK, "batch": 2**16}, direction=_BOTH, precision=("exact", "fast"))],
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


def _masked_shapes(size: Size) -> Sequence[tuple[int, ...]]:
    """The shapes of the weights and biases of all layers, in turn."""
    return [each for shape in _masks(*ints(size, "D", "hidden")).shapes for each in (shape, shape[:1])]


_MASKED: Size = {"direction": INVERSE, "precision": "exact", "D": 16, "hidden": 128, "batch": 1024}
_masked_autoregressive = op_case(
    "masked_autoregressive",
    lambda source, size: (
        source.normal(*ints(size, "batch", "D")),
        *(0.5 * source.normal(*shape) / shape[-1] ** 0.5 for shape in _masked_shapes(size)),
    ),
    _masked,
    lambda size, x: 2 * len(x) * sum(s[0] * s[1] for s in _masked_shapes(size) if len(s) == 2),
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


_SPLINE: Size = {**_FP32, "D": 8, "K": 8, "batch": 4096}
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
        *grid({**_SPLINE, "batch": 2**16}, direction=(FORWARD, INVERSE, BACKWARD), dtype=_DTYPES),
        {**_SPLINE, "batch": 8192},
    ],
    full=grid(_SPLINE, direction=(FORWARD, INVERSE, BACKWARD), batch=(2**6, 2**9, 2**12, 2**16)),
    rivals=_other_splines,
    baseline="nflows",
)


# The low-rank product y = x V U^T with one pair of factors per sample, forward and backward. "materialised" is the
# arithmetic of the reference repository's LoRA layer, A = V U^T [B, N, N], and the baseline where its matrices fit.


def _materialised(x: Tensor, U: Tensor, V: Tensor) -> Tensor:
    return torch.bmm(x[:, None], torch.bmm(V, U.mT))[:, 0]


def _in_order(x: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """The formula in plain torch, without linfast's ops."""
    return torch.einsum("br,bnr->bn", torch.einsum("bn,bnr->br", x, V), U)


def _factors(source: Source, size: Size) -> tuple[Tensor, ...]:
    batch, n, rank = ints(size, "batch", "N", "r")
    return source.normal(batch, n), source.normal(batch, n, rank), source.normal(batch, n, rank)


def _low_rank_rivals(size: Size, options: Options) -> Mapping[str, Function]:
    fits = int(size["batch"]) * int(size["N"]) ** 2 <= _MOST_MATERIALISED
    return {"materialised": _materialised} if fits else {}


_low_rank = op_case(
    "low_rank",
    _factors,
    lambda size: ops.low_rank,
    lambda size, x: 4 * x.numel() * int(size["r"]),
    tiny=[{"N": 12, "r": 2, "batch": 3}],
    quick=[{"N": 512, "r": 8, "batch": 16}],
    gpu=[{"N": 1024, "r": 8, "batch": 256}, {"N": 12288, "r": 8, "batch": 128}],
    full=[*grid({"N": 1024, "r": 8}, batch=(16, 64, 256, 1024)), {"N": 12288, "r": 8, "batch": 2}],
    truth=lambda size: _in_order,
    rivals=_low_rank_rivals,
    baseline="materialised",
)


# Latent product: one A for all rows (K = 0, where every provider calls cuBLAS or MKL), or a bank of K operators
# with an index per row.


def _bank(source: Source, size: Size) -> tuple[Tensor, ...]:
    batch, n, bank = ints(size, "batch", "N", "K")
    z = source.normal(batch, n)
    return (z, source.normal(bank, n, n), source.below(bank, batch)) if bank else (z, source.normal(n, n))


def _gathered(z: Tensor, A: Tensor, index: Tensor) -> Tensor:
    """The usual way to write a bank: a copy [B, N, N] of the operators that rows pick."""
    return torch.bmm(A[index], z[:, :, None])[:, :, 0]


def _latent_rivals(size: Size, options: Options) -> Mapping[str, Function]:
    batch, n, bank = ints(size, "batch", "N", "K")
    return {"gather + bmm": _gathered} if bank and batch * n * n <= _MOST_GATHERED else {}


_ONE: Size = {**_FP32, "K": 0, "N": 64, "batch": 4096}
_BANK: Size = {**_ONE, "K": 8, "batch": 1024}
_BANKS = ((16, 64, 2**20), (8, 64, 8192), (16, 512, 2**16), (4096, 128, 2**14), (0, 64, 2**20))
_latent_matmul = op_case(
    "latent_matmul",
    _bank,
    lambda size: ops.latent_matmul,
    lambda size, z: 2 * z.numel() * int(size["N"]),
    tiny=[{**_BANK, "direction": BACKWARD, "K": 3, "N": 8, "batch": 5}],
    quick=[_ONE, _BANK],
    gpu=[  # those of docs/roofline.md, and a backward
        *({**_BANK, "K": k, "N": n, "batch": batch} for k, n, batch in _BANKS),
        {**_BANK, "direction": BACKWARD, "K": 16, "N": 64, "batch": 2**18},
    ],
    full=[*grid(_ONE, batch=(2**6, 2**10, 2**14)), *grid(_BANK, direction=_BOTH, K=(2, 8, 64))],
    rivals=_latent_rivals,
)


# Image conditioners: a depthwise "same" correlation with one k x k kernel per channel; GroupNorm with the scale and
# shift of a time embedding and SiLU, as a block of a U-Net does them; and the block's second convolution: norm and
# SiLU, 3 x 3 convolution, bias and residual, in channels_last.

_DEPTHWISE: Size = {**_FP32, "C": 8, "side": 32, "k": 5, "batch": 64}
_depthwise_conv = op_case(
    "depthwise_conv",
    lambda source, size: (source.normal(*_image(size)), source.normal(*ints(size, "C", "k", "k"))),
    lambda size: ops.depthwise_conv,
    lambda size, x: 2 * int(size["k"]) ** 2 * x.numel(),
    tiny=[{**_DEPTHWISE, "direction": BACKWARD, "C": 2, "side": 6, "k": 3, "batch": 2}],
    quick=[_DEPTHWISE],
    gpu=grid({**_DEPTHWISE, "C": 64, "batch": 512}, direction=_BOTH, k=(3, 5, 9)),
    full=[*grid(_DEPTHWISE, direction=_BOTH, k=(3, 5, 9, 17)), *grid(_DEPTHWISE, batch=(2**8, 2**10))],
)


def _normed(source: Source, size: Size) -> tuple[Tensor, ...]:
    batch, channels = ints(size, "batch", "C")
    shapes: Sequence[tuple[int, ...]] = (*2 * ((channels,),), *2 * ((batch, channels),))
    return source.normal(*_image(size)), *(source.normal(*shape) for shape in shapes)


_NORM: Size = {**_FP32, "C": 64, "side": 16, "groups": 16, "batch": 32}
_group_norm_silu = op_case(
    "group_norm_silu",
    _normed,
    lambda size: lambda x, *rest: ops.group_norm_silu(x, int(size["groups"]), *rest),
    lambda size, x: _GROUP_NORM * x.numel(),
    tiny=[{**_NORM, "direction": BACKWARD, "C": 4, "side": 4, "groups": 2, "batch": 2}],
    quick=[_NORM],
    gpu=grid({**_NORM, "C": 128, "side": 32, "groups": 32, "batch": 256}, direction=_BOTH, dtype=_DTYPES),
    full=[*grid(_NORM, direction=_BOTH, side=(8, 16, 32)), *grid(_NORM, batch=(2**6, 2**10))],
)


def _convolved(source: Source, size: Size) -> tuple[Tensor, ...]:
    channels, shape = int(size["C"]), _image(size)
    weight = source.normal(channels, channels, 3, 3) / (9 * channels) ** 0.5
    x, weight, residual = (
        t.contiguous(memory_format=torch.channels_last)
        for t in (source.normal(*shape), weight, source.normal(*shape))
    )
    return x, weight, *(source.normal(channels) for _ in range(3)), residual


def _conv2d_fused(size: Size) -> Function:
    def fused(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, residual: Tensor) -> Tensor:
        norm = {"groups": int(size["C"]) // 4, "norm_weight": scale, "norm_bias": shift}
        return ops.conv2d_fused(x, weight, bias, **norm, residual=residual, alpha=0.5**0.5)[0]  # type: ignore[arg-type]

    return fused


_CONV: Size = {**_FP32, "C": 16, "side": 16, "batch": 16}
_fused = op_case(
    "conv2d_fused",
    _convolved,
    _conv2d_fused,
    lambda size, x: 18 * int(size["C"]) * x.numel(),
    tiny=[{**_CONV, "direction": BACKWARD, "C": 4, "side": 3, "batch": 2}],
    quick=[_CONV],
    gpu=grid({**_CONV, "batch": 256}, direction=_BOTH, dtype=_DTYPES, C=(16, 64, 128)),
    full=[*grid(_CONV, direction=_BOTH, side=(8, 16, 32), C=(16, 64)), *grid(_CONV, batch=(2**6, 2**10))],
)

CASES = [
    *(_affine_coupling, _channel_mix, _coupling_mix, _coupling_stack, _masked_autoregressive, _rq_spline),
    *(_low_rank, _latent_matmul, _depthwise_conv, _group_norm_silu, _fused),
]
