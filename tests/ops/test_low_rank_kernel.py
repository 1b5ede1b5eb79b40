"""The low-rank product's kernels against float64: shared and per-sample factors, ranks, layouts and strides."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from linfast.bench.timing import peak_bytes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import linfast as lf
from linfast.ops import low_rank
from tests.marks import long
from tests.ops.budget import DEVICE, HALF_DTYPES, Outputs, assert_accurate, assert_within_budget, hostile
from tests.ops.checks import (
    assert_compiles_whole,
    assert_registered,
    assert_same_bits,
    assert_transforms,
    fixed_cotangents,
    refuse_launches,
    second_derivatives,
    squared_sum,
)

# (B, N, M, r): odd sizes, one element, a rank above one tile, more rows than one tile and than all splits.
SIZES = [
    (3, 7, 7, 3),
    (9, 7, 7, 2),
    (1, 2, 2, 1),
    (1, 1, 1, 1),
    (2, 300, 300, 8),
    (2, 9, 33, 5),
    (2, 33, 9, 70),
    (1, 5000, 40, 64),
    (4, 600, 600, 4),
]
KINDS = ["both", "shared U", "shared V"]


def _inputs(
    size: tuple[int, int, int, int], kind: str = "both", dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    batch, n_in, n_out, rank = size
    U, V = torch.randn(batch, n_out, rank), torch.randn(batch, n_in, rank)
    shapes = (torch.randn(batch, n_in), U[0] if kind == "shared U" else U, V[0] if kind == "shared V" else V)
    return [t.to(DEVICE, dtype).clone().requires_grad_() for t in shapes]


def _outputs_and_gradients(alpha: float = 0.0):
    """(y, dx, dU, dV) for a fixed random cotangent."""

    def call(x: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, ...]:
        y = low_rank(x, U, V, alpha)
        return (y, *torch.autograd.grad(y, (x, U, V), fixed_cotangents(y)))

    return call


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_size_and_sharing(size: tuple[int, int, int, int], kind: str) -> None:
    assert_within_budget(_outputs_and_gradients(), _inputs(size, kind))
    if size[1] == size[2]:
        assert_within_budget(_outputs_and_gradients(-1.3), _inputs(size, kind))


@pytest.mark.parametrize(
    "size", [(0, 5, 5, 2), (2, 5, 5, 0), (0, 5, 5, 0), (2, 0, 0, 3), (2, 0, 4, 3), (2, 4, 0, 3)]
)
@pytest.mark.parametrize("kind", ["both", "shared U"])
def test_empty_sizes(size: tuple[int, int, int, int], kind: str) -> None:
    if size[0] == 0 and kind != "both":
        size = (1, *size[1:])
    for alpha in (0.0, 1.5) if size[1] == size[2] else (0.0,):
        assert_within_budget(_outputs_and_gradients(alpha), _inputs(size, kind))


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_sums_in_fp32(kind: str, dtype: torch.dtype) -> None:
    x, U, V = _inputs((3, 600, 600, 8), kind, dtype)
    with lf.backend("triton"):
        assert low_rank(x, U, V).dtype == dtype
    assert_within_budget(_outputs_and_gradients(0.5), [x, U, V])


@pytest.mark.parametrize("kind", KINDS)
def test_strides_of_inputs_and_of_the_incoming_gradient(kind: str) -> None:
    tensors = [t.detach() for t in _inputs((5, 6, 6, 4), kind)]
    cotangent = torch.randn(5, 6).to(DEVICE)
    for name in hostile(cotangent):
        strided = [hostile(t)[name].requires_grad_() for t in tensors]

        def call(x: Tensor, U: Tensor, V: Tensor, name: str = name) -> tuple[Tensor, ...]:
            y = low_rank(x, U, V, 0.7)
            gradient = hostile(cotangent.to(y.dtype))[name]
            return (y, *torch.autograd.grad(y, (x, U, V), gradient))

        assert_within_budget(call, strided)


def test_transposed_factors_and_ones_that_keep_only_the_rank_dense() -> None:
    x, U, V = (t.detach() for t in _inputs((3, 40, 40, 4)))
    wide = torch.full((3, 40, 9), float("nan"), device=DEVICE)
    wide[..., 2:6] = U
    transposed = V.mT.contiguous().mT
    assert_within_budget(_outputs_and_gradients(), [t.requires_grad_() for t in (x, wide[..., 2:6], transposed)])


@pytest.mark.parametrize("only", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_each_gradient_alone(only: int, kind: str) -> None:
    inputs = [t.detach().requires_grad_(i == only) for i, t in enumerate(_inputs((3, 20, 20, 3), kind))]

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(low_rank(*inputs, 0.3).square().sum(), inputs[only])

    assert_within_budget(call, inputs)


def test_gradients_that_are_not_needed_are_not_computed() -> None:
    x, U, V = (t.detach() for t in _inputs((3, 20, 20, 3)))
    t = torch.einsum("bn,bnr->br", x, V)
    run = torch.ops.linfast.low_rank_backward.default
    assert [tuple(g.shape) for g in run(x, U, V, t, x, None, 0.0, [False, True, False])] == [(0,), (3, 20, 3), (0,)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [False, True])
def test_a_gradient_of_the_projection_is_added(kind: str, given: bool) -> None:
    from linfast.ops.register import RAW_OPS

    reference = RAW_OPS["low_rank_backward"].reference

    x, U, V = (t.detach() for t in _inputs((3, 20, 20, 3), kind))
    t = torch.einsum("bn,nr->br" if V.ndim == 2 else "bn,bnr->br", x, V)
    grad_t, grad = torch.randn(3, 3), torch.randn(3, 20)
    tensors = [x, U, V, *(t.to(DEVICE) for t in (t, grad_t, grad))]

    def call(run: Callable[..., Outputs], dtype: torch.dtype) -> Outputs:
        x, U, V, t, grad_t, grad = (t.to(dtype) for t in tensors)
        return run(x, U, V, t, grad if given else None, grad_t, 0.5, [True, True, True])

    assert_accurate(
        call(torch.ops.linfast.low_rank_backward.default, torch.float32),
        lambda: call(reference, torch.float32),
        call(reference, torch.float64),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_alpha_as_a_tensor_has_a_gradient(kind: str) -> None:
    def call(x: Tensor, U: Tensor, V: Tensor, alpha: Tensor) -> tuple[Tensor, ...]:
        y = low_rank(x, U, V, alpha)
        return (y, *torch.autograd.grad(y.square().sum(), (x, U, V, alpha)))

    alpha = torch.tensor(1.3, device=DEVICE, requires_grad=True)
    assert_within_budget(call, [*_inputs((3, 20, 20, 3), kind), alpha])


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_the_references(kind: str) -> None:
    call = second_derivatives(lambda x, U, V: low_rank(x, U, V, 0.4).pow(3).sum())
    assert_within_budget(call, _inputs((2, 5, 5, 2), kind))


def test_the_same_bits_in_any_batch() -> None:
    inputs = _inputs((3, 700, 700, 8))
    with lf.backend("triton"), torch.no_grad():
        together = low_rank(*inputs, 0.5)
        alone = low_rank(*(t[1:2] for t in inputs), 0.5)
    assert torch.equal(alone[0], together[1])


@pytest.mark.parametrize("kind", KINDS)
def test_int64_offsets_and_a_second_run_give_the_same_bits(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    import linfast.kernels.low_rank as kernels

    assert_same_bits(_outputs_and_gradients(0.5), _inputs((3, 300, 300, 5), kind), monkeypatch, kernels)


@pytest.mark.parametrize(("kind", "alpha"), [("both", 0.5), *long(("shared U", 0.0), ("shared V", 0.5))])
def test_opcheck(kind: str, alpha: float) -> None:
    x, U, V = (t.detach() for t in _inputs((3, 7, 7, 2), kind))
    assert_registered(torch.ops.linfast.low_rank.default, (x, U, V, alpha))
    t, grad = torch.randn(3, 2, device=DEVICE), torch.randn_like(x)
    needs = ([True, True, True], [True, False, False], [False, True, False], [False, False, True])
    grads = ((grad, None), (None, t), (grad, t))
    calls = [(x, U, V, t, *given, alpha, needed) for given in grads for needed in needs]
    assert_registered(torch.ops.linfast.low_rank_backward.default, *calls)


@pytest.mark.skipif(DEVICE != "cpu", reason="the plain path's memory")
@pytest.mark.parametrize("kind", KINDS)
def test_no_matrix_of_n_by_n_is_made(kind: str) -> None:
    inputs = [t.detach() for t in _inputs((2, 2048, 2048, 2), kind)]

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        inputs = tuple(t.detach().requires_grad_() for t in inputs)
        return torch.autograd.grad(low_rank(*inputs, 0.5).sum(), inputs)

    assert peak_bytes(call, tuple(inputs), torch.device("cpu")) < 2048 * 2048  # a quarter of one fp32 matrix


@pytest.mark.parametrize(("n", "longest"), [(12288, 384), (1000, 500), (12289, 12289)])
def test_long_sums_of_the_plain_form_are_taken_in_parts(n: int, longest: int) -> None:
    """Forward and backward, where a power of two divides N."""
    lengths = [1]

    class Lengths(TorchDispatchMode):
        """Records the number of terms in each batched product."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.bmm.default:
                lengths.append(args[0].shape[2])
            return func(*args, **(kwargs or {}))

    with Lengths():
        _outputs_and_gradients()(*_inputs((4, n, n, 3)))
    assert max(lengths) == longest


def test_it_compiles_whole_and_runs_the_kernels() -> None:
    assert_compiles_whole(squared_sum(partial(low_rank, alpha=0.5)), _inputs((3, 12, 12, 2)), "low_rank")


def test_functional_transforms() -> None:
    loss = squared_sum(partial(low_rank, alpha=0.5))

    def transforms(x: Tensor, U: Tensor, V: Tensor) -> list[Tensor]:
        one_row = torch.func.vmap(lambda *a: torch.func.grad(loss)(*(t[None] for t in a))[0])
        jacobian = torch.func.jacrev(lambda x: low_rank(x, U, V))
        return [*torch.func.grad(loss, argnums=(1, 2))(x, U, V), one_row(x, U, V), jacobian(x)]

    assert_transforms(transforms, loss, [t.detach() for t in _inputs((3, 4, 4, 2))])


def test_what_launches_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_launches(monkeypatch)
    x, U, V = (t.detach() for t in _inputs((3, 4, 4, 2)))
    with lf.backend("triton"):
        low_rank(x.double(), U.double(), V.double())
        low_rank(x, U[0], V[0])
        with pytest.raises(AssertionError, match="low_rank:launch"):
            low_rank(x, U, V)
    with lf.backend("reference"):
        low_rank(x, U, V)
