"""One case per op of couplings and latents.

Images have C (or D) channels and ``side`` x ``side`` pixels; ``side`` 1 is a vector.
Ops are looked up when a case is built, so that ``--compare`` runs the others on a commit that lacks one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from linfast import ops
from linfast.scale_maps import ScaleMap

from ..harness import Options, Size
from .common import BACKWARD, FORWARD, INVERSE, Function, Source, op_case, sweep

__all__ = ["CASES", "DTYPES", "FP32", "image", "ints", "powers"]

_SMOOTH = ScaleMap("smooth")
_COUPLING = 8  # operations per moved element: the map 3, exp 1, (x + t) e^s 2, its sum into log_det 1, a negation 1
_MOST_GATHERED = 2**28  # elements: 1 GiB in fp32
_MOST_MATERIALISED = 2**29  # elements of the B matrices: 2 GiB in fp32, a few times over
FP32: Size = {"direction": FORWARD, "dtype": "float32"}
DTYPES = ("float32", "bfloat16")


def ints(size: Size, *keys: str) -> tuple[int, ...]:
    return tuple(int(size[key]) for key in keys)


def image(size: Size) -> tuple[int, ...]:
    batch, channels, side = ints(size, "batch", "C" if "C" in size else "D", "side")
    return (batch, channels, side, side) if side != 1 else (batch, channels)


def powers(low: int, high: int, step: int) -> list[int]:
    return [2**k for k in range(low, high, step)]


# Affine coupling with its log-determinant: one half of the channels moves by given parameters.


def _couple(size: Size) -> Function:
    inverse = size["direction"] == INVERSE
    return lambda x, params: ops.affine_coupling(x, params, _SMOOTH, inverse=inverse, log_det=True)


_VECTOR: Size = {**FP32, "D": 64, "side": 1, "batch": 4096}
_VECTOR_BOTH: Size = {**_VECTOR, "direction": BACKWARD}
_PICTURE: Size = {**_VECTOR, "D": 12, "side": 32, "batch": 64}
_affine_coupling = op_case(
    "affine_coupling",
    lambda source, size: (source.normal(*image(size)), source.normal(*image(size))),
    _couple,
    lambda size, x: _COUPLING * x.numel() // 2,
    {
        "tiny": [{**_VECTOR_BOTH, "batch": 8, "D": 6}],
        "quick": sweep(_VECTOR, batch=(64, 1024, 16384)),
        "gpu": [
            *({**base, "dtype": dtype, "batch": 2**20} for base in (_VECTOR, _VECTOR_BOTH) for dtype in DTYPES),
            {**_PICTURE, "batch": 4096},
        ],
        "full": [
            *sweep(_VECTOR, batch=powers(6, 23, 2), D=(8, 512)),
            *sweep(_VECTOR_BOTH, batch=powers(6, 23, 4)),
            *sweep(_PICTURE, side=(8, 16, 32, 64, 128), direction=(INVERSE,)),
        ],
    },
)


# Channel mix: one C x C matrix and a bias over every pixel; alone, and behind a coupling.


def _mixed(source: Source, size: Size) -> tuple[Tensor, ...]:
    channels = int(size["C"])
    return source.normal(*image(size)), source.normal(channels, channels), source.normal(channels)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The usual way to write a channel mix."""
    return F.conv2d(x, weight[:, :, None, None], bias)


_MIX: Size = {**FP32, "C": 12, "side": 16, "batch": 64}
_MIX_BOTH: Size = {**_MIX, "direction": BACKWARD}
_MIX_GPU: Size = {**_MIX, "side": 32, "batch": 2048}
_channel_mix = op_case(
    "channel_mix",
    _mixed,
    lambda size: ops.channel_mix,
    lambda size, x: 2 * int(size["C"]) * x.numel(),
    {
        "tiny": [{**_MIX_BOTH, "C": 3, "side": 4, "batch": 2}],
        "quick": [_MIX],
        "gpu": [*sweep(_MIX_GPU, C=(4, 12, 64)), *sweep({**_MIX_GPU, "direction": BACKWARD}, C=(12, 64))],
        "full": [
            *sweep(_MIX, batch=powers(6, 17, 2), C=(4, 12, 48, 96, 192), side=(8, 16, 32, 64)),
            *sweep(_MIX_BOTH, C=(4, 12, 48, 192)),
        ],
    },
    rivals=lambda size, options: {"conv2d 1x1": _convolve},
)


