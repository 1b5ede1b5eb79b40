"""Latent product: y_b = A_b z_b + alpha z_b + bias for each row z_b of z; for one A, y = z @ A.mT + alpha z + bias.

| A                | runs                                                                              |
|------------------|-----------------------------------------------------------------------------------|
| shared           | F.linear, that is cuBLAS or MKL: no kernel of ours is faster                      |
| one per sample   | bmm, which takes as long as reading A once                                        |
| a bank and index | on a GPU linfast.kernels.latent_matmul, a grouped product that never gathers A;   |
|                  | on a CPU, in float64 and on AMD's GPUs other than gfx942, rows sorted by operator |
|                  | and one product per operator                                                      |

The bank's kernel also adds the bias and, for a number alpha, alpha z. A tensor alpha is applied outside it: to read
its value the host would have to wait for the GPU. On a CPU, too, a bank is one op: the number of rows per operator
depends on the data, which would break torch.compile(fullgraph=True).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_dense, check_factor, check_tensor
from ..dispatch import interpreting, uses_triton
from ..kernels.stack_configs import mode_on, target_of
from ..precision import part_dtype, resolve_precision
from .register import define_op


def latent_matmul(
    z: Tensor,
    A: Tensor,
    index: Tensor | None = None,
    *,
    alpha: float | Tensor = 0.0,
    bias: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """y_b = A_b z_b + alpha z_b + bias, with A_b = A, A[b] or A[index[b]].

    Args:
        z: [B, n_in].
        A: [n_out, n_in]; [B, n_out, n_in] for one operator per sample; [K, n_out, n_in] with ``index``.
        index: [B] int64, the operator of each row. The host does not read it for the kernel: a row whose index is
            outside [0, K) gives NaN and does not contribute to A's gradient. It does in plain torch, which also
            AMD's GPUs other than gfx942 run, for which Triton cannot compile the kernel.
        alpha: a number or a 0-d tensor; n_out = n_in unless it is the number 0.
        bias: [n_out].
        precision: of a bank's products on a GPU, "exact", "high", "tf32" or "fast"; None: as torch is set
            (linfast.precision). Other products, those in plain torch too, are torch's own, in torch's precision.

    Sums are in fp32 or wider; y has z's dtype. A bank's gradients of fp32 tensors are not rounded to fp16, whose
    range is too small for them: under autocast to fp16 their operands are bf16.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit together, the precision is unknown or given without an index, or, in plain
            torch and on a CPU, an index is outside [0, K).
    """
    _check(z, A, index, alpha, bias)
    if precision is not None and index is None:
        raise ValueError(
            f"precision must be None without an index, where torch's own products run; got {precision!r}"
        )
    mode = mode_on(target_of(z), resolve_precision(z, precision))
    if z.dtype != A.dtype or (bias is not None and bias.dtype != z.dtype):
        wide = torch.promote_types(z.dtype, A.dtype if bias is None else torch.promote_types(A.dtype, bias.dtype))
        given = {"alpha": alpha, "bias": None if bias is None else bias.to(wide), "precision": precision}
        return latent_matmul(z.to(wide), A.to(wide), index, **given).to(z.dtype)  # type: ignore[arg-type]
    number = 0.0 if isinstance(alpha, Tensor) else float(alpha)
    if index is None and A.ndim == 2:
        y = F.linear(z, A, bias)
        y = y + number * z if number else y
    elif index is None:
        y = _add(torch.einsum("bn,bmn->bm", z, A), z, bias, number)
    elif _is_one_op(z, A):
        y = _bank(z, A, index, bias, number, mode, part_dtype(z, mode), part_dtype(z, "exact"))
    else:
        y = bank_reference(z, A, index, bias, number)
    return alpha * z + y if isinstance(alpha, Tensor) else y


def _is_one_op(z: Tensor, A: Tensor) -> bool:
    """Whether a bank is one op: where its kernels run, on a CPU without the interpreter, and on the meta device.

    Of AMD's GPUs Triton has products in tf32, and therefore compiles the kernels, for gfx942 only.
    """
    if uses_triton(z, A):
        return torch.version.hip is None or target_of(z) is not None
    return z.is_meta or (z.device.type == "cpu" and not interpreting())


def bank_reference(
    z: Tensor, A: Tensor, index: Tensor, bias: Tensor | None = None, alpha: float = 0.0, *_: Any
) -> Tensor:
    """``latent_matmul`` of a bank in plain torch: one product per operator, A read in place."""
    if z.shape[0] == 0:
        return _add(z @ A.sum(0).mT, z, bias, alpha)  # empty, but autograd still connects it to z, A and bias
    if _is_batched(index):
        y = z.new_zeros(z.shape[0], A.shape[1])
        for picked, operator in _picks(index, A):
            y = y + torch.where(picked, z @ operator.mT, 0)
        return _add(y, z, bias, alpha)
    order, counts = _sorted_rows(index, A.shape[0])
    pieces = zip(z.index_select(0, order).split(counts), A.unbind(0), strict=True)
    y = torch.cat([piece @ operator.mT for piece, operator in pieces if len(piece)])
    return _add(y.index_select(0, order.argsort()), z, bias, alpha)


def _sorted_rows(index: Tensor, n_operators: int) -> tuple[Tensor, list[int]]:
    """(row numbers sorted by operator, number of rows of each operator)."""
    low, high = map(int, index.aminmax())
    if low < 0 or high >= n_operators:
        raise ValueError(f"index must be in [0, {n_operators}), the range of A's operators; got {low} to {high}")
    return index.argsort(stable=True), index.bincount(minlength=n_operators).tolist()


def _is_batched(index: Tensor) -> bool:
    """Whether vmap maps over the index, whose values can then not be read, only used in torch.where."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(index):
        if functorch.is_batchedtensor(index):
            return True
        index = functorch.get_unwrapped(index)
    return False


