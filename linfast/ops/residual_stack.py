"""A whole residual network in one launch, where no gradient is required (linfast.kernels.residual_stack).

    h = x W^T + term,   per block  h <- h + F(h)  or  h + F(h) sigmoid(gate),   out = h W_n^T + b_n
    F(h) = act(N_2(act(N_1(h)) W_1^T + b_1)) W_2^T + b_2,   N: batch norm by running statistics, or nothing

x [B, n_in], term and gates [B or 1, H], h [B, H], out [B, n_out]. ``residual_network`` calls it; ``is_one_launch``
decides where. One torch.cat packs the weights, at every call unless their owner is frozen (``freeze``): the kernel
reads a run of numbers, which the weights of a network are not, and a copy that was kept would not see writes to
them. The op has no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dispatch import cat, uses_triton
from ..freeze import derived
from ..kernels.stack_configs import LARGEST_RESIDUAL, mode_on, target_of
from ..precision import part_dtype, resolve_precision
from .masked_plain import BY_NUMBER, NUMBERS
from .register import RawOp

if TYPE_CHECKING:
    from .residual_network import ResidualNetwork, Terms


def is_one_launch(x: Tensor, net: ResidualNetwork, terms: Terms | None) -> bool:
    """Whether one launch runs this network on x, if it may (no gradient, autocast, transform or tracer).

    It does so for up to 128 hidden units and any number of blocks, with a bias in each layer and norms by running
    statistics with one eps; not with dropout, in a mix of dtypes or devices, for a batch of no rows, or on AMD's
    GPUs, where the tiles that were tried spill on gfx942 in "exact". Shapes that do not fit are left to torch.
    """
    if not net.blocks or net.dropout or not x.shape[0] or not uses_triton(x):
        return False
    if net.first[0].shape[0] > LARGEST_RESIDUAL or torch.version.hip is not None:
        return False
    norms = [norm for block in net.blocks for norm in block.norms or ()]
    alike = len(norms) in (0, 2 * len(net.blocks)) and len({norm.eps for norm in norms}) < 2
    gates = {block.gate is None for block in net.blocks}
    if not alike or len(gates) > 1 or any(norm.training for norm in norms):
        return False
    if x.shape[1] != (net.first[0] if terms is None else terms.weight).shape[1]:
        return False
    return all(
        t is not None and t.shape == shape and t.dtype == x.dtype and t.device == x.device
        for t, shape in _tensors(net)
    )


def _tensors(net: ResidualNetwork) -> Iterator[tuple[Tensor | None, tuple[int, ...]]]:
    """What a launch reads, with its shape, in the order of the packed weights; last the first bias, a term."""
    (first, bias), (last, last_bias) = net.first, net.last
    width, n_out = len(first), len(last)
    yield first, (width, first.shape[1])
    for block in net.blocks:
        for weight, own in block.layers:
            yield weight, (width, width)
            yield own, (width,)
        for norm in block.norms or ():
            yield from ((t, (width,)) for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
    yield from ((last, (n_out, width)), (last_bias, (n_out,)), (bias, (width,)))


def pack_stack(net: ResidualNetwork) -> Tensor:
    """The weights of a network that ``is_one_launch``, [N]; one launch for up to 31 blocks, or 10 with norms."""
    *tensors, _ = _tensors(net)
    return cat([t.reshape(-1) for t, _ in tensors if t is not None])


def residual_stack(
    x: Tensor, net: ResidualNetwork, activation: str, terms: Terms | None, transposed: bool,
    owner: nn.Module | None = None, precision: str | None = None,
) -> Tensor:  # fmt: skip
    """out [B, n_out], with strides (1, B) where ``transposed``; the arguments are those of ``residual_network``.

    ``precision``: of the products, "exact", "high", "tf32" or "fast"; None: as torch is set.
    """
    packed = pack_stack(net) if owner is None else derived(owner, "residual stack", lambda: pack_stack(net))
    columns, mode = None if terms is None else terms.joined, mode_on(target_of(x), resolve_precision(x, precision))
    if terms is not None and columns is None:
        columns = cat([terms.first, *terms.gates], 1)
    elif net.first[1] is not None and columns is None:
        columns = net.first[1][None]
    norms = net.blocks[0].norms
    run: Any = _residual_stack if uses_triton(x, packed) else residual_stack_reference
    out: Tensor = run(
        x, packed, columns, net.last[0].shape[0], len(net.blocks), net.first[0].shape[1], norms is not None,
        terms is not None and len(terms.gates) > 0, norms[0].eps if norms else 0.0, NUMBERS[activation],
        transposed, mode, part_dtype(x, mode),
    )  # fmt: skip
    return out


def residual_stack_reference(
    x: Tensor, packed: Tensor, terms: Tensor, n_out: int, n_blocks: int, n_given: int, norms: bool, gates: bool,
    eps: float, activation: int, transposed: bool, precision: str, part_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The network in plain torch, from the packed weights: sums in fp32 or wider."""
    width, act = terms.shape[1] // (1 + n_blocks * gates), BY_NUMBER[activation]
    compute = torch.promote_types(x.dtype, torch.float32)
    columns, rest, at = terms.to(compute), packed.to(compute), 0

    def take(*shape: int) -> Tensor:
        nonlocal at
        at += math.prod(shape)
        return rest[at - math.prod(shape) : at].view(shape)

    h = columns[:, :width] + x.to(compute) @ take(width, n_given)[:, : x.shape[1]].mT
    for i in range(n_blocks):
        layers = [(take(width, width), take(width)) for _ in range(2)]
        of_norms = [take(4, width) for _ in range(2 * norms)]
        r = h
        for j, (weight, bias) in enumerate(layers):
            if norms:
                scale, shift, mean, var = of_norms[j]
                r = (r - mean) / (var + eps).sqrt() * scale + shift
            r = F.linear(act(r), weight, bias)
        h = h + (r * columns[:, (1 + i) * width : (2 + i) * width].sigmoid() if gates else r)
    out = F.linear(h, take(n_out, width), take(n_out)).to(x.dtype)
    return out.t().contiguous().t() if transposed else out


def _fake(x: Tensor, packed: Tensor, terms: Tensor, n_out: int, *rest: object) -> Tensor:
    transposed = rest[6]
    out = x.new_empty((n_out, x.shape[0]) if transposed else (x.shape[0], n_out))
    return out.t() if transposed else out


_residual_stack = RawOp(
    "residual_stack",
    "(Tensor x, Tensor packed, Tensor terms, int n_out, int n_blocks, int n_given, bool norms, bool gates, "
    "float eps, int activation, bool transposed, str precision, ScalarType part_dtype) -> Tensor",
    _fake,
    residual_stack_reference,
    "residual_stack:launch_residual_stack",
).define()
