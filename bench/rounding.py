"""The rounding error that a computation is allowed: a model of narrow arithmetic, the same on every machine.

Under ``Rounding`` every operation of plain torch on fp32, fp16 or bf16 tensors, forward and
backward, is computed in float64, changed by a random error of the size that floating-point
units make, and rounded to its dtype. With e = 2^-23 (sums and functions are computed in
fp32 for every dtype) and u uniform in (-1, 1), drawn for each element:

    a result exact in its dtype      unchanged: copies, views, masks, products with powers of two
    + - * / sqrt                     y (1 + e u)
    a sum of n terms t               y + e/2 sqrt(n) (u |t|_2 + u' y), |t|_2 = sqrt(sum of t^2): serial summation
                                     in any order has a smaller error, summation in parts a much smaller one
    any other function f             f(x (1 + e/2 u)) (1 + e u), the error of exp2(x log2 e) for exp; where f
                                     mixes elements (an inverse, a softmax) both errors are sqrt(n) times as large

One pass is one draw of the error; its size is the same on every machine. Several draws
give the allowance of a kernel's error, in relative L2 against float64:

    allowed = 2 rms(draws) + 3 (max(draws) - min(draws)), at least eps(dtype)

so that an output of one number, whose error is often small by luck, is allowed more than
one of thousands, whose error is nearly the same in every draw.

For a mode whose products round their fp32 operands, the draws round them too: ``operand_rounding``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

try:
    from linfast.dispatch import has_kernels, plain_torch
except ModuleNotFoundError:  # an older commit, on which --compare runs these benchmarks
    from linfast.backend import has_kernels, plain_torch  # type: ignore[import-not-found, no-redef]  # noqa: F401

_Outputs = TypeVar("_Outputs")

DRAWS = 6
_EPS = torch.finfo(torch.float32).eps
_NARROW = (torch.float32, torch.float16, torch.bfloat16)

_aten = torch.ops.aten
# Linear in each argument: for squared arguments they return the sums of squared terms, for ones the counts.
_SUMS = {
    _aten.sum, _aten.mm, _aten.bmm, _aten.addmm, _aten.baddbmm, _aten.mv, _aten.dot,
    _aten.convolution, _aten.convolution_backward,
}  # fmt: skip
_ARITHMETIC = {
    _aten.add, _aten.sub, _aten.rsub, _aten.mul, _aten.div, _aten.reciprocal, _aten.sqrt,
    _aten.add_, _aten.sub_, _aten.mul_, _aten.div_, _aten.reciprocal_, _aten.sqrt_,
}  # fmt: skip
# The arguments of a matrix product that a mode rounds.
_OPERANDS = {
    _aten.mm: slice(0, 2), _aten.bmm: slice(0, 2), _aten.addmm: slice(1, 3), _aten.baddbmm: slice(1, 3),
    _aten.convolution: slice(0, 2), _aten.convolution_backward: slice(0, 3),
}  # fmt: skip
# The parts that each mode of linfast.precision promises. Not read from the kernels: one with fewer must not pass.
N_PARTS = {"exact": 3, "high": 2, "tf32": 1, "fast": 1}
# Exact in any dtype, or rounded once by definition. Other exact results are recognised by their values.
_EXACT = {
    _aten._to_copy, _aten.copy_, _aten.clone, _aten.cat, _aten.neg, _aten.where, _aten.flip, _aten.slice_backward,
    _aten.new_zeros, _aten.zeros_like, _aten.ones_like, _aten.zero_, _aten.fill_,
}  # fmt: skip


def allowed_errors(
    reference: Callable[[], Sequence[Tensor | None]],
    truth: Sequence[Tensor | None],
    operands: Callable[[Tensor], Tensor] | None = None,
) -> list[float]:
    """The allowance of each output of ``reference``, by the formula above; 0 where it is None.

    Args:
        reference: plain torch on narrow tensors; called ``DRAWS`` times.
        truth: the same outputs in float64.
        operands: rounds the fp32 operands of matrix products.
    """
    errors = []
    for seed in range(DRAWS):
        outputs = drawn(reference, seed, operands)
        errors.append([relative_error(o, t) for o, t in zip(outputs, truth, strict=True)])
    pairs = zip(zip(*errors, strict=True), outputs, strict=True)
    return [0.0 if output is None else allowed_error(e, output.dtype) for e, output in pairs]


def operand_rounding(precision: str, half: torch.dtype = torch.bfloat16) -> Callable[[Tensor], Tensor]:
    """The rounding of an fp32 operand in a mode of linfast.precision: to tf32, or to a sum of parts in ``half``.

    Each call scales t by a random factor, rounds, and scales back. Otherwise all draws would lose the same digits
    and would not vary. "exact" rounds nothing: its error is fp32's own, whether its operands are three bf16 parts,
    which represent all of fp32, or, in stacks, two scaled fp16 parts, which keep 22 bits.
    """

    def rounded(t: Tensor) -> Tensor:
        if precision == "tf32":  # ten bits after the point, to nearest
            return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
        total = torch.zeros_like(t)
        for _ in range(N_PARTS[precision]):
            total = total + (t - total).to(half).to(t.dtype)
        return total

    generator = torch.Generator().manual_seed(0)

    def on_another_grid(t: Tensor) -> Tensor:
        scale = 1 + torch.rand((), generator=generator).to(t)
        return rounded(t * scale) / scale

    return rounded if precision == "exact" else on_another_grid


def drawn(
    reference: Callable[[], _Outputs], seed: int, operands: Callable[[Tensor], Tensor] | None = None
) -> _Outputs:
    """The outputs of ``reference`` with one draw of the error. It raises where ``reference`` runs a kernel."""
    with plain_torch(), Rounding(seed, operands):
        return reference()


def allowed_error(errors: Sequence[float], dtype: torch.dtype) -> float:
    """The allowance that these draws of one output's error give, by the formula above."""
    rms = math.sqrt(sum(e * e for e in errors) / len(errors))
    return max(2 * rms + 3 * (max(errors) - min(errors)), torch.finfo(dtype).eps)


