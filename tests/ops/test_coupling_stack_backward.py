"""The coupling stack's gradient kernels against float64: products, B1, B2, weights, chunks, needed gradients.

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
from linfast.bench.rounding import N_PARTS
from linfast.kernels import coupling_stack_backward as backward
from linfast.kernels import row_products
from linfast.kernels.coupling_stack_backward import Scratch, StackPass
from linfast.kernels.row_products import ADD, MULTIPLY, SET, Mode, launch_linear, launch_outer, n_splits
from linfast.kernels.stack_spec import StackSpec
from torch import Tensor

import linfast as lf
from linfast.ops import CouplingLayer, coupling_stack
from linfast.ops.activations import ACTIVATION_NAMES, ACTIVATIONS
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


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape).to(DEVICE)


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("combine", [SET, ADD, MULTIPLY])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_rows(name: str, combine: int, transposed: bool) -> None:
    mode, allowed = MODES[name]
    x, w, bias, before = _randn(70, 64), _randn(64, 128), _randn(128), _randn(70, 256)
    w = w.mT.contiguous().mT if transposed else w
    out = before.clone()
    launch_linear(x, w, out[:, 128:], mode, bias, combine)
    exact, wide = x.double() @ w.double() + bias.double(), before[:, 128:].double()
    expected = {SET: exact, ADD: exact + wide, MULTIPLY: exact * wide}[combine]
    assert error(out[:, 128:], expected) <= allowed
    assert torch.equal(out[:, :128], before[:, :128])


def test_three_parts_keep_every_bit_of_fp32() -> None:
    x, w = factors_of_every_part()
    out = x.new_empty(3, 16)
    launch_linear(F.pad(x[:, None], (0, 15)), F.pad(w[None], (0, 13, 0, 15)), out, Mode(3, HALF))
    assert torch.equal(out[:, :3].diagonal(), x * w)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_have_the_parts_that_the_mode_promises(precision: str) -> None:
    """In the interpreter parts of gradients are tf32, so that a missing third part would not be noticed."""
    stack = _stack(_packed(random_layers(6, (16,), 1), 6, precision), precision=precision)
    assert stack.forward_mode.parts == stack.gradient_mode.parts == N_PARTS[precision]
    assert stack.map_mode.parts == max(N_PARTS[precision], 2)


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize(("rows", "splits"), [(1, 1), (70, 1), (70, 2), (200, 4), (33, 3)])
def test_sums_over_rows(name: str, rows: int, splits: int) -> None:
    mode, allowed = MODES[name]
    d, x = _randn(rows, 32), _randn(rows, 128)
    partials = x.new_full((splits, 16 * 64 + 32 * 128 + 32), float("nan"))
    launch_outer(d, x[:, 16:80], partials, 32, 32 + 32 * 64, mode)
    total = partials.double().sum(0)
    assert error(total[32 : 32 + 32 * 64], (d.double().mT @ x[:, 16:80].double()).flatten()) <= allowed
    assert error(total[32 + 32 * 64 : 64 + 32 * 64], d.double().sum(0)) <= 5e-7
    assert total[:32].isnan().all()
    assert total[64 + 32 * 64 :].isnan().all()


def test_splits_grow_with_the_rows_up_to_a_limit() -> None:
    assert [n_splits(n) for n in (1, 512, 513, 10**6)] == [1, 1, 2, row_products.MAX_SPLITS]


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


def derivative(activation: str, x: Tensor) -> Tensor:
    """d activation / dx, elementwise, by autograd."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(ACTIVATIONS[activation](x).sum(), x)[0]


