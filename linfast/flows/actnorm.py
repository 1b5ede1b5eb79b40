"""ActNorm: a learned affine map a channel, started from the first batch's statistics.

    y = (x + bias) exp(log_scale),   x = y exp(-log_scale) - bias
    log|det| = (positions a channel) * sum(log_scale)

x [B, C, ...]; bias and log_scale [C]. Source: Glow (arXiv 1807.03039), in the
Linearizer paper's order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checks import check_count, check_number
from .bijection import ChannelLinear, constant_log_det, position_count, wide
from .undo import Cotangents, Undone, undo

__all__ = ["ActNorm"]


class ActNorm(ChannelLinear):
    """y = (x + bias) exp(log_scale), with bias = -mean and log_scale = -log(std) of the first batch.

    The first forward (or ``initialize``) sets the parameters; the flag that it
    happened is the buffer ``initialized``, so a loaded model is not initialised
    again. Under torch.distributed the statistics are those of all processes' rows.
    An inverse before that is the identity. torch.func.functional_call cannot initialise it:
    call it, or ``initialize``, once before.

    Args:
        features: C.
        min_std: smallest standard deviation divided by. A channel that is nearly
            constant in the first batch would otherwise amplify everything unlike it.

    Raises:
        ValueError: a first batch with fewer than two values a channel, or non-finite ones.
    """

    initialized: Tensor

    def __init__(self, features: int, min_std: float = 1e-2) -> None:
        super().__init__()
        self.features = features = check_count("features", features)
        self.min_std = check_number("min_std", min_std, least=0.0, above=True)
        self.bias = nn.Parameter(torch.zeros(features))
        self.log_scale = nn.Parameter(torch.zeros(features))
        self.register_buffer("initialized", torch.tensor(False))
        # Mirrors the buffer, so that forward branches on a Python bool: no sync, no graph break.
        self._is_initialized = False
        self.register_load_state_dict_post_hook(_read_flag)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set bias and log_scale from x [B, C, ...] so that its image has mean 0 and variance 1."""
        self._check("x", x, self.features)
        mean, std = _statistics(x)
        if not torch.compiler.is_compiling() and not bool(torch.isfinite(std).all()):
            raise ValueError("ActNorm: x of the first batch has non-finite values")
        self.bias.copy_(-mean)
        self.log_scale.copy_(-std.clamp(min=self.min_std).log())
        self.initialized.fill_(True)
        self._is_initialized = True

    def _transform(
        self, x: Tensor, context: Mapping[str, Any], inverse: bool, log_det: bool
    ) -> tuple[Tensor, Tensor | None]:
        if not self._is_initialized and not inverse and (x.shape[0] > 0 or _is_distributed()):
            self.initialize(x)
        return self._affine(x, inverse, log_det)

    def _undo(
        self,
        y: Tensor,
        cotangents: Cotangents,
        tensors: Sequence[Tensor],
        context: Mapping[str, Any],
        inverse: bool,
        log_det: bool,
    ) -> Undone:
        """By the affine map alone: a replay initialises nothing."""
        return undo(
            lambda x: self._affine(x, inverse, log_det),
            lambda y: self._affine(y, not inverse, False)[0],
            y,
            cotangents,
            tensors,
        )

    def _affine(self, x: Tensor, inverse: bool, log_det: bool) -> tuple[Tensor, Tensor | None]:
        per_channel = (1, -1) + (1,) * (x.ndim - 2)
        bias, log_scale = self.bias.view(per_channel), self.log_scale.view(per_channel)
        y = x * (-log_scale).exp() - bias if inverse else (x + bias) * log_scale.exp()
        if not log_det:
            return y.to(x.dtype), None
        total = self.log_abs_det() * position_count(x)
        return y.to(x.dtype), constant_log_det(x, -total if inverse else total)

    def after(self, weight: Tensor, bias: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor | None]:
        own, log_scale = wide(self.bias), wide(self.log_scale)
        if inverse:
            scale = (-log_scale).exp()
            bias = -own if bias is None else scale * bias - own
        else:
            scale = log_scale.exp()
            bias = scale * (own if bias is None else bias + own)
        return scale[:, None] * weight, bias

    def log_abs_det(self) -> Tensor:
        return self.log_scale.sum()

    def extra_repr(self) -> str:
        return f"features={self.features}"


def _read_flag(module: nn.Module, _incompatible: object) -> None:
    assert isinstance(module, ActNorm)
    module._is_initialized = bool(module.initialized)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C] over batch and positions, of every process's rows together."""
    wide = x.detach().transpose(0, 1).flatten(1).double()
    count = torch.tensor(float(wide.shape[1]), dtype=wide.dtype, device=wide.device)
    total = torch.cat((wide.sum(1), count[None]))
    _all_reduce(total)
    if not torch.compiler.is_compiling() and total[-1] < 2:
        raise ValueError(f"ActNorm: the first batch needs two values a channel; got x {tuple(x.shape)}")
    mean = total[:-1] / total[-1]
    squares = (wide - mean[:, None]).square().sum(1)
    _all_reduce(squares)
    return mean.to(x.dtype), (squares / (total[-1] - 1)).sqrt().to(x.dtype)


def _all_reduce(value: Tensor) -> None:
    if _is_distributed():
        dist.all_reduce(value)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
