"""The parts of a UNet: residual blocks with normalisation, resampling, dropout and self-attention.

With s = 1 / sqrt(2), which keeps the variance of a sum of two terms,

    block      y = s P R(x) + conv1(drop(silu(norm1(conv0(R(silu(norm0(x)))) + shift))))
    attention  y = s x + W_o softmax(q k^T / sqrt(C)) v,   (q, k, v) = W_qkv norm(x)

x [B, C, H, W]; R averages 2 x 2 pixels, repeats each, or is the identity; P is a 1 x 1
convolution where C changes or R resamples, else the identity; shift [C] or [B, C] carries
the time, the context and the bias of conv0. The weights of conv1, P and W_o include EDM's factor s, and
conv1's bias includes that of P, so that a block ends in one addition.

Activations are kept in channels_last, in which a 1 x 1 convolution is a matrix product on
[B H W, C]; on a CPU in NCHW (see ``in_nchw``), in which it is one product per sample.

Source: the DDPM++ network of EDM (Karras et al., arXiv 2206.00364).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..dispatch import is_plain, uses_triton
from ..ops.conv2d_fused import conv2d_fused
from ..ops.group_norm_silu import group_norm_silu
from .reversible import inverts

SKIP_SCALE = math.sqrt(0.5)
EPS = 1e-6
_GROUP_CHANNELS, _MAX_GROUPS = 4, 32


def in_nchw(x: Tensor) -> bool:
    """Whether a UNet keeps its activations in NCHW: in plain torch on a CPU.

    There torch's group norm with groups of four channels takes 3 to 4 times as long in
    channels_last, which costs more than oneDNN's convolutions and the 1 x 1 products gain. In
    NCHW a g of the paper's MNIST model runs 7 to 15% faster, and a training step 3 to 10%.
    """
    return x.device.type == "cpu" and not uses_triton(x)


class _GroupNorm(nn.GroupNorm):
    """silu(group_norm(x)), or without the SiLU."""

    def forward(self, x: Tensor, activation: bool = True) -> Tensor:
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, eps=self.eps, activation=activation)

    def then(self, x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> tuple[Tensor, Tensor | None]:
        """The convolution of forward(x) with ``weight``, as one fused op: see ``conv2d_fused``."""
        parameters: dict[str, Any] = {"norm_weight": self.weight, "norm_bias": self.bias}
        return conv2d_fused(x, weight, bias, groups=self.num_groups, eps=self.eps, **parameters, **options)


def group_count(channels: int) -> int:
    """The number of groups, of four channels each where that gives at most 32 groups."""
    return min(_MAX_GROUPS, channels // _GROUP_CHANNELS)


def norm(channels: int) -> _GroupNorm:
    """A group norm of ``group_count(channels)`` groups; ValueError where they cannot be equal."""
    groups = group_count(channels)
    if groups == 0 or channels % groups:
        raise ValueError(f"{channels} channels do not fall into {groups} groups: make the width a multiple of 4")
    return _GroupNorm(groups, channels, eps=EPS)


def conv3x3(channels_in: int, channels_out: int, bias: bool = True, zero: bool = False) -> nn.Conv2d:
    """A zero-padded 3 x 3 convolution: Xavier weights, or zeros; bias 0."""
    conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=bias)
    start(conv, 0.0 if zero else 1.0)
    return conv


class ResidualBlock(nn.Module):
    """The block of the module's docstring, then self-attention where asked for.

    Args:
        channels_in, channels_out: C of x and y.
        resample: "down" halves H and W, "up" doubles them, None keeps them.
        attention: whether self-attention follows.
        dropout: probability that conv1 reads a zero in training.
        nchw_dropout: see UNet.
        bias: whether conv0 has a bias; otherwise ``shift`` must contain it.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        resample: str | None = None,
        attention: bool = False,
        dropout: float = 0.0,
        nchw_dropout: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.resample, self.dropout, self.nchw_dropout = resample, dropout, nchw_dropout
        self.norm0 = norm(channels_in)
        self.conv0 = conv3x3(channels_in, channels_out, bias=bias)
        self.norm1 = norm(channels_out)
        self.conv1 = conv3x3(channels_out, channels_out, zero=True)
        self.skip: nn.Linear | None = None
        if resample or channels_in != channels_out:
            self.skip = nn.Linear(channels_in, channels_out, bias=False)
            start(self.skip, SKIP_SCALE)
        self.attention = Attention(channels_out) if attention else None

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        passed_by = (self.norm0, self.norm1, self.conv1)
        bias = self.conv0.bias if shift is None else shift
        if uses_triton(x) and all(is_plain(layer, (type(layer),)) for layer in passed_by):
            y = self._fused(x, bias)
            return y if self.attention is None else self.attention(y)
        h = _resampled(self.norm0(x), self.resample)
        if bias is None or bias.ndim == 1:
            h = F.conv2d(h, self.conv0.weight, bias, padding=1)
        else:
            h = F.conv2d(h, self.conv0.weight, padding=1) + bias[:, :, None, None]
        h = self.conv1(self._drop(self.norm1(h)))
        y = torch.add(h, x, alpha=SKIP_SCALE) if self.skip is None else self._skipped(x, plus=h)
        return y if self.attention is None else self.attention(y)

    def _fused(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """y before attention, by two ``conv2d_fused``; the first returns the statistics of the second's norm."""
        drops = self.training and self.dropout > 0.0
        next_groups = 0 if drops else self.norm1.num_groups
        if self.resample is None:
            h, statistics = self.norm0.then(x, self.conv0.weight, bias, next_groups=next_groups)
        else:
            h = _resampled(self.norm0(x), self.resample)
            h, statistics = conv2d_fused(h, self.conv0.weight, bias, next_groups=next_groups)
        residual, alpha = (x, SKIP_SCALE) if self.skip is None else (self._skipped(x), 1.0)
        last: dict[str, Any] = {"residual": residual, "alpha": alpha}
        if drops:
            return conv2d_fused(self._drop(self.norm1(h)), self.conv1.weight, self.conv1.bias, **last)[0]
        return self.norm1.then(h, self.conv1.weight, self.conv1.bias, statistics=statistics, **last)[0]

    def _drop(self, h: Tensor) -> Tensor:
        if not self.training or self.dropout == 0.0:
            return h
        if not self.nchw_dropout or in_nchw(h):
            return F.dropout(h, self.dropout)
        return h * F.dropout(torch.ones(h.shape, dtype=h.dtype, device=h.device), self.dropout)

    def _skipped(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """s P R(x) + ``plus``, with s P the weight of ``skip``, which is applied first where R repeats pixels."""
        assert self.skip is not None
        if self.resample != "up":
            return _mixed(_resampled(x, self.resample), self.skip.weight, plus)
        y = _doubled(_mixed(x, self.skip.weight))
        return y if plus is None else plus + y


class Attention(nn.Module):
    """y = s x + W_o softmax(q k^T / sqrt(C)) v over the pixels of x [B, C, H, W], one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        start(self.qkv, math.sqrt(0.2))
        start(self.out, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        h = self.norm(x, activation=False)
        if in_nchw(x):
            qkv, out = self.qkv.weight.mT.expand(B, C, 3 * C), self.out.weight.expand(B, C, C)
            a = self._attended(torch.baddbmm(self.qkv.bias, h.flatten(2).mT, qkv))[:, 0]
            y = torch.baddbmm(x.flatten(2), out, a.mT, beta=SKIP_SCALE).add_(self.out.bias[:, None])
            return y.view(x.shape)
        a = self._attended(self.qkv(pixels(h)).view(B, H * W, 3 * C)).reshape(B * H * W, C)
        return torch.add(as_image(self.out(a), x), x, alpha=SKIP_SCALE)

    def _attended(self, rows: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(C)) v [B, 1, H W, C] for rows [q | k | v] [B, H W, 3 C]."""
        q, k, v = rows.unsqueeze(1).chunk(3, dim=-1)
        if inverts("invert", rows, 0.0):  # in eager mode, where only backward() differentiates
            return _Attention.apply(q, k, v)
        return _attention(q, k, v, plain=torch.is_grad_enabled() and not torch.compiler.is_compiling())


def _attention(q: Tensor, k: Tensor, v: Tensor, *, plain: bool = False) -> Tensor:
    """Attention; ``plain``: unfused, because torch's fused kernels have no forward-mode or second derivatives."""
    with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
        return F.scaled_dot_product_attention(q, k, v)


class _Attention(torch.autograd.Function):
    """Attention by torch's fused kernel. One backward uses the forward's graph; further backwards recompute it."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        ctx.save_for_backward(*given)
        ctx.kept = any(ctx.needs_input_grad) and _with_graph(given)
        return ctx.kept[0].detach() if ctx.kept else _attention(*given)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled():  # create_graph
            given = [t.view_as(t) for t in ctx.saved_tensors]
            return torch.autograd.grad(_attention(*given, plain=True), given, gradients, create_graph=True)
        a, given = ctx.kept or _with_graph(ctx.saved_tensors)
        ctx.kept = None
        return torch.autograd.grad(a, given, gradients)


def _with_graph(given: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    own = [t.detach().requires_grad_() for t in given]
    with torch.enable_grad():
        return _attention(*own), own


def _mixed(x: Tensor, weight: Tensor, plus: Tensor | None = None) -> Tensor:
    """weight [C_out, C] times the channels of x, + ``plus`` where given."""
    if not in_nchw(x):
        rows = pixels(x)
        return as_image(rows @ weight.mT if plus is None else torch.addmm(pixels(plus), rows, weight.mT), x)
    weight = weight.expand(x.shape[0], *weight.shape)
    y = weight @ x.flatten(2) if plus is None else torch.baddbmm(plus.flatten(2), weight, x.flatten(2))
    return y.unflatten(2, x.shape[2:])


def pixels(x: Tensor) -> Tensor:
    """[B, C, H, W] as [B H W, C]: a view in channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def as_image(rows: Tensor, like: Tensor) -> Tensor:
    """[B H W, C] as [B, C, H, W], channels_last, with B, H and W of ``like``."""
    B, _, H, W = like.shape
    return rows.view(B, H, W, rows.shape[1]).permute(0, 3, 1, 2)


def _resampled(x: Tensor, resample: str | None) -> Tensor:
    if resample is None:
        return x
    return _doubled(x) if resample == "up" else _halved(x)


def _halved(x: Tensor) -> Tensor:
    """The means of 2 x 2 pixels. On a CPU rows are added first, in a fifth of avg_pool2d's time."""
    if not in_nchw(x):
        return F.avg_pool2d(x, 2)
    upper, lower = x.unflatten(2, (-1, 2)).unbind(3)
    left, right = (upper + lower).unflatten(3, (-1, 2)).unbind(4)
    return (left + right) * 0.25


def _doubled(x: Tensor) -> Tensor:
    """Each pixel as 2 x 2 pixels. F.interpolate's gradient uses atomics on a GPU and is slower on a CPU."""
    if in_nchw(x):
        wide = torch.stack((x, x), dim=4).flatten(3)
        return torch.stack((wide, wide), dim=3).flatten(2, 3)
    B, C, H, W = x.shape
    rows = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(B, H, 2, W, 2, C)
    return rows.reshape(B, 2 * H, 2 * W, C).permute(0, 3, 1, 2)


def start(layer: nn.Conv2d | nn.Linear, gain: float) -> None:
    """Xavier weights times ``gain``, which may be 0; bias 0."""
    nn.init.xavier_uniform_(layer.weight, gain) if gain else nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