def _picks(index: Tensor, A: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(mask [B, 1] of the rows with index k, A_k) for every operator k."""
    return [((index == k)[:, None], operator) for k, operator in enumerate(A.unbind(0))]


def _add(y: Tensor, z: Tensor, bias: Tensor | None, alpha: float) -> Tensor:
    y = y if alpha == 0 else y + alpha * z
    return y if bias is None else y + bias


def bank_backward_reference(
    z: Tensor, A: Tensor, index: Tensor, grad: Tensor | None, alpha: float, *rest: Any
) -> tuple[Tensor | None, ...]:
    """(dz, dA, None for the index, dbias); the formulas are in linfast.kernels.latent_matmul."""
    needs = rest[-1]
    grad = z.new_zeros(z.shape[0], A.shape[1]) if grad is None else grad
    dz = bank_reference(grad, A.mT, index, None, alpha) if needs[0] else None
    dA = _operators_gradient(z, A, index, grad) if needs[1] else None
    return dz, dA, None, grad.sum(0) if needs[3] else None


def _operators_gradient(z: Tensor, A: Tensor, index: Tensor, grad: Tensor) -> Tensor:
    if z.shape[0] == 0 or A.shape[0] == 0:
        return torch.zeros_like(A, memory_format=torch.contiguous_format)
    if _is_batched(index):
        return torch.stack([torch.where(picked, grad, 0).mT @ z for picked, _ in _picks(index, A)])
    order, counts = _sorted_rows(index, A.shape[0])
    pairs = zip(*(x.index_select(0, order).split(counts) for x in (grad, z)), strict=True)
    return torch.stack([g.mT @ rows for g, rows in pairs])


def _gradients(z: Tensor, A: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return z.new_empty(z.shape), A.new_empty(A.shape), None, z.new_empty(A.shape[1])


_bank = define_op(
    "latent_matmul(Tensor z, Tensor A, Tensor index, Tensor? bias, float alpha, str precision, "
    "ScalarType part_dtype, ScalarType gradient_dtype) -> Tensor",
    lambda z, A, *_: z.new_empty(z.shape[0], A.shape[1]),
    bank_reference,
    saves="z A index",
    gradients=_gradients,
    backward=bank_backward_reference,
)


def _check(z: Tensor, A: Tensor, index: Tensor | None, alpha: float | Tensor, bias: Tensor | None) -> None:
    check_tensor("z", z)
    check_tensor("A", A, z, "z")
    is_zero = type(alpha) in (int, float) and alpha == 0
    if not is_zero:
        check_factor("alpha", alpha, z, "z")
    if z.ndim != 2 or A.ndim not in (2, 3) or A.shape[-1] != z.shape[1]:
        raise ValueError(
            f"z must be [B, n_in] and A [..., n_out, n_in]; got z {tuple(z.shape)} and A {tuple(A.shape)}"
        )
    if index is not None:
        check_dense("index", index)
        if A.ndim != 3:
            raise ValueError(f"A must be a bank [K, n_out, n_in] when an index is given; got {tuple(A.shape)}")
        if index.shape != z.shape[:1] or index.dtype != torch.int64 or index.device != z.device:
            raise ValueError(
                f"index must be [{z.shape[0]}] int64 on {z.device} for z {tuple(z.shape)}; "
                f"got {tuple(index.shape)} {str(index.dtype).removeprefix('torch.')} on {index.device}"
            )
    elif A.ndim == 3 and A.shape[0] != z.shape[0]:
        raise ValueError(
            f"A has {A.shape[0]} operators for {z.shape[0]} rows of z: give an index, or one operator per row"
        )
    if not is_zero and A.shape[-2] != A.shape[-1]:
        raise ValueError(f"alpha must be 0 unless A is square; got A {tuple(A.shape)}")
    if bias is not None:
        check_tensor("bias", bias, z, "z")
    if bias is not None and bias.shape != A.shape[-2:-1]:
        raise ValueError(f"bias must be [{A.shape[-2]}] for A {tuple(A.shape)}; got {tuple(bias.shape)}")