def relative_error(value: Tensor | None, truth: Tensor | None) -> float:
    """|value - truth| / |truth| in float64, or |value| where the truth is zero; 0 where either is None."""
    if value is None or truth is None:
        return 0.0
    truth = truth.detach().double()
    size = float(truth.norm())
    return float((value.detach().to(truth) - truth).norm()) / (size or 1.0)


class Rounding(TorchDispatchMode):
    """A context in which plain torch rounds as the model above says, with errors drawn from ``seed``.

    Without a seed no error is added: every operation is exact and its result rounded to nearest. ``operands`` is
    first applied to the fp32 operands of matrix products.
    """

    def __init__(self, seed: int | None = None, operands: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self._seed, self._operands = seed, operands
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _STEPS:
            with self:
                return _STEPS[func](*args, **kwargs)
        if func.namespace == "linfast" and not func._opname.endswith("_backward"):  # one that runs in plain torch
            from linfast.ops.register import RAW_OPS

            with self:
                return RAW_OPS[func._opname]._run("cpu", *args)
        as_it_is = func.is_view or func.overloadpacket in _EXACT or torch.Tag.nondeterministic_seeded in func.tags
        if as_it_is or not any(
            isinstance(t, Tensor) and t.dtype in _NARROW and not t.is_meta for t in _leaves((args, kwargs))
        ):
            return func(*args, **kwargs)
        if self._operands is not None and func.overloadpacket in _OPERANDS:
            at, args = _OPERANDS[func.overloadpacket], list(args)
            args[at] = [self._operands(t) if t.dtype == torch.float32 else t for t in args[at]]
        wide, wide_kwargs = _map(lambda t: t.to(torch.float64, copy=True), (args, kwargs))
        outputs = func(*args, **kwargs)  # for the dtypes, and to write in place
        values = self._moved(func, wide, wide_kwargs, _leaves(outputs))
        for output, value in zip(_leaves(outputs), values, strict=True):
            if isinstance(output, Tensor) and value is not None:
                output.copy_(value)
        return outputs

    def _moved(self, func: Any, args: Any, kwargs: Any, narrow: list[Any]) -> list[Tensor | None]:
        """The operation's float64 outputs with the model's errors added; ``narrow`` are its ordinary outputs."""
        exact = _run(func, args, kwargs)
        if self._seed is None:
            return exact
        if func.overloadpacket in _SUMS:
            squares = _run(func, *_map(torch.square, (args, kwargs)))
            counts = _run(func, *_map(torch.ones_like, (args, kwargs)))
            return list(map(self._moved_sum, exact, squares, counts))
        pairs = zip(exact, narrow, strict=True)
        fits = [_fits(t, like.dtype) for t, like in pairs if isinstance(t, Tensor)]
        if all(bool(f.all()) for f in fits):
            return exact
        if func.overloadpacket in _ARITHMETIC:
            return [self._scaled(exact[0], ~fits[0] * _EPS)]
        first = next(t for t in _leaves((args, kwargs)) if isinstance(t, Tensor) and t.dtype == torch.float64)
        size = _EPS if torch.Tag.pointwise in func.tags else _EPS * math.sqrt(max(first.shape[-1:], default=1))
        moved = _run(func, *_map(lambda t: self._scaled(t, size / 2), (args, kwargs)))
        return [self._scaled(t, size) for t in moved]

    def _moved_sum(self, total: Tensor | None, squares: Tensor, count: Tensor) -> Tensor | None:
        if total is None:
            return None
        size = _EPS / 2 * count.sqrt() * (count > 1)
        return total + size * (self._uniform(total) * squares.sqrt() + self._uniform(total) * total)

    def _scaled(self, t: Tensor, size: Tensor | float) -> Tensor:
        return t * (1 + size * self._uniform(t)) if t.dtype == torch.float64 else t

    def _uniform(self, like: Tensor) -> Tensor:
        assert self._seed is not None
        if like.device not in self._generators:
            self._generators[like.device] = torch.Generator(like.device).manual_seed(self._seed)
        generator = self._generators[like.device]
        return 2 * torch.rand(like.shape, generator=generator, dtype=torch.float64, device=like.device) - 1


def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, N: int, C: int, HxW: int, group: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """native_group_norm, step by step: torch's own loses digits where the values of a group are close."""
    grouped = x.reshape(N, group, C // group * HxW).float()
    mean = grouped.sum(2) / grouped.shape[2]
    apart = grouped - mean[..., None]
    rstd = ((apart * apart).sum(2) / grouped.shape[2] + eps).rsqrt()
    y = (apart * rstd[..., None]).reshape(N, C, HxW)
    y = y if weight is None else y * weight[:, None]
    y = y if bias is None else y + bias[:, None]
    return y.reshape(x.shape).to(x.dtype), mean, rstd


def _group_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None,
    N: int, C: int, HxW: int, group: int, output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """native_group_norm_backward, step by step."""
    grad = grad.reshape(N, C, HxW).float()
    normal = (x.reshape(N, group, C // group * HxW).float() - mean[..., None]) * rstd[..., None]
    d = (grad if weight is None else grad * weight[:, None]).reshape(normal.shape)
    n = normal.shape[2]
    dx = rstd[..., None] * (d - d.sum(2, keepdim=True) / n - normal * ((d * normal).sum(2, keepdim=True) / n))
    narrow = x.dtype if weight is None else weight.dtype
    return (
        dx.reshape(x.shape).to(x.dtype),
        (grad * normal.reshape(N, C, HxW)).sum((0, 2)).to(narrow) if output_mask[1] else None,
        grad.sum((0, 2)).to(narrow) if output_mask[2] else None,
    )


def _mean(x: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
    total = x.sum(list(dim) if dim is not None else None, keepdim, dtype=dtype)
    return total / (x.numel() // max(total.numel(), 1))


_STEPS: dict[Any, Callable[..., Any]] = {
    _aten.native_group_norm.default: _group_norm,
    _aten.native_group_norm_backward.default: _group_norm_backward,
    _aten.mean.default: _mean,
    _aten.mean.dim: _mean,
}


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply the function to every float tensor in the structure, and replace narrow dtypes by float64."""
    if isinstance(value, Tensor):
        return function(value) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _map(function, item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_map(function, item) for item in value)
    return torch.float64 if value in _NARROW else value


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list, dict)):
        return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in _leaves(item)]
    return [value]


def _run(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The outputs for these arguments; an in-place operation writes to copies."""
    if func.overloadpacket.__name__.endswith("_"):  # in place
        args, kwargs = _map(torch.clone, args), _map(torch.clone, kwargs)
    return _leaves(func(*args, **kwargs))


def _fits(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Where the value is exactly representable in the dtype, or is NaN."""
    return (t.to(dtype).to(t.dtype) == t) | (t != t)
