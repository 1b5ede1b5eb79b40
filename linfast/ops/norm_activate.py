"""What lies between two linear layers of a residual network: bias, gate and skip, batch norm, activation.

    u = h + (x + b) sigmoid(g)        y = act((u - m) / sqrt(v + eps) w + s)        act(u) without a norm

On a CPU and in float64 the op runs in plain torch; on a GPU it is one kernel forward and one backward
(linfast.kernels.norm_activate). The backward takes the gradients of u and of y, which need no sum of their own, and
returns those of the bias, the gate and the skip too. Saved for it: u where it is returned, otherwise x; with a gate
x and the gate as well; the parameters and the statistics.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, check_flag, check_number, check_tensor
from ..dispatch import uses_triton
from .masked_plain import BY_NUMBER, MASKED_ACTIVATIONS, NUMBERS
from .register import define_op

NORMS = ("none", "given", "of the batch")
"""What normalises; an index is the kernel's number."""

NUMBER_OR_NONE = {**NUMBERS, None: -1}
_Outputs = tuple[Tensor | None, ...]


def norm_activate(
    x: Tensor,
    activation: str | None,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    shift: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    *,
    skip: Tensor | None = None,
    gate: Tensor | None = None,
    with_sum: bool = False,
    of_batch: bool = False,
    eps: float = 1e-5,
) -> _Outputs:
    """(u, y, mean, unbiased variance) of the formula above, or None for what is not computed.

    The last two are the statistics of the batch [H], in fp32 or wider.

    Args:
        x: [B, H].
        activation: "relu", "silu", "tanh", "gelu" or "elu"; None for u alone, without a norm.
        bias: b [H], added to x first; None for 0.
        weight, shift: w and s [H], of the norm; None for 1 and 0.
        mean, var: [H], what normalises. Both None, and no ``of_batch``: no norm. They have no gradient in a kernel.
        skip: h [B, H], of x's dtype; None for 0.
        gate: g [B or 1, H], one row for all samples; None for no gate.
        with_sum: return u; it is also returned where there is a skip or a gate, or no activation.
        of_batch: normalise by the statistics of the batch, which the last two results are.
        eps: added to the variance; at least 0, with ``of_batch`` above 0, as in torch.

    The op is computed in fp32, or in float64 where an argument is; u and y have x's dtype, and y is that of the
    rounded u where u is returned. No gradient flows through the returned statistics.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an option is unknown; a shape does not fit x; a batch of fewer than two rows is to normalise
            itself.
    """
    parameters = {"bias": bias, "weight": weight, "shift": shift, "mean": mean, "var": var}
    norm = _check(x, activation, parameters, of_batch)
    check_number("eps", eps, 0.0, above=of_batch)
    check_flag("with_sum", with_sum)
    _check_shape("skip", skip, x, x.shape, same_dtype=True)
    _check_shape("gate", gate, x, x.shape, (1, *x.shape[1:]))
    with_sum = with_sum or activation is None or skip is not None or gate is not None
    given = (x, bias, skip, gate, weight, shift, mean, var)
    fixed = not any(t is not None and t.requires_grad for t in (mean, var))
    runs = uses_triton(*(t for t in given if t is not None)) and fixed
    run: Any = _norm_activate if runs else norm_activate_reference
    found = run(*given, norm, eps, NUMBER_OR_NONE[activation], with_sum)
    made = with_sum, activation is not None, of_batch, of_batch
    u, y, *statistics = (t if is_made else None for t, is_made in zip(found, made, strict=True))
    return u, y, *(t if t is None else t.detach() for t in statistics)


