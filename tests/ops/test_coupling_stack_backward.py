"""The coupling stack's gradient kernel against float64: products, tiles, runs, programs, needed gradients.

Gradients of the public op over activations, scale maps, sizes and layouts are in
test_coupling_stack_kernel.py; in the interpreter parts of gradients are tf32 in place of bf16 numbers,
so that products in parts are compared with float64 separately here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from linfast.bench.rounding import N_PARTS
from linfast.kernels import coupling_stack_backward as backward
from linfast.kernels import stack_backward_grid
from linfast.kernels.launch import ceil_div
from linfast.kernels.row_products import Mode, add_outer, tile_product
from linfast.kernels.stack_backward_grid import LARGE, SCRATCH_BYTES, SMALL, TILES_A_RUN, StackPass, grid_of
from linfast.kernels.stack_spec import StackSpec
from torch import Tensor

import linfast as lf
from linfast.ops import CouplingLayer, coupling_stack
from linfast.ops.activations import ACTIVATION_NAMES
from linfast.ops.register import RAW_OPS
from linfast.ops.stack_weights import PackedStack, pack_stack
from linfast.precision import PRECISIONS, half_dtype
from linfast.scale_maps import ScaleMap
from tests.marks import long
from tests.ops.budget import DEVICE, assert_within_budget, error, hostile
from tests.ops.checks import fixed_cotangents
from tests.ops.stacks import (
    HALF,
    NAMES,
    factors_of_every_part,
    leaves,
    random_layers,
    random_map,
    rebuilt,
    rounding,
)

# Relative error of a product of operands of about 1.
MODES = {
    "tf32": (Mode(1, torch.float32), 6e-4),  # at most two roundings of 2^-11; truncated operands would give 7.6e-4
    "1 part": (Mode(1, HALF), torch.finfo(HALF).eps),
    "2 parts": (Mode(2, HALF), 2e-6 if torch.float16 == HALF else 2e-5),
    "3 parts": (Mode(3, HALF), 5e-7),
}


@pytest.fixture(autouse=True)
def _two_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that programs share the rows."""
    monkeypatch.setattr(backward, "multiprocessors", lambda x: 2)


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape).to(DEVICE)


@triton.jit
def _product_kernel(
    x_ptr, w_ptr, out_ptr, n_inner, n_columns, stride_wk, stride_wn, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
    PARTS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, 32)
    n = tl.arange(0, COLUMNS)
    out = tile_product(
        x_ptr, n_inner, 1, w_ptr, stride_wk, stride_wn, n_inner, n_columns, 32, COLUMNS, 16, 2, PARTS, TYPE, MASKED
    )
    tl.store(out_ptr + r[:, None] * COLUMNS + n[None, :], out)


