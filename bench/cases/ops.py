"""One case per op: couplings, mixes and products. ``network_ops.py`` and ``image_ops.py`` have the others.

Ops are looked up when a case is built, so that ``--compare`` runs the others on a commit that lacks one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linfast import ops
from linfast.scale_maps import ScaleMap

from ..harness import Options, Size
from .common import BACKWARD, BOTH, DTYPES, FORWARD, FP32, INVERSE, Function, Source, grid, ints, op_case

_SMOOTH = ScaleMap("smooth")
_COUPLING = 8  # operations per transformed element: map 3, exp 1, (x + t) e^s 2, sum into log_det 1, negation 1
_MOST_GATHERED = 2**28  # elements: 1 GiB in fp32
_MOST_MATERIALISED = 2**29  # elements of the B matrices: 2 GiB in fp32, of which a call needs a few


# Affine coupling with its log-determinant: one half of the channels is transformed by given parameters.


def _couple(size: Size) -> Function:
    inverse = size["direction"] == INVERSE
    return lambda x, params: ops.affine_coupling(x, params, _SMOOTH, inverse=inverse, log_det=True)


_VECTOR: Size = {**FP32, "D": 64, "side": 1, "batch": 4096}
_PICTURE: Size = {**_VECTOR, "D": 12, "side": 32, "batch": 64}
_affine_coupling = op_case(
    "affine_coupling",
    lambda source, size: (source.image(size), source.image(size)),
    _couple,
    lambda size, x: _COUPLING * x.numel() // 2,
    tiny=[{**_VECTOR, "direction": BACKWARD, "batch": 8, "D": 6}],
    quick=grid(_VECTOR, batch=(64, 1024, 16384)),
    gpu=[
        *grid(_VECTOR, direction=BOTH, dtype=DTYPES, batch=[2**20]),
        {**_PICTURE, "batch": 4096},
    ],
    full=[
        *grid(_VECTOR, direction=BOTH, batch=(2**6, 2**10, 2**14, 2**18, 2**22)),
        *grid(_PICTURE, direction=(FORWARD, INVERSE)),
    ],
)


# Channel mix: one C x C matrix and a bias over every pixel; alone, and behind a coupling.


def _mixed(source: Source, size: Size) -> tuple[Tensor, ...]:
    channels = int(size["C"])
    return source.image(size), source.normal(channels, channels), source.normal(channels)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The usual way to write a channel mix."""
    return F.conv2d(x, weight[:, :, None, None], bias)


_MIX: Size = {**FP32, "C": 12, "side": 16, "batch": 64}
_MIX_SIZES: dict[str, Any] = {
    "tiny": [{**_MIX, "direction": BACKWARD, "C": 4, "side": 3, "batch": 2}],
    "quick": [_MIX],
    "gpu": grid({**_MIX, "side": 32, "batch": 2048}, direction=BOTH, C=(4, 12, 64)),
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
    lambda source, size: (source.image(size), *_mixed(source, size)),
    _coupled_and_mixed,
    lambda size, x: (2 * int(size["C"]) + _COUPLING // 2) * x.numel(),
    truth=_two_ops,
    rivals=lambda size, options: {"two ops": _two_ops(size)} if options.device.type == "cuda" else {},
    **_MIX_SIZES,
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


_ONE: Size = {**FP32, "K": 0, "N": 64, "batch": 4096}
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
    full=[*grid(_ONE, batch=(2**6, 2**10, 2**14)), *grid(_BANK, direction=BOTH, K=(2, 8, 64))],
    rivals=_latent_rivals,
)

CASES = [_affine_coupling, _channel_mix, _coupling_mix, _low_rank, _latent_matmul]