def norm_activate_reference(
    x: Tensor, bias: Tensor | None, skip: Tensor | None, gate: Tensor | None, weight: Tensor | None,
    shift: Tensor | None, mean: Tensor | None, var: Tensor | None, norm: int, eps: float, activation: int,
    with_sum: bool, memory: Tensor | None = None,
) -> _Outputs:  # fmt: skip
    """``norm_activate`` in plain torch; ``memory``: where y is to be, if it matters."""
    compute = _wide(x, bias, skip, gate, weight, shift, mean, var)
    u = _sum(compute, x, bias, skip, gate)
    rounded = u.to(x.dtype, copy=u is x) if with_sum else None
    u = u if rounded is None else rounded.to(compute)
    y, *statistics = _normalised(compute, mean, var, norm, eps, activation, u, weight, shift)
    y = y if y is None else y.to(x.dtype) if memory is None else memory.copy_(y)
    return rounded, y, *statistics


def _wide(*tensors: Tensor | None) -> torch.dtype:
    """The dtype to compute in."""
    return functools.reduce(torch.promote_types, [t.dtype for t in tensors if t is not None], torch.float32)


def _sum(compute: torch.dtype, x: Tensor, bias: Tensor | None, skip: Tensor | None, gate: Tensor | None) -> Tensor:
    """u."""
    u = x.to(compute)
    u = u if bias is None else u + bias.to(compute)
    u = u if gate is None else u * gate.to(compute).sigmoid()
    return u if skip is None else skip.to(compute) + u


def _normalised(
    compute: torch.dtype, mean: Tensor | None, var: Tensor | None, norm: int, eps: float, activation: int,
    u: Tensor, weight: Tensor | None, shift: Tensor | None,
) -> _Outputs:  # fmt: skip
    """(y or None, and the mean and unbiased variance of the batch or None)."""
    found: _Outputs = None, None
    u = u.to(compute)
    if norm == NORMS.index("of the batch"):
        var, mean = torch.var_mean(u, 0, correction=0)
        found = mean, var * (u.shape[0] / (u.shape[0] - 1))
    if mean is not None and var is not None:
        u = (u - mean.to(compute)) * (var.to(compute) + eps).rsqrt()
        u = u if weight is None else u * weight.to(compute)
        u = u if shift is None else u + shift.to(compute)
    return BY_NUMBER[activation](u) if activation >= 0 else None, *found


def _backward(
    u: Tensor, x: Tensor | None, bias: Tensor | None, gate: Tensor | None, weight: Tensor | None,
    shift: Tensor | None, mean: Tensor | None, var: Tensor | None, batch_mean: Tensor, batch_var: Tensor,
    grad_u: Tensor | None, grad_y: Tensor | None, grad_mean: Tensor | None, grad_var: Tensor | None, norm: int,
    eps: float, activation: int, with_sum: bool, needs: Sequence[bool], memory: Tensor | None = None,
) -> _Outputs:  # fmt: skip
    """The gradients of (x, bias, skip, gate, weight, shift, mean, var); u is a sum: no gradient depends on skip."""
    compute = _wide(u if x is None else x, bias, gate, weight, shift, mean, var)
    if not with_sum and x is not None:
        u = _sum(compute, x, bias, None, None)
    tail = functools.partial(_normalised, compute, mean, var, norm, eps, activation)
    of_u, *of_norm = pulled_back(lambda *given: tail(*given)[0], (u, weight, shift), grad_y)
    assert of_u is not None
    of_u = of_u.to(compute) if grad_u is None else of_u.to(compute) + grad_u
    found = pulled_back(functools.partial(_sum, compute), (u if x is None else x, bias, u, gate), of_u)
    return tuple(value if need else None for value, need in zip((*found, *of_norm, None, None), needs, strict=True))


def pulled_back(
    function: Callable[..., Any], given: Sequence[Tensor | None], grad: Tensor | None
) -> list[Tensor | None]:
    """The gradients of the given tensors, for that of the function's value; zeros where it is None."""
    if grad is None:
        return [t if t is None else torch.zeros_like(t) for t in given]
    here = [t is not None for t in given]

    def of_those(*tensors: Tensor) -> Tensor:
        rest = iter(tensors)
        return function(*(next(rest) if is_here else None for is_here in here))

    value, pull, *_ = torch.func.vjp(of_those, *(t for t in given if t is not None))
    found = iter(pull(grad.to(value.dtype)))
    return [next(found) if is_here else None for is_here in here]


