"""A bias, batch norm and an activation: what lies between two linear layers of a residual network.

    z = x + b        y = act((z - m) / sqrt(v + eps) w + s)        act(z) without a norm

On a CPU and in float64 the op runs in plain torch; on a GPU it is one kernel forward and one backward
(linfast.kernels.norm_activate), which returns the gradient of the bias too: the linear layer before it needs no
pass of its own for its bias. Saved for the backward: x, the parameters and the statistics.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, check_flag, check_number, check_tensor
from ..dispatch import uses_triton
from .masked_plain import MASKED_ACTIVATIONS
from .register import define_op

NORMS = ("none", "given", "of the batch")
"""What normalises; an index is the kernel's number."""

_FUNCTIONS = tuple(MASKED_ACTIVATIONS.values())
_NUMBERS = {name: number for number, name in enumerate(MASKED_ACTIVATIONS)}


def norm_activate(
    x: Tensor,
    activation: str,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    shift: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    *,
    of_batch: bool = False,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, mean, unbiased variance): the statistics [H] of the batch, in fp32 or wider; None without ``of_batch``.

    Args:
        x: [B, H].
        activation: "relu", "silu", "tanh", "gelu" or "elu".
        bias: [H], added to x first; None for 0.
        weight, shift: [H], of the norm; None for 1 and 0.
        mean, var: [H], what normalises. Both None, and no ``of_batch``: no norm. They have no gradient in a kernel.
        of_batch: normalise by the statistics of the batch, which the second and third result are.
        eps: added to the variance; at least 0, with ``of_batch`` above 0, as in torch.

    The op is computed in fp32, or in float64 where an argument is; y has x's dtype. No gradient flows through
    the returned statistics.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an option is unknown; a shape does not fit x; a batch of fewer than two rows is to normalise
            itself.
    """
    norm = _check(x, activation, (bias, weight, shift, mean, var), of_batch)
    check_number("eps", eps, 0.0, above=of_batch)
    given = (x, bias, weight, shift, mean, var)
    constants = norm, eps, _NUMBERS[activation]
    fixed = not any(t is not None and t.requires_grad for t in (mean, var))
    runs = uses_triton(*(t for t in given if t is not None)) and fixed
    run: Any = _norm_activate if runs else norm_activate_reference
    y, of_rows, spread = run(*given, *constants)
    return (y, of_rows.detach(), spread.detach()) if of_batch else (y, None, None)


def norm_activate_reference(
    x: Tensor, bias: Tensor | None, weight: Tensor | None, shift: Tensor | None, mean: Tensor | None,
    var: Tensor | None, norm: int, eps: float, activation: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """``norm_activate`` in plain torch."""
    given = [t.dtype for t in (x, bias, weight, shift, mean, var) if t is not None]
    compute = functools.reduce(torch.promote_types, given, torch.float32)
    bias, weight, shift, mean, var = (t if t is None else t.to(compute) for t in (bias, weight, shift, mean, var))
    found: tuple[Tensor | None, Tensor | None] = None, None
    u = x.to(compute)
    u = u if bias is None else u + bias
    if norm == NORMS.index("of the batch"):
        var, mean = torch.var_mean(u, 0, correction=0)
        found = mean, var * (x.shape[0] / (x.shape[0] - 1))
    if mean is not None and var is not None:
        u = (u - mean) * (var + eps).rsqrt()
        u = u if weight is None else u * weight
        u = u if shift is None else u + shift
    return _FUNCTIONS[activation](u).to(x.dtype), *found


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    of_batch = rest[5] == NORMS.index("of the batch")
    found = [x.new_empty(x.shape[1], dtype=torch.float32) if of_batch else None for _ in range(2)]
    return torch.empty_like(x), *found


def _gradients(x: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    return torch.empty_like(x), *(None if t is None else t.new_empty(t.shape) for t in rest[:3]), None, None


_norm_activate = define_op(
    "norm_activate(Tensor x, Tensor? bias, Tensor? weight, Tensor? shift, Tensor? mean, Tensor? var, int norm, "
    "float eps, int activation) -> (Tensor y, Tensor batch_mean, Tensor batch_var)",
    _fake,
    norm_activate_reference,
    saves="x bias weight shift mean var batch_mean batch_var",
    gradients=_gradients,
)


def _check(x: Tensor, activation: str, parameters: Sequence[Tensor | None], of_batch: bool) -> int:
    """The number of the norm."""
    check_tensor("x", x)
    check_choice("activation", activation, tuple(MASKED_ACTIVATIONS))
    check_flag("of_batch", of_batch)
    if x.ndim != 2:
        raise ValueError(f"x must be [B, H]; got {tuple(x.shape)}")
    for name, tensor in zip(("bias", "weight", "shift", "mean", "var"), parameters, strict=True):
        if tensor is not None:
            check_tensor(name, tensor, x)
            if tensor.shape != x.shape[1:]:
                raise ValueError(f"{name} must be [{x.shape[1]}] for x {tuple(x.shape)}; got {tuple(tensor.shape)}")
    *_, mean, var = parameters
    if (mean is None) != (var is None) or (of_batch and mean is not None):
        raise ValueError("mean and var must be given together, and without of_batch")
    if mean is None and not of_batch and not (parameters[1] is None and parameters[2] is None):
        raise ValueError("weight and shift are those of a norm: give mean and var, or of_batch")
    if of_batch and x.shape[0] < 2:
        got = tuple(x.shape)
        raise ValueError(f"x: Expected more than 1 value per channel when training, got input size {got}")
    return 2 if of_batch else int(mean is not None)