@triton.jit
def _outer_kernel(
    d_ptr, x_ptr, out_ptr, n_out, n_in, n_tiles, N_ROWS: tl.constexpr, MASKED: tl.constexpr, PARTS: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    for tile in range(n_tiles):
        add_outer(
            d_ptr + tile * N_ROWS * n_out, n_out, x_ptr + tile * N_ROWS * n_in, n_in, out_ptr, tile > 0,
            N_ROWS, 32, 16, 2, PARTS, TYPE, MASKED,
        )  # fmt: skip
        tl.debug_barrier()


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("columns", [16, 32])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_tiles(name: str, columns: int, transposed: bool) -> None:
    mode, allowed = MODES[name]
    x, w = _randn(32, 64), _randn(64, columns)
    w = w.mT.contiguous().mT if transposed else w
    out = x.new_full((32, 32), float("nan"))
    _product_kernel[(1,)](x, w, out, 64, columns, *w.stride(), COLUMNS=32, MASKED=columns < 32, **mode.constexprs)
    assert error(out[:, :columns], x.double() @ w.double()) <= allowed
    assert not out[:, columns:].any()


def test_three_parts_keep_every_bit_of_fp32() -> None:
    x, w = factors_of_every_part()
    out = x.new_empty(32, 16)
    rows, columns = F.pad(x[:, None], (0, 15, 0, 32 - len(x))), F.pad(w[None], (0, 13, 0, 15))
    mode = Mode(3, HALF)
    _product_kernel[(1,)](
        rows, columns, out, 16, 16, *columns.stride(), COLUMNS=16, MASKED=False, **mode.constexprs
    )
    assert torch.equal(out[:3, :3].diagonal(), x * w)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_have_the_parts_that_the_mode_promises(precision: str) -> None:
    """In the interpreter parts of gradients are tf32, so that a missing third part would not be noticed."""
    stack = _stack(_packed(random_layers(6, (16,), 1), 6, precision), precision=precision)
    assert stack.forward_mode.parts == stack.gradient_mode.parts == N_PARTS[precision]
    assert stack.map_mode.parts == max(N_PARTS[precision], 2)


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize(("n_in", "tiles"), [(16, 1), (64, 1), (16, 3), (64, 2)])
def test_sums_over_rows(name: str, n_in: int, tiles: int) -> None:
    mode, allowed = MODES[name]
    d, x = _randn(32 * tiles, 64), _randn(32 * tiles, n_in)
    out = x.new_full((64 * n_in + 16,), float("nan"))
    _outer_kernel[(1,)](d, x, out, 64, n_in, tiles, N_ROWS=32, MASKED=n_in < 32, **mode.constexprs)
    assert error(out[:-16], (d.double().mT @ x.double()).flatten()) <= allowed
    assert out[-16:].isnan().all()


def _packed(layers: Sequence[CouplingLayer], D: int, precision: str, **options) -> PackedStack:
    options = {"inverse": False, "head": None, **options}
    return pack_stack(layers, D, precision=precision, dtype=half_dtype(_randn(1)), **options)


def _spec(packed: PackedStack, activation: int = 1, inverse: bool = False, precision: str = "exact") -> StackSpec:
    """Two or three linear layers, scale map "smooth"."""
    layout = packed.layout
    sizes = (layout.features, layout.n_linear, layout.hidden, layout.maps, layout.head)
    return StackSpec(*sizes, activation, 2, 0.5, 0.0, False, False, inverse, True, precision)


def _stack(packed: PackedStack, activation: int = 1, precision: str = "exact") -> StackPass:
    return StackPass(packed.weights, packed.operands, _spec(packed, activation, precision=precision), False)


@pytest.mark.parametrize("activation", ACTIVATION_NAMES)
def test_every_activation(activation: str) -> None:
    packed = _packed(random_layers(7, (16, 16), 2), 7, "exact")
    index = ACTIVATION_NAMES.index(activation)
    got, expected = _launch(_randn(40, 7), packed, _randn(40, 7), _randn(40), (True, True), activation=index)
    for value, exact in zip(got, expected, strict=True):
        assert error(value, exact) <= 1e-6


def _gradients(layers, head=None, cotangents=(True, True), **options) -> Callable[..., tuple[Tensor, ...]]:
    """Gradients of y and log_det, or of one of them, for fixed random cotangents."""

    def call(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        built, new_head = rebuilt(layers, tensors, head)
        settings = {"activation": "silu", "scale_map": ScaleMap(), "precision": "exact", **options}
        outputs = coupling_stack(x, built, log_det=True, head=new_head, **settings)
        given = fixed_cotangents(*outputs)
        outputs, given = zip(
            *[(o, c) for o, c, on in zip(outputs, given, cotangents, strict=True) if on], strict=True
        )
        wanted = [t for t in (x, *tensors) if t.requires_grad]
        return torch.autograd.grad(outputs, wanted, given, materialize_grads=True)

    return call


@pytest.mark.parametrize(
    ("maps", "inverse"),
    [
        ("none", False),
        ("diagonal", True),
        ("dense", False),
        ("dense", True),
        *long(("none", True), ("diagonal", False)),
    ],
)
@pytest.mark.parametrize("n_linear", [1, 2, 3, 4])
def test_every_direction_depth_and_kind_of_map(maps: str, inverse: bool, n_linear: int) -> None:
    moves = "second" if n_linear % 2 else "first"
    layers, head = random_layers(7, (16,) * (n_linear - 1), 2, maps=maps, moves=moves), random_map(7, maps)
    call = _gradients(
        layers, head, inverse=inverse, moves=moves, order="scale_first" if n_linear > 2 else "shift_first"
    )
    assert_within_budget(call, [t.requires_grad_() for t in (_randn(20, 7), *leaves(layers, head))])


@pytest.mark.parametrize("cotangents", [(True, False), (False, True)])
def test_one_output_alone(cotangents: tuple[bool, bool]) -> None:
    layers = random_layers(7, (16,), 2, maps="dense")
    call = _gradients(layers, cotangents=cotangents)
    assert_within_budget(call, [t.requires_grad_() for t in (_randn(9, 7), *leaves(layers))])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("maps", ["dense", *long("diagonal")])
@pytest.mark.parametrize(("multiprocessors", "tiles"), [(2, 2), (1, 1)])
def test_tiles_runs_and_programs_add_up(
    precision: str, maps: str, multiprocessors: int, tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three runs of two tiles of 32 rows on two programs; two runs of one tile of 128 rows on one program."""
    monkeypatch.setattr(backward, "multiprocessors", lambda *_: multiprocessors)
    monkeypatch.setattr(stack_backward_grid, "TILES_A_RUN", tiles)
    layers = random_layers(6, (16,), 2, maps=maps)
    inputs = [t.requires_grad_() for t in (_randn(150, 6), *leaves(layers))]
    assert_within_budget(_gradients(layers, precision=precision), inputs, rounding(precision))


def _launch(x: Tensor, packed: PackedStack, grad: Tensor | None, grad_log_det: Tensor | None, needs, **options):
    arguments = (x, *packed.tensors, grad, grad_log_det)
    rest = (*_spec(packed, **options).constants, [*needs, False, False])
    wide = [t.double() if torch.is_tensor(t) else t for t in arguments]
    reference = RAW_OPS["coupling_stack_backward"].reference(*wide, *rest)
    return backward.launch_coupling_stack_backward(*arguments, *rest)[:2], reference[:2]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("maps", NAMES)
def test_what_is_not_needed_changes_nothing_else(inverse: bool, maps: str) -> None:
    packed = _packed(random_layers(6, (16,), 2, maps=maps), 6, "exact", inverse=inverse)
    x, grad, h = _randn(20, 6), _randn(20, 6), _randn(20)
    (dx, dweights), (exact_dx, exact_dweights) = _launch(x, packed, grad, h, (True, True), inverse=inverse)
    (dx_alone, nothing), _ = _launch(x, packed, grad, h, (True, False), inverse=inverse)
    (_, dweights_alone), _ = _launch(x, packed, grad, h, (False, True), inverse=inverse)
    assert torch.equal(dx, dx_alone)
    assert torch.equal(dweights, dweights_alone)
    assert nothing is None
    for value, exact in ((dx, exact_dx), (dweights, exact_dweights)):
        assert error(value, exact) <= 1e-6
    # Gradients of padding stay exactly zero.
    assert not dweights[exact_dweights == 0].any()


@pytest.mark.parametrize("batch", [0, 1])
def test_few_rows(batch: int) -> None:
    packed = _packed(random_layers(6, (16,), 1), 6, "exact")
    got, expected = _launch(_randn(batch, 6), packed, _randn(batch, 6), _randn(batch), (True, True))
    for value, exact in zip(got, expected, strict=True):
        assert value.shape == exact.shape
        assert error(value, exact) <= 1e-6


def test_rows_past_the_batch_do_not_overflow() -> None:
    """A row of zeros would give e^200 here, whose product with a gradient of zero is not a number."""
    layers = random_layers(6, (), 2)
    for layer in layers:
        layer.weights[0].fill_(-20.0 / 3)
        layer.biases[0].fill_(200.0)
    x = 10 + 0.01 * _randn(9, 6)
    packed = _packed(layers, 6, "exact")
    spec = replace(_spec(packed), kind=0, scale_first=True)
    arguments, rest = (x, *packed.tensors, _randn(9, 6), _randn(9)), (*spec.constants, [True, True, False, False])
    for value in backward.launch_coupling_stack_backward(*arguments, *rest)[:2]:
        assert value.isfinite().all()


def test_the_gradient_of_a_head_has_no_conditioner() -> None:
    packed = _packed(random_layers(6, (16,), 1, maps="dense"), 6, "exact", head=random_map(6, "dense"))
    (_, dweights), (_, exact) = _launch(_randn(9, 6), packed, _randn(9, 6), _randn(9), (True, True))
    assert error(dweights, exact) <= 1e-6
    assert not dweights[exact == 0].any()


def test_strides_of_every_incoming_gradient() -> None:
    packed = _packed(random_layers(7, (16,), 1), 7, "exact")
    x, grad, h = _randn(9, 7), _randn(9, 7), _randn(9)
    for name, strided in hostile(grad).items():
        for log_det in (h[:, None].expand(9, 2)[:, 0], torch.stack((h, h), 1)[:, 1], h[:1].expand(9)):
            got, expected = _launch(hostile(x)[name], packed, strided, log_det, (True, True))
            for value, exact in zip(got, expected, strict=True):
                assert error(value, exact) <= 1e-6, name


@pytest.mark.parametrize("precision", ["exact", "fast", *long("high", "tf32")])
def test_the_same_input_gives_the_same_bits(precision: str) -> None:
    packed = _packed(random_layers(6, (16, 16), 2, maps="dense"), 6, precision)
    x, grad, h = _randn(100, 6), _randn(100, 6), _randn(100)
    (first, _), (second, _) = (_launch(x, packed, grad, h, (True, True), precision=precision) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_grid_covers_the_rows_and_fills_the_gpu() -> None:
    stack = _stack(_packed(random_layers(64, (128, 128), 8), 64, "exact"))
    for batch in (1, 31, 1000, 2**14, 2**17 + 1, 2**20):
        tile, programs, run = grid_of(batch, stack, 132)
        tiles, runs = ceil_div(batch, tile["ROWS"]), ceil_div(batch, run)
        assert run % tile["ROWS"] == 0
        assert programs <= runs  # no program without rows
        assert ceil_div(runs, programs) * run <= 1.05 * ceil_div(tiles, 132) * tile["ROWS"]  # equal shares
    assert grid_of(2**20, stack, 132) == (LARGE, 132, 128 * TILES_A_RUN)
    assert grid_of(1000, stack, 132) == (SMALL, 32, 32)


def test_scratch_does_not_grow_with_the_batch() -> None:
    shallow = _packed(random_layers(64, (128, 128), 4), 64, "exact")
    deep = replace(shallow, weights=shallow.weights.repeat(8, 1))  # the number of layers is that of rows
    wide = replace(deep, weights=deep.weights.repeat(16, 1))
    for packed, short, few in ((shallow, False, False), (deep, True, False), (wide, True, True)):
        _, programs, run = grid_of(2**20, _stack(packed), 132)
        assert (run < 128 * TILES_A_RUN, programs < 132) == (short, few)
        steps, per_row = len(packed.weights), 4 * (32 + 64 + 3 * 2 * 128)  # h_0, d_n; h, act' and d of two layers
        z, partials = 4 * 64 * (steps + 1) * run, 4 * packed.weights.numel()
        assert programs * (z + partials + 128 * per_row) <= SCRATCH_BYTES
        assert grid_of(2**24, _stack(packed), 132)[1:] == (programs, run)


def test_half_precision_gradients_are_those_of_the_state_in_fp32() -> None:
    packed = _packed(random_layers(6, (16,), 2), 6, "exact")
    x, grad = _randn(20, 6).half(), _randn(20, 6).half()
    (dx, dweights), _ = _launch(x, packed, grad, None, (True, True))
    (wide, wide_dweights), _ = _launch(x.float(), packed, grad.float(), None, (True, True))
    assert dx.dtype == torch.float16
    assert torch.equal(dx, wide.half())
    assert torch.equal(dweights, wide_dweights)


def test_runs_kernels_and_not_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(sys.modules["linfast.ops.coupling_stack"], "couple", refuse)
    layers, x = random_layers(6, (16,), 1), _randn(9, 6).requires_grad_()
    with lf.backend("triton"):
        y, _ = coupling_stack(x, layers, activation="silu", scale_map=ScaleMap(), precision="exact")
        torch.autograd.grad(y.sum(), x)