@pytest.mark.parametrize("activation", ACTIVATION_NAMES)
def test_B1_and_B2_on_their_own(activation: str) -> None:
    layer = random_layers(7, (16, 16), 1)
    packed = _packed(layer, 7, "exact")
    stack, layout = _stack(packed, ACTIVATION_NAMES.index(activation)), packed.layout
    z, g, grad_log_det = layout.pad(_randn(40, 7)), layout.pad(_randn(40, 7)), _randn(40)
    scratch, got = Scratch(z, stack), g.clone()
    backward._recompute(stack, z, got, grad_log_det, 0, 0, scratch)

    w, b, _, _ = layout.unpack(packed.weights[0].double())
    kept, moved = z.double()[:, 16:], z.double()[:, :16].requires_grad_()
    p1 = kept @ w[0].mT + b[0]
    p2 = ACTIVATIONS[activation](p1) @ w[1].mT + b[1]
    d3 = (ACTIVATIONS[activation](p2) @ w[2].mT + b[2]).requires_grad_()
    shift, raw = d3.unflatten(1, (-1, 2)).unbind(2)
    log_s = ScaleMap().log_scale(raw)
    loss = ((moved + shift) * log_s.exp() * g.double()[:, :16]).sum()
    loss = loss + (grad_log_det.double()[:, None] * log_s[:, :4]).sum()
    dmoved, d3 = torch.autograd.grad(loss, (moved, d3))
    for value, exact in (
        (scratch.h[0], ACTIVATIONS[activation](p1)),
        (scratch.h[1], ACTIVATIONS[activation](p2)),
        (scratch.slopes[0], derivative(activation, p1)),
        (scratch.slopes[1], derivative(activation, p2)),
        (scratch.d, d3),
        (got[:, :16], dmoved),
    ):
        assert error(value, exact) <= 1e-6
    assert torch.equal(got[:, 16:], g[:, 16:])

    dweights = torch.zeros_like(packed.weights)
    backward._coupling_backward(stack, z, got, 0, 0, dweights, True, scratch)
    d2 = d3 @ w[2] * derivative(activation, p2)
    d1 = d2 @ w[1] * derivative(activation, p1)
    for value, exact in (
        (scratch.slopes[1], d2),
        (scratch.slopes[0], d1),
        (got[:, 16:], g.double()[:, 16:] + d1 @ w[0]),
        (dweights[0, : 16 * 16], (d1.mT @ kept).flatten()),
        (dweights[0, layout.matrix_size : layout.matrix_size + 16], d1.sum(0)),
    ):
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
def test_runs_of_rows_and_splits_add_up(precision: str, maps: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward, "ROWS_AT_A_TIME", 96)
    monkeypatch.setattr(row_products, "ROWS_A_SPLIT", 40)
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


def test_strides_of_every_incoming_gradient() -> None:
    packed = _packed(random_layers(7, (16,), 1), 7, "exact")
    x, grad, h = _randn(9, 7), _randn(9, 7), _randn(9)
    for name, strided in hostile(grad).items():
        for log_det in (h[:, None].expand(9, 2)[:, 0], torch.stack((h, h), 1)[:, 1], h[:1].expand(9)):
            got, expected = _launch(hostile(x)[name], packed, strided, log_det, (True, True))
            for value, exact in zip(got, expected, strict=True):
                assert error(value, exact) <= 1e-6, name


@pytest.mark.parametrize("precision", ["exact", "fast", *long("high", "tf32")])
def test_the_same_input_gives_the_same_bits(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_products, "ROWS_A_SPLIT", 40)
    packed = _packed(random_layers(6, (16, 16), 2, maps="dense"), 6, precision)
    x, grad, h = _randn(100, 6), _randn(100, 6), _randn(100)
    (first, _), (second, _) = (_launch(x, packed, grad, h, (True, True), precision=precision) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_scratch_does_not_grow_with_the_batch() -> None:
    shallow = _packed(random_layers(64, (128, 128), 4), 64, "exact")
    deep = replace(shallow, weights=shallow.weights.repeat(16, 1))  # the number of layers is that of rows
    assert _stack(shallow).rows_at_a_time() == backward.ROWS_AT_A_TIME
    rows = _stack(deep).rows_at_a_time()
    assert backward._FEWEST_ROWS < rows < backward.ROWS_AT_A_TIME
    assert rows * 64 * 4 * 64 < backward.SCRATCH_BYTES


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
