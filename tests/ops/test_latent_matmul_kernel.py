"""The bank's grouped product against float64: sizes, indices, layouts, alpha and bias; and the plain cases."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import linfast.kernels.latent_matmul as kernels
import pytest
import torch
from linfast.bench.timing import peak_bytes
from torch import Tensor

import linfast as lf
from linfast.ops import latent_matmul
from linfast.precision import PRECISIONS
from tests.launch_counts import Launches
from tests.marks import long
from tests.ops.budget import DEVICE, HALF_DTYPES, assert_within_budget, hostile
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
from tests.ops.stacks import rounding

# (B, K, n_out, n_in): all 1, more operators than rows, both tiles, more rows and columns than one tile.
SIZES = [(1, 1, 1, 1), (9, 3, 7, 5), (3, 11, 5, 7), (200, 3, 70, 33), (130, 1, 33, 70), (40, 2, 66, 66)]


def _inputs(
    size: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, bias: bool = True
) -> tuple[Tensor, list[Tensor]]:
    """(index, [z, A, bias])."""
    batch, n_operators, n_out, n_in = size
    index = torch.randint(n_operators, (batch,), device=DEVICE)
    shapes = [(batch, n_in), (n_operators, n_out, n_in), *([(n_out,)] if bias else [])]
    return index, [torch.randn(shape).to(DEVICE, dtype).requires_grad_() for shape in shapes]


@pytest.fixture(params=["row by row", "in tiles"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the kernels run; tests are too small to be in tiles by themselves."""
    if request.param == "in tiles":
        monkeypatch.setattr(kernels, "ELEMENTS_ALONE", -1)
    return request.param