def _two_ops(size: Size) -> Function:
    couple = _couple(size)

    def both(x: Tensor, params: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        u, log_det = couple(x, params)
        return ops.channel_mix(u, weight, bias), log_det

    return both


_coupling_mix = op_case(
    "coupling_mix",
    lambda source, size: (source.normal(*image(size)), *_mixed(source, size)),
    lambda size: (
        lambda x, params, weight, bias: ops.coupling_mix(
            x, params, _SMOOTH, weight, bias, inverse=size["direction"] == INVERSE, log_det=True
        )
    ),
    lambda size, x: (2 * int(size["C"]) + _COUPLING // 2) * x.numel(),
    {
        "tiny": [{**_MIX_BOTH, "C": 4, "side": 3, "batch": 2}],
        "quick": [_MIX],
        "gpu": [*sweep(_MIX_GPU, C=(4, 12, 64)), *sweep({**_MIX_GPU, "direction": BACKWARD}, C=(12, 64))],
        "full": [
            *sweep(_MIX, batch=powers(6, 17, 2), C=(4, 12, 48, 96), side=(8, 16, 32, 64)),
            {**_MIX, "direction": INVERSE},
            *sweep(_MIX_BOTH, C=(4, 12, 48, 96)),
        ],
    },
    truth=_two_ops,
    rivals=lambda size, options: {"two ops": _two_ops(size)} if options.device.type == "cuda" else {},
)


# A stack of couplings with MLP conditioners as one op, whose weights are packed at every call. What a reference in
# fp32 allows says nothing of the modes "tf32" and "high", so that only the other two are checked and timed.

_N_LINEAR = 3


def _stack_shapes(size: Size) -> Sequence[tuple[int, ...]]:
    """Of the weights and biases of all layers, in turn."""
    n, depth, hidden = ints(size, "D", "depth", "hidden")
    widths = (n // 2, hidden, hidden, n)
    return depth * [s for i in range(_N_LINEAR) for s in ((widths[i + 1], widths[i]), (widths[i + 1],))]


def _stack(size: Size, precision: str | None = None) -> Function:
    from linfast.ops.stack_weights import CouplingLayer

    def stack(x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        step = 2 * _N_LINEAR
        layers = [
            CouplingLayer(tensors[i : i + step : 2], tensors[i + 1 : i + step : 2])
            for i in range(0, len(tensors), step)
        ]
        return ops.coupling_stack(
            x,
            layers,
            activation="silu",
            scale_map=ScaleMap("smooth", bound=0.5),
            inverse=size["direction"] == INVERSE,
            log_det=True,
            precision=precision or str(size["precision"]),
        )

    return stack


_STACK: Size = {"direction": FORWARD, "precision": "exact", "D": 64, "depth": 8, "hidden": 128, "batch": 1024}
_STACK_GPU = [
    {**_STACK, "direction": direction, "precision": precision, "batch": 2**16}
    for direction in (FORWARD, BACKWARD)
    for precision in ("exact", "fast")
]
_coupling_stack = op_case(
    "coupling_stack",
    lambda source, size: (
        source.normal(*ints(size, "batch", "D")),
        *(source.normal(*shape) / shape[-1] ** 0.5 for shape in _stack_shapes(size)),
    ),
    _stack,
    lambda size, x: 2 * len(x) * sum(s[0] * s[1] for s in _stack_shapes(size) if len(s) == 2),
    {
        "tiny": [{**_STACK, "direction": BACKWARD, "D": 6, "depth": 2, "hidden": 8, "batch": 4}],
        "quick": [{**_STACK, "batch": 256}],
        "gpu": [_STACK, *_STACK_GPU],
        "full": [
            size
            for base in [*_STACK_GPU, {**_STACK, "direction": INVERSE}]
            for size in sweep(base, batch=powers(6, 21, 2), hidden=(32, 64, 128, 256), D=(8, 64, 128))
        ],
    },
    truth=lambda size: _stack(size, "exact"),
    reference=_stack,
)


# The low-rank product y = x V U^T with one pair of factors per sample, forward and backward. "materialised" is the
# arithmetic of the reference repository's LoRA layer, A = V U^T [B, N, N], and the baseline where its matrices fit.


def _materialised(x: Tensor, U: Tensor, V: Tensor) -> Tensor:
    return torch.bmm(x[:, None], torch.bmm(V, U.mT))[:, 0]


def _in_order(x: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """By its formula: no op of ours."""
    return torch.einsum("br,bnr->bn", torch.einsum("bn,bnr->br", x, V), U)


def _factors(source: Source, size: Size) -> tuple[Tensor, ...]:
    batch, n, rank = ints(size, "batch", "N", "r")
    return source.normal(batch, n), source.normal(batch, n, rank), source.normal(batch, n, rank)


def _low_rank_rivals(size: Size, options: Options) -> Mapping[str, Function]:
    fits = int(size["batch"]) * int(size["N"]) ** 2 <= _MOST_MATERIALISED
    return {"materialised": lambda *arguments: _materialised(*arguments)} if fits else {}


_low_rank = op_case(
    "low_rank",
    _factors,
    lambda size: ops.low_rank,
    lambda size, x: 4 * x.numel() * int(size["r"]),
    {
        "tiny": [{"N": 12, "r": 2, "batch": 3}],
        "quick": [{"N": 512, "r": 8, "batch": 16}],
        "gpu": [{"N": 1024, "r": 8, "batch": 256}, {"N": 12288, "r": 8, "batch": 128}],
        "full": [
            *sweep({"N": 1024, "r": 8}, batch=(16, 64, 256, 1024, 4096)),
            *sweep({"N": 1024, "r": 8, "batch": 64}, N=(256, 4096), r=(2, 32, 64)),
            {"N": 12288, "r": 8, "batch": 2},
        ],
    },
    truth=lambda size: _in_order,
    rivals=_low_rank_rivals,
    baseline="materialised",
)


# Latent product: one A for all rows (K = 0: cuBLAS or MKL, whoever calls it), or a bank of K of which each row
# picks one.


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


_ONE: Size = {**FP32, "K": 0, "N": 64, "batch": 4096}
_BANK: Size = {**_ONE, "K": 8, "batch": 1024}
_BANK_GPU: Size = {**_BANK, "N": 256, "batch": 4096}
_latent_matmul = op_case(
    "latent_matmul",
    _bank,
    lambda size: ops.latent_matmul,
    lambda size, z: 2 * z.numel() * int(size["N"]),
    {
        "tiny": [{**_BANK, "direction": BACKWARD, "K": 3, "N": 8, "batch": 5}],
        "quick": [_ONE, _BANK],
        "gpu": [
            {**_ONE, "N": 1024, "batch": 16384},
            *sweep(_BANK_GPU, K=(8, 64)),
            {**_BANK_GPU, "direction": BACKWARD},
        ],
        "full": [
            *sweep(_ONE, batch=powers(6, 21, 2), N=(64, 256, 1024)),
            *sweep(_BANK, batch=powers(6, 17, 2), N=(64, 256, 1024), K=(2, 8, 64)),
            *sweep({**_BANK, "direction": BACKWARD}, K=(2, 8, 64)),
        ],
    },
    rivals=_latent_rivals,
)

CASES = [_affine_coupling, _channel_mix, _coupling_mix, _coupling_stack, _low_rank, _latent_matmul]
