"""Public ops, forward and backward, as functions of the batch, which tests/static/record.py records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from linfast.kernels.spline_spec import TAILS, Spline
from linfast.kernels.stack_spec import NO_MAPS
from torch import Tensor

from linfast import ops
from linfast.ops import CouplingStack, linearizer_stack
from linfast.ops.rq_spline import spline_transform
from linfast.scale_maps import ScaleMap
from tests.ops.made import random_made
from tests.ops.stacks import NAMES, random_layers, random_map

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_SMOOTH = ScaleMap("smooth")


def tensor(*shape: int, dtype: str = "fp32", last: bool = False, grad: bool = True) -> Tensor:
    """Ones that require a gradient; ``last``: channels innermost."""
    made = torch.ones(shape, dtype=_DTYPES[dtype])
    return (made.contiguous(memory_format=torch.channels_last) if last else made).requires_grad_(grad)


def both_ways(outputs: Tensor | Sequence[Tensor | None], *inputs: Tensor | None) -> None:
    """The gradients of the inputs that require one; every output has a contiguous gradient."""
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    outputs = [y for y in outputs if y is not None and y.requires_grad]
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs], allow_unused=True)


def _x_and_params(batch: int, channels: int, *shape: int, **options: Any) -> tuple[Tensor, Tensor]:
    """The inputs of a coupling: two parameters for each channel of the first half."""
    return tensor(batch, channels, *shape, **options), tensor(batch, (channels + 1) // 2 * 2, *shape, **options)


def affine_coupling(
    batch: int,
    shape: tuple[int, ...],
    dtype: str = "fp32",
    last: bool = False,
    kind: str = "smooth",
    **options: Any,
) -> None:
    x, params = _x_and_params(batch, *shape, dtype=dtype, last=last)
    both_ways(ops.affine_coupling(x, params, ScaleMap(kind), log_det=True, **options), x, params)


def channel_mix(batch: int, channels: int, shape: tuple[int, ...], dtype: str = "fp32", last: bool = False) -> None:
    x = tensor(batch, channels, *shape, dtype=dtype, last=last)
    weight, bias = tensor(channels, channels, dtype=dtype), tensor(channels, dtype=dtype)
    both_ways(ops.channel_mix(x, weight, bias), x, weight, bias)


def coupling_mix(
    batch: int,
    channels: int,
    shape: tuple[int, ...],
    dtype: str = "fp32",
    last: bool = False,
    kind: str = "smooth",
    frozen: bool = False,
    **options: Any,
) -> None:
    x, params = _x_and_params(batch, channels, *shape, dtype=dtype, last=last)
    weight, bias = tensor(channels, channels, dtype=dtype, grad=not frozen), tensor(channels, dtype=dtype)
    y = ops.coupling_mix(x, params, ScaleMap(kind), weight, bias, log_det=True, **options)
    both_ways(y, x, params, weight, None if frozen else bias)


def depthwise_conv(
    batch: int, channels: int, size: int, kernel: tuple[int, int], dtype: str = "fp32", last: bool = False
) -> None:
    x, weight = tensor(batch, channels, size, size, dtype=dtype, last=last), tensor(channels, *kernel, dtype=dtype)
    both_ways(ops.depthwise_conv(x, weight), x, weight)


def group_norm_silu(
    batch: int,
    per_group: int,
    shape: tuple[int, ...],
    dtype: str = "fp32",
    last: bool = False,
    affine: bool = True,
    embedded: bool = True,
    activation: bool = True,
) -> None:
    channels = 2 * per_group
    x = tensor(batch, channels, *shape, dtype=dtype, last=last)
    weight, bias = (tensor(channels) if affine else None for _ in range(2))
    scale, shift = (tensor(batch, channels, dtype=dtype) if embedded else None for _ in range(2))
    y = ops.group_norm_silu(x, 2, weight, bias, scale, shift, activation=activation)
    both_ways(y, x, weight, bias, scale, shift)


def norm_activate(
    batch: int, width: int, dtype: str = "fp32", of_batch: bool = True, normed: bool = True, frozen: bool = False,
    activation: str | None = "elu", gated: bool = False, rows: int | None = None,
) -> None:  # fmt: skip
    """``gated``: with a skip and a gate, of so many ``rows``."""
    x = tensor(batch, width, dtype=dtype)
    skip = tensor(batch, width, dtype=dtype) if gated else None
    gate = tensor(batch if rows is None else rows, width, dtype=dtype) if gated else None
    bias, weight, shift = (tensor(width, grad=not frozen) for _ in range(3))
    given = (weight, shift) if normed else (None, None)
    statistics = {} if of_batch or not normed else {"mean": torch.ones(width), "var": torch.ones(width)}
    found = ops.norm_activate(x, activation, bias, *given, **statistics, skip=skip, gate=gate, of_batch=of_batch)[
        :2
    ]
    both_ways(found, x, bias, skip, gate, *given)


def latent_matmul(batch: int, n: int, operators: int, dtype: str = "fp32", precision: str | None = None) -> None:
    z, A, bias = (tensor(*shape, dtype=dtype) for shape in ((batch, n), (operators, n, n), (n,)))
    index = torch.arange(batch) % operators
    both_ways(ops.latent_matmul(z, A, index, alpha=0.5, bias=bias, precision=precision), z, A, bias)


def low_rank(batch: int, n: int, rank: int, dtype: str = "fp32", dense: bool = True) -> None:
    x = tensor(batch, n, dtype=dtype)
    U, V = (
        tensor(batch, n, rank, dtype=dtype) if dense else tensor(batch, rank, n, dtype=dtype).mT for _ in range(2)
    )
    both_ways(ops.low_rank(x, U, V, 0.5), x, U, V)


def conv2d_fused(
    batch: int,
    channels: int,
    size: int,
    precision: str | None,
    dtype: str = "fp32",
    kernel: int = 3,
    last: bool = True,
) -> None:
    """The second convolution of a residual block, as in a block, with the statistics of the next norm."""
    x, residual = (tensor(batch, channels, size, size, dtype=dtype, last=last) for _ in range(2))
    weight = tensor(channels, channels, kernel, kernel, dtype=dtype, last=last)
    bias, norm_weight, norm_bias = (tensor(channels, dtype=dtype) for _ in range(3))
    groups = channels // 4
    y, _ = ops.conv2d_fused(
        x, weight, bias, groups=groups, norm_weight=norm_weight, norm_bias=norm_bias, residual=residual,
        next_groups=groups, precision=precision,
    )  # fmt: skip
    both_ways(y, x, weight, bias, norm_weight, norm_bias, residual)


def coupling_stack(
    batch: int,
    features: int,
    hidden: int,
    n_linear: int,
    precision: str,
    *,
    maps: int = NO_MAPS,
    depth: int = 2,
    activation: str = "silu",
    kind: str = "smooth",
    inverse: bool = False,
    backward: bool = True,
    dtype: str = "fp32",
) -> None:
    x = tensor(batch, features, dtype=dtype, grad=backward)
    layers = random_layers(features, [hidden] * (n_linear - 1), depth, maps=NAMES[maps])
    leaves = [t.requires_grad_(backward) for layer in layers for t in layer.weights]
    y = ops.coupling_stack(
        x, layers, activation=activation, scale_map=ScaleMap(kind), inverse=inverse, log_det=True,
        precision=precision,
    )  # fmt: skip
    if backward:
        both_ways(y, x, *leaves)


def linearizer(
    batch: int,
    features: int,
    hidden: int,
    n_linear: int,
    precision: str,
    *,
    maps: int = NO_MAPS,
    depth: int = 2,
    backward: bool = True,
) -> None:
    x = tensor(batch, features, grad=backward)
    layers = random_layers(features, [hidden] * (n_linear - 1), depth, maps=NAMES[maps])
    g, A = CouplingStack(layers, "silu", _SMOOTH), random_map(features, "dense")
    assert A is not None
    A.weight.requires_grad_(backward)
    y = linearizer_stack(x, g, A.weight, g, precision=precision)
    if backward:
        both_ways(y, x, A.weight)


def masked_autoregressive(
    batch: int,
    features: int,
    hidden: int,
    precision: str,
    *,
    activation: str = "relu",
    kind: str | None = "sigmoid",
    residual: bool = False,
    extras: bool = False,
    inverse: bool = False,
    dtype: str = "fp32",
) -> None:
    masks, weights, biases = random_made(features, (hidden, hidden), 1 if kind is None else 2, residual=residual)
    x = tensor(batch, features, dtype=dtype, grad=False)
    given = [(tensor(batch, hidden, grad=False),) * 2] * len(masks.activated) if extras else None
    ops.masked_autoregressive(
        x, masks, weights, biases, activation=activation, scale_map=kind and ScaleMap(kind), extras=given,
        inverse=inverse, log_det=True, precision=precision,
    )  # fmt: skip


def rq_spline(
    batch: int,
    features: int = 8,
    bins: int = 8,
    layout: tuple[int, int, int] = (0, 1, 2),
    dtype: str = "fp32",
    tails: str = "linear",
    soft_clip: bool = False,
    shared: bool = False,
    inverse: bool = False,
) -> None:
    """layout: the dimensions (sample, feature, parameter) of the parameters, from outermost to innermost."""
    spline = Spline(bins, tails=TAILS.index(tails), soft_clip=soft_clip)
    sizes = (1 if shared else batch, features, spline.per_feature)
    params = tensor(*(sizes[i] for i in layout), dtype=dtype, grad=False)
    params = params.permute([layout.index(i) for i in range(3)]).requires_grad_()
    x = tensor(batch, features, dtype=dtype)
    both_ways(spline_transform(x, params, spline, inverse, True), x, params)


# At sizes so small that any batch fits: only the effect of the batch is counted.
BATCHED: dict[str, Callable[[int], None]] = {
    "affine_coupling": partial(affine_coupling, shape=(6,)),
    "affine_coupling, inverse": partial(affine_coupling, shape=(6,), inverse=True),
    "affine_coupling of images": partial(affine_coupling, shape=(4, 4, 4)),
    "affine_coupling of channels_last": partial(affine_coupling, shape=(4, 4, 4), last=True),
    "channel_mix of images": partial(channel_mix, channels=3, shape=(4, 4)),
    "channel_mix of odd images": partial(channel_mix, channels=3, shape=(3, 3)),
    "channel_mix of channels_last": partial(channel_mix, channels=16, shape=(4, 4), last=True),
    "coupling_mix": partial(coupling_mix, channels=6, shape=()),
    "coupling_mix of images": partial(coupling_mix, channels=4, shape=(4, 4)),
    "coupling_mix of images, inverse": partial(coupling_mix, channels=4, shape=(4, 4), inverse=True),
    "coupling_mix of channels_last": partial(coupling_mix, channels=16, shape=(4, 4), last=True),
    "depthwise_conv": partial(depthwise_conv, channels=2, size=4, kernel=(3, 3)),
    "depthwise_conv of channels_last": partial(depthwise_conv, channels=2, size=4, kernel=(3, 3), last=True),
    "group_norm_silu": partial(group_norm_silu, per_group=2, shape=(4, 4)),
    "group_norm_silu of channels_last": partial(group_norm_silu, per_group=2, shape=(4, 4), last=True),
    "norm_activate": lambda batch: norm_activate(max(batch, 2), 6),
    "norm_activate, gated": lambda batch: norm_activate(max(batch, 2), 6, gated=True),
    "norm_activate, end of a block": partial(
        norm_activate, width=6, of_batch=False, normed=False, activation=None, gated=True, rows=1
    ),
    "norm_activate, no norm": partial(norm_activate, width=6, of_batch=False, normed=False, frozen=True),
    "latent_matmul": partial(latent_matmul, n=6, operators=3),
    "latent_matmul, one per sample": lambda batch: latent_matmul(batch, 6, batch),
    "low_rank": partial(low_rank, n=6, rank=2),
    "conv2d_fused": partial(conv2d_fused, channels=8, size=4, precision="high"),
    "coupling_stack": partial(coupling_stack, features=6, hidden=16, n_linear=2, precision="fast"),
    "coupling_stack, layer by layer": partial(
        coupling_stack, features=6, hidden=300, n_linear=3, precision="fast", backward=False
    ),
    "coupling_stack, inverse, dense maps": partial(
        coupling_stack, features=6, hidden=16, n_linear=3, precision="exact", maps=2, inverse=True
    ),
    "linearizer_stack": partial(linearizer, features=6, hidden=16, n_linear=2, precision="fast"),
    "masked_autoregressive": partial(masked_autoregressive, features=6, hidden=16, precision="fast"),
    "masked_autoregressive, inverse, extras": partial(
        masked_autoregressive, features=6, hidden=16, precision="fast", extras=True, inverse=True
    ),
    "rq_spline": rq_spline,
    "rq_spline of planes, inverse": partial(rq_spline, layout=(2, 1, 0), inverse=True),
    "rq_spline, shared": partial(rq_spline, shared=True),
}
LAYERED: dict[str, Callable[[int], None]] = {
    "coupling_stack": lambda depth: coupling_stack(64, 6, 16, 2, "fast", maps=1, depth=depth),
    "coupling_stack, layer by layer": lambda depth: coupling_stack(
        64, 6, 300, 2, "fast", depth=depth, backward=False
    ),
    "linearizer_stack": lambda depth: linearizer(64, 6, 16, 2, "fast", depth=depth),
}