def _outputs_and_gradients(index: Tensor, alpha: float = 0.0, **options: str):
    """(y, dz, dA, dbias) for a fixed random cotangent."""

    def call(z: Tensor, A: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        y = latent_matmul(z, A, index, alpha=alpha, bias=bias, **options)
        return (y, *torch.autograd.grad(y, [z, A] if bias is None else [z, A, bias], fixed_cotangents(y)))

    return call


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bias", [False, True])
def test_every_size(size: tuple[int, int, int, int], bias: bool) -> None:
    index, inputs = _inputs(size, bias=bias)
    assert_within_budget(_outputs_and_gradients(index), inputs)
    if size[2] == size[3]:
        assert_within_budget(_outputs_and_gradients(index, -1.3), inputs)


@pytest.mark.parametrize("picks", [[2] * 70, [0, 3] * 40, [3, 2, 1, 0], [1]])
def test_operators_without_rows_and_with_many(picks: list[int]) -> None:
    _, inputs = _inputs((len(picks), 4, 6, 6))
    assert_within_budget(_outputs_and_gradients(torch.tensor(picks, device=DEVICE), 0.5), inputs)


@pytest.mark.parametrize("size", [(0, 3, 5, 5), (4, 3, 0, 5), (4, 3, 5, 0), (0, 0, 5, 5)])
def test_empty_sizes(size: tuple[int, int, int, int]) -> None:
    index = torch.zeros(size[0], dtype=torch.int64, device=DEVICE)
    _, inputs = _inputs((size[0], max(size[1], 1), *size[2:]))
    inputs[1] = inputs[1].detach()[: size[1]].requires_grad_()
    assert_within_budget(_outputs_and_gradients(index), inputs)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_half_precision_sums_in_fp32(dtype: torch.dtype) -> None:
    index, inputs = _inputs((90, 2, 70, 70), dtype)
    with lf.backend("triton"):
        assert latent_matmul(*inputs[:2], index).dtype == dtype
    assert_within_budget(_outputs_and_gradients(index, 0.5), inputs)


def test_strides_of_inputs_and_of_the_incoming_gradient() -> None:
    index, tensors = _inputs((6, 3, 8, 8))
    bias, cotangent = torch.randn(16, device=DEVICE)[::2].requires_grad_(), torch.randn(6, 8, device=DEVICE)
    for name in hostile(cotangent):
        strided = [*(hostile(t.detach())[name].requires_grad_() for t in tensors[:2]), bias]

        def call(z: Tensor, A: Tensor, bias: Tensor, name: str = name) -> tuple[Tensor, ...]:
            y = latent_matmul(z, A, index.repeat_interleave(2)[::2], alpha=0.7, bias=bias)
            return (y, *torch.autograd.grad(y, (z, A, bias), hostile(cotangent.to(y.dtype))[name]))

        assert_within_budget(call, strided)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_mode(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row a mode has no effect. In tiles the operands are rounded as it says, and no more than that.

    In Triton's interpreter bf16 parts are fp16 or tf32, which err less: the limits are those of bf16.
    """
    index, inputs = _inputs((90, 2, 70, 33))
    assert_within_budget(_outputs_and_gradients(index, precision=precision), inputs, operands=rounding(precision))
    monkeypatch.setattr(kernels, "ELEMENTS_ALONE", -1)
    z, A, _ = inputs
    with lf.backend("triton"), torch.no_grad():
        got = latent_matmul(z, A, index, precision=precision)
        truth = torch.einsum("bn,bmn->bm", z.double(), A.double()[index])
    error = float((got - truth).norm() / truth.norm())
    limits = {"exact": (0, 2**-19), "high": (0, 2**-16), "tf32": (2**-14, 2**-10), "fast": (2**-14, 2**-7.5)}
    least, most = limits[precision]
    assert least <= error < most


@pytest.mark.parametrize("precision", PRECISIONS)
def test_fp32_gradients_have_the_range_of_bf16(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a loss that is a mean, under autocast to fp16: a gradient 2^-40 times as large is that, bit for bit."""
    monkeypatch.setattr("linfast.precision.autocast_dtype", lambda device: torch.float16)
    index, (z, A, _) = _inputs((90, 2, 7, 5))
    with lf.backend("triton"):
        y = latent_matmul(z, A, index, precision=precision)
        grad = torch.randn_like(y)
        whole, small = (torch.autograd.grad(y, (z, A), c * grad, retain_graph=True) for c in (1.0, 2.0**-40))
    assert all(w.any() and torch.equal(w * 2.0**-40, s) for w, s in zip(whole, small, strict=True))


def test_torch_chooses_the_mode(way: str) -> None:
    index, (z, A, _) = _inputs((90, 2, 70, 33))
    before = torch.get_float32_matmul_precision()
    with lf.backend("triton"), torch.no_grad():
        exact, fast = (latent_matmul(z, A, index, precision=precision) for precision in ("exact", "fast"))
        assert torch.equal(exact, fast) == (way == "row by row")
        assert torch.equal(latent_matmul(z, A, index), exact)
        torch.set_float32_matmul_precision("medium")
        try:
            assert torch.equal(latent_matmul(z, A, index), fast)
        finally:
            torch.set_float32_matmul_precision(before)


def test_gradients_in_several_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """More splits than an operator has rows, and fewer."""
    monkeypatch.setattr(kernels, "ROWS_A_SPLIT", 3)
    for picks in ([0, 2] * 10 + [1], [1] * 90):
        _, inputs = _inputs((len(picks), 3, 6, 5))
        assert_within_budget(_outputs_and_gradients(torch.tensor(picks, device=DEVICE)), inputs)


@pytest.mark.parametrize(
    ("batch", "n_operators", "n_out", "n_in", "splits"),
    [
        (16_384, 1, 64, 64, 32), (10**6, 1, 64, 64, 512), (16_384, 1, 4096, 4096, 1), (16_384, 2, 1024, 512, 2),
        (16_384, 1024, 64, 64, 1), (100, 1, 64, 64, 1),
    ],
)  # fmt: skip
def test_splits_fill_a_gpu_and_take_little_memory(
    batch: int, n_operators: int, n_out: int, n_in: int, splits: int
) -> None:
    assert kernels._n_splits(batch, n_operators, n_out, n_in) == splits
    assert splits == 1 or splits * n_operators * n_out * n_in * 4 <= 2**23


COMPILES = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from linfast.kernels.latent_matmul import GRADIENT_TILE, _bank_gradient_kernel as kernel
tile = dict(GRADIENT_TILE)
options = {"num_warps": tile.pop("num_warps")}
constants = {"INT64": False, "PARTS": 1, "TYPE": int(sys.argv[1]), **tile}
types = {"z_ptr": "*fp32", "grad_ptr": "*fp32", "da_ptr": "*fp32", "order_ptr": "*i64", "start_ptr": "*i64"}
signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
at = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
source = ASTSource(fn=kernel, signature=signature, constexprs=at)
print(compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ttir"])
"""


@pytest.mark.parametrize("type_id", [0, 2])
def test_long_sums_of_one_part_are_runs_from_zero(type_id: int) -> None:
    """Matrix units may truncate each step of a sum, so the innermost loop's sum is short and starts from zero.

    The compiler may merge a run with the total, which no result of the interpreter shows.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILES, str(type_id)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    loops = re.findall(r"scf\.for .*", done.stdout)
    (dot,) = re.findall(r"= tt\.dot %\w+, %\w+, (%\w+)", done.stdout)
    assert len(loops) == 2
    (start,) = re.findall(rf"{dot} = (%\w+)", loops[1])
    assert re.search(rf"{start} = arith\.constant dense<0\.0", done.stdout)


def test_more_operators_than_a_short_key_can_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SHORT_KEYS", 3)
    index, inputs = _inputs((40, 5, 2, 3))
    assert_within_budget(_outputs_and_gradients(index), inputs)


def test_what_is_launched(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Besides a cast of the index, which is no launch where Launches counts: it may return its argument."""
    index, (z, A, bias) = _inputs((90, 2, 6, 6))
    monkeypatch.setattr(kernels, "_check_index", lambda *_: None)  # as on a GPU
    tiles = ["clamp", "sort", "arange", "searchsorted", "_bank_kernel"]
    with lf.backend("triton"), torch.no_grad():
        names = Launches(monkeypatch).of(lambda z: latent_matmul(z, A, index, alpha=0.5, bias=bias), z)
    assert names == (["_row_kernel"] if way == "row by row" else tiles)


@pytest.mark.parametrize(
    ("batch", "n", "kernel"), [(64, 33, "_row_kernel"), (65, 33, "_bank_kernel"), (65, 4, "_row_kernel")]
)
def test_row_by_row_padding_counts(batch: int, n: int, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program takes as long for a tile of which little is needed: 33 by 33 takes as long as 64 by 64."""
    monkeypatch.setattr(kernels, "ELEMENTS_ALONE", 64 * 64 * 64)
    index, (z, A, _) = _inputs((batch, 2, n, n))
    with lf.backend("triton"), torch.no_grad():
        names = Launches(monkeypatch).of(lambda z: latent_matmul(z, A, index), z)
    assert kernel in names


@pytest.mark.parametrize("only", [0, 1, 2])
def test_each_gradient_alone(only: int) -> None:
    index, inputs = _inputs((9, 3, 5, 5))
    inputs = [t.detach().requires_grad_(i == only) for i, t in enumerate(inputs)]

    def call(z: Tensor, A: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        y = latent_matmul(z, A, index, alpha=0.3, bias=bias)
        return torch.autograd.grad(y.square().sum(), (z, A, bias)[only])

    assert_within_budget(call, inputs)


def test_gradients_that_are_not_needed_are_not_computed() -> None:
    index, (z, A, _) = _inputs((9, 3, 5, 5))
    run = torch.ops.linfast.latent_matmul_backward.default
    with torch.no_grad():
        got = run(z, A, index, z, 0.0, "exact", torch.float16, torch.float32, [False, True, False, False])
    assert [tuple(g.shape) for g in got] == [(0,), (3, 5, 5), (0,), (0,)]


@pytest.mark.parametrize("kind", ["one", "one per sample", "bank"])
def test_alpha_as_a_tensor_has_a_gradient(kind: str) -> None:
    index, (z, A, bias) = _inputs((3, 3, 5, 5))
    A = (A[0] if kind == "one" else A).detach().requires_grad_()

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        z, A, bias, alpha = inputs
        y = latent_matmul(z, A, index if kind == "bank" else None, alpha=alpha, bias=bias)
        return (y, *torch.autograd.grad(y.square().sum(), inputs))

    assert_within_budget(call, [z, A, bias, torch.tensor(1.3, device=DEVICE, requires_grad=True)])


def test_a_bank_is_the_operator_each_row_picks() -> None:
    index, (z, A, bias) = _inputs((40, 3, 7, 7))
    rows = torch.stack([A[k] @ row + 0.5 * row + bias for k, row in zip(index.tolist(), z, strict=True)])
    for name in ("triton", "reference"):
        with lf.backend(name):
            torch.testing.assert_close(latent_matmul(z, A, index, alpha=0.5, bias=bias), rows)
            torch.testing.assert_close(latent_matmul(z, A[index], alpha=0.5, bias=bias), rows)
            same = [latent_matmul(z, A[0], i, alpha=0.5, bias=bias) for i in (None,)]
            torch.testing.assert_close(same[0], latent_matmul(z, A[:1], index * 0, alpha=0.5, bias=bias))


def test_second_derivatives_are_the_references() -> None:
    index, inputs = _inputs((6, 3, 4, 4))
    call = second_derivatives(lambda z, A, bias: latent_matmul(z, A, index, alpha=0.4, bias=bias).pow(3).sum())
    assert_within_budget(call, inputs)


def test_the_same_bits_twice_and_with_int64_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    index, inputs = _inputs((100, 3, 66, 66))
    assert_same_bits(_outputs_and_gradients(index, 0.5), inputs, monkeypatch, kernels)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_an_index_outside_the_bank(monkeypatch: pytest.MonkeyPatch, wrong: int) -> None:
    index, (z, A, _) = _inputs((5, 3, 4, 4))
    index[2] = wrong
    for name in ("triton", "reference") if DEVICE == "cpu" else ():
        with lf.backend(name), pytest.raises(ValueError, match=r"index must be in \[0, 3\)"):
            latent_matmul(z, A, index)
    monkeypatch.setattr(kernels, "_check_index", lambda *_: None)  # as on a GPU
    with lf.backend("triton"):
        y = latent_matmul(z, A, index)
        dz, dA = torch.autograd.grad(y.sum(), (z, A))
    assert y.isnan().any(1).tolist() == dz.isnan().any(1).tolist() == [False, False, True, False, False]
    assert not dA.isnan().any()


@pytest.mark.parametrize(("bias", "alpha"), [(True, 0.5), (False, 0.0), *long((True, 0.0), (False, 0.5))])
def test_opcheck(bias: bool, alpha: float) -> None:
    index, inputs = _inputs((7, 3, 5, 5))
    z, A, b = (t.detach() for t in inputs)
    given = (alpha, "exact", torch.float16, torch.float32)
    assert_registered(torch.ops.linfast.latent_matmul.default, (z, A, index, b if bias else None, *given))
    needs = [[i in (None, j) and j != 2 for j in range(4)] for i in (None, 0, 1, 3)]
    calls = [(z, A, index, torch.randn_like(z), *given, needed) for needed in needs]
    assert_registered(torch.ops.linfast.latent_matmul_backward.default, *calls)


@pytest.mark.skipif(DEVICE != "cpu", reason="the plain path's memory")
@pytest.mark.parametrize("one_op", [False, True])
def test_a_bank_is_never_gathered(monkeypatch: pytest.MonkeyPatch, one_op: bool) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0" if one_op else "1")
    index, inputs = _inputs((512, 3, 64, 64), bias=False)

    def call(z: Tensor, A: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(latent_matmul(z, A, index).sum(), (z, A))

    assert peak_bytes(call, tuple(inputs), torch.device("cpu")) < 512 * 64 * 64  # a quarter of A[index]


def test_it_compiles_whole_and_runs_the_kernels() -> None:
    index, inputs = _inputs((7, 3, 5, 5))
    loss = squared_sum(lambda z, A, bias: latent_matmul(z, A, index, alpha=0.5, bias=bias))
    assert_compiles_whole(loss, inputs, "latent_matmul")


def test_functional_transforms() -> None:
    index, inputs = _inputs((3, 2, 4, 4))

    def loss(z: Tensor, A: Tensor, bias: Tensor, index: Tensor = index) -> Tensor:
        return latent_matmul(z, A, index, alpha=0.5, bias=bias).square().sum()

    def row_by_row(z: Tensor, A: Tensor, bias: Tensor, argument: int) -> Tensor:
        gradient = torch.func.grad(loss, argnums=argument)
        return torch.func.vmap(lambda z, i: gradient(z[None], A, bias, i[None]))(z, index)

    def transforms(z: Tensor, A: Tensor, bias: Tensor) -> list[Tensor]:
        jacobian = torch.func.jacrev(lambda z: latent_matmul(z, A, index))
        gradients = torch.func.grad(loss, argnums=(0, 1))(z, A, bias)
        return [*gradients, jacobian(z), *(row_by_row(z, A, bias, argument) for argument in (0, 1))]

    assert_transforms(transforms, loss, [t.detach() for t in inputs])


def test_what_launches_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_launches(monkeypatch)
    index, inputs = _inputs((3, 3, 4, 4))
    z, A, bias = (t.detach() for t in inputs)
    with lf.backend("triton"):
        latent_matmul(z.double(), A.double(), index, bias=bias.double())
        latent_matmul(z, A)
        latent_matmul(z, A[0], bias=bias)
        with pytest.raises(AssertionError, match="latent_matmul:launch"):
            latent_matmul(z, A, index)
    with lf.backend("reference"):
        latent_matmul(z, A, index)


@pytest.mark.parametrize("target", [None, "gfx942"])
def test_amd_gpus_without_tf32_run_plain_torch(target: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_launches(monkeypatch)
    index, (z, A, _) = _inputs((9, 3, 5, 5))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr("linfast.kernels.stack_configs._target", lambda *_: target)
    with lf.backend("triton"):
        if target is None:
            torch.testing.assert_close(latent_matmul(z, A, index), torch.einsum("bn,bmn->bm", z, A[index]))
        else:
            with pytest.raises(AssertionError, match="latent_matmul:launch"):
                latent_matmul(z, A, index)


def test_without_the_interpreter_a_cpu_bank_is_one_op_in_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    index, inputs = _inputs((7, 3, 5, 5), torch.float64)
    inputs = [t.detach().cpu().requires_grad_() for t in inputs]
    index = index.cpu()

    def call(*inputs: Tensor) -> Tensor:
        return latent_matmul(*inputs[:2], index, alpha=0.5, bias=inputs[2])

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs), call(*inputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": torch.zeros(4, dtype=torch.int64)}, r"index must be \[3\] int64 .* got \(4,\) int64"),
        ({"index": torch.zeros(3, dtype=torch.int32)}, r"got \(3,\) int32"),
        ({"A": torch.zeros(5, 4)}, r"A must be a bank .* got \(5, 4\)"),
        ({"alpha": 1.0}, r"alpha must be 0 unless A is square; got A \(2, 5, 4\)"),
        ({"bias": torch.zeros(4)}, r"bias must be \[5\] .* got \(4,\)"),
        ({"z": torch.zeros(3, 5)}, r"z must be \[B, n_in\]"),
        ({"index": None}, "A has 2 operators for 3 rows of z"),
        ({"precision": "double"}, "precision must be one of"),
        ({"index": None, "A": torch.zeros(5, 4), "precision": "fast"}, "precision must be None without an index"),
    ],
)
def test_shapes_that_do_not_fit_are_clear_errors(change: dict[str, Tensor], message: str) -> None:
    arguments = {"z": torch.zeros(3, 4), "A": torch.zeros(2, 5, 4), "index": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        latent_matmul(**{**arguments, **change})