def _gradients(u: Tensor, x: Tensor | None, bias: Tensor | None, gate: Tensor | None, *rest: Any) -> _Outputs:
    like = u if x is None else x
    of_gate = gate if gate is None else gate.new_empty(gate.shape) if gate.shape[0] == 1 else torch.empty_like(gate)
    of_bias, *of_norm = (t if t is None else t.new_empty(t.shape) for t in (bias, *rest[:2]))
    of_x = rest[-1] if isinstance(rest[-1], Tensor) else torch.empty_like(like)  # memory is the last argument
    return of_x, of_bias, torch.empty_like(like), of_gate, *of_norm, None, None


def _plain_backward(*arguments: Any) -> _Outputs:
    """``_backward`` in the strides of ``_gradients``."""
    pairs = zip(_gradients(*arguments), _backward(*arguments), strict=True)
    return tuple(None if made is None or value is None else made.copy_(value) for made, value in pairs)


def _fake(x: Tensor, *rest: Any) -> _Outputs:
    norm, _, activation, with_sum = rest[-4:]
    of_batch = norm == NORMS.index("of the batch")
    found = [x.new_empty(x.shape[1], dtype=torch.float32) if of_batch else None for _ in range(2)]
    return *(torch.empty_like(x) if made else None for made in (with_sum, activation >= 0)), *found


_norm_activate = define_op(
    "norm_activate(Tensor x, Tensor? bias, Tensor? skip, Tensor? gate, Tensor? weight, Tensor? shift, "
    "Tensor? mean, Tensor? var, int norm, float eps, int activation, bool with_sum) "
    "-> (Tensor u, Tensor y, Tensor batch_mean, Tensor batch_var)",
    _fake,
    norm_activate_reference,
    saves="u x? bias gate weight shift mean var batch_mean batch_var",
    omits=lambda *given: given[3] is None and given[-1],
    gradients=_gradients,
    backward=_backward,
    plain_backward=_plain_backward,
)


def _check(x: Tensor, activation: str | None, parameters: Mapping[str, Tensor | None], of_batch: bool) -> int:
    """The number of the norm."""
    check_tensor("x", x)
    if activation is not None:
        check_choice("activation", activation, tuple(MASKED_ACTIVATIONS))
    check_flag("of_batch", of_batch)
    if x.ndim != 2:
        raise ValueError(f"x must be [B, H]; got {tuple(x.shape)}")
    for name, tensor in parameters.items():
        _check_shape(name, tensor, x, x.shape[1:])
    mean = parameters["mean"]
    if (mean is None) != (parameters["var"] is None) or (of_batch and mean is not None):
        raise ValueError("mean and var must be given together, and without of_batch")
    given = of_batch or mean is not None
    if not given and not (parameters["weight"] is None and parameters["shift"] is None):
        raise ValueError("weight and shift are those of a norm: give mean and var, or of_batch")
    if given and activation is None:
        raise ValueError("activation is None: without one there is no norm")
    if of_batch and x.shape[0] < 2:
        got = tuple(x.shape)
        raise ValueError(f"x: Expected more than 1 value per channel when training, got input size {got}")
    return 2 if of_batch else int(given)


def _check_shape(
    name: str, tensor: Tensor | None, x: Tensor, *shapes: Sequence[int], same_dtype: bool = False
) -> None:
    if tensor is not None:
        check_tensor(name, tensor, x, same_dtype=same_dtype)
        if tensor.shape not in map(torch.Size, shapes):
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"{name} must be {wanted} for x {tuple(x.shape)}; got {tuple(tensor.shape)}")
