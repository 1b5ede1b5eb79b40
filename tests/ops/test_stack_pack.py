"""Packing: the kernel gives the reference's bits, every tensor gets its gradient, and tables are cached."""

from __future__ import annotations

import pytest
import torch
from linfast.kernels import pack_table
from torch import Tensor

import linfast as lf
from linfast.ops import AffineMap, CouplingLayer, stack_weights
from linfast.ops.stack_weights import PackedStack, StackWeights, pack_stack, pack_stacks
from linfast.precision import PRECISIONS
from tests.ops.budget import DEVICE, HALF_DTYPES, hostile
from tests.ops.checks import assert_registered
from tests.ops.stacks import HALF, NAMES, leaves, random_layers, random_map, rebuilt

D = 7


def test_parts_are_packed_whatever_autocasts_type_is() -> None:
    """torch.stack under autocast raises for a half type that is not autocast's."""
    network = random_layers(6, (8,), 1, maps="dense")
    with torch.autocast(DEVICE, torch.bfloat16):
        packed = pack_stack(network, 6, inverse=True, precision="high", dtype=torch.float16)
    expected = pack_stack(network, 6, inverse=True, precision="high", dtype=torch.float16)
    torch.testing.assert_close(packed.weights, expected.weights, rtol=0, atol=0)
    torch.testing.assert_close(packed.map_operands, expected.map_operands, rtol=0, atol=0)


def test_parts_of_weights_add_up_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked on the reference, because the interpreter truncates bf16; the kernel gives the reference's bits."""
    monkeypatch.setattr("linfast.ops.register.interpreting", lambda: False)
    layers = random_layers(7, (20, 16), 2)
    for precision, bits in (("fast", 8), ("high", 16), ("exact", 23)):
        packed = pack_stack(layers, 7, inverse=False, precision=precision, dtype=torch.bfloat16)
        matrices = packed.weights[:, : packed.layout.matrix_size].double()
        left = (_packed_values(packed, scaled=precision == "exact") - matrices).abs()
        assert bool((left <= 2.0**-bits * matrices.abs()).all())


def _packed_values(packed: PackedStack, scaled: bool = True) -> Tensor:
    """[rows, matrix_size]: the weights that the operands stand for."""
    layout, parts = packed.layout, packed.operands.double()
    if not scaled:
        return parts.sum(0)
    scales = torch.stack([torch.cat(layout.scales(row)) for row in packed.weights])
    lengths = torch.tensor([n_in for n_out, n_in in layout.matrix_shapes for _ in range(n_out)])
    return (parts[0] + parts[1] / 2048) * 2.0**-14 * scales.repeat_interleave(lengths.to(scales.device), dim=1)


@pytest.mark.parametrize("size", [1e-35, 1e-20, 1.0, 1e20, 1e35])
def test_scaled_parts_of_a_row_err_by_its_largest_weight(size: float) -> None:
    """Two parts of fp16 hold 23 bits of what is within 2^-28 of a row's largest, and the rest to 2^-50 of that."""
    W = (size * torch.randn(32, 16, dtype=torch.float64).mul(3).exp()).float().clamp(max=3e38)
    packed = pack_stack([CouplingLayer([W], [None])], 32, inverse=False, precision="exact", dtype=HALF)
    matrices = packed.weights[:, : packed.layout.matrix_size].double()
    left = (_packed_values(packed) - matrices).abs()
    largest = matrices.view(-1, 16).abs().amax(1).repeat_interleave(16).view_as(matrices)
    assert bool((left <= 2.0**-23 * matrices.abs() + 2.0**-50 * largest + 2.0**-148).all())
    assert bool(packed.operands.isfinite().all())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
@pytest.mark.parametrize("maps", NAMES)
def test_the_packing_kernel_has_the_references_bits(precision: str, dtype: torch.dtype, maps: str) -> None:
    network = [
        *random_layers(7, (16, 8), 1, maps=maps),
        *random_layers(7, (24, 40), 1, moves="second", layout="interleaved", bias=False),
    ]
    given = random_map(7, maps)
    layers, head = rebuilt(network, [t.to(dtype) for t in leaves(network, given)], given)
    core = StackWeights((), 7, random_map(7, "dense"), shift=0.3)
    stacks = [StackWeights(layers, 7, head), core, StackWeights(layers[:1], 7, inverse=True)]
    arguments = (stacks, precision, HALF)
    got = pack_stacks(*arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack_weights, "_stack_pack", stack_weights._reference)
        expected = pack_stacks(*arguments)
    for a, b in zip(got, expected, strict=True):
        assert a.layout == b.layout
        for value, exact in zip(a.tensors, b.tensors, strict=True):
            assert value.dtype == exact.dtype
            assert torch.equal(value, exact)


def test_hidden_layers_narrower_than_half_of_x_have_their_own_scales() -> None:
    """No run of other values reaches into the scales after it."""
    stacks = [StackWeights(random_layers(70, (16,), 2), 70)]
    (got,) = pack_stacks(stacks, "exact", HALF)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack_weights, "_stack_pack", stack_weights._reference)
        (expected,) = pack_stacks(stacks, "exact", HALF)
    assert torch.equal(got.weights, expected.weights)
    assert all(bool((scales > 0).all()) for row in got.weights for scales in got.layout.scales(row))


def _three(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], int]:
    """The tensors of a stack of two different layers with maps and a head, and of an A; the stack's number."""
    layers, head = _template()
    tensors = [t.to(dtype).requires_grad_() for t in (*leaves(layers, head), torch.randn(D, D, device=DEVICE))]
    return tensors, len(tensors) - 1


def _template() -> tuple[list[CouplingLayer], AffineMap | None]:
    layers = random_layers(D, (16, 8), 1, maps="dense")
    layers += random_layers(D, (24, 40), 1, moves="second", layout="interleaved", bias=False)
    return layers, random_map(D, "diagonal")


def _packed(tensors: list[Tensor], n: int) -> list[PackedStack]:
    layers, head = _template()
    layers, head = rebuilt(layers, tensors[:n], head)
    stack = StackWeights(layers, D, head)
    return pack_stacks([stack, StackWeights((), D, AffineMap(tensors[n]), shift=0.5), stack], "high", HALF)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
def test_gradients_are_those_of_plain_indexing(dtype: torch.dtype) -> None:
    """Also for a stack that is packed twice, and for tensors with any strides."""
    tensors, n = _three(dtype)
    if dtype == torch.float32:
        tensors = [(hostile(t)["every other"] if t.ndim == 2 else t).detach().requires_grad_() for t in tensors]
    cotangents = [torch.randn_like(p.weights) for p in _packed(tensors, n)]

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad([p.weights for p in _packed(tensors, n)], tensors, cotangents)

    with lf.backend("triton"):
        got = gradients()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack_weights, "_stack_pack", stack_weights._reference)
        expected = gradients()
    for value, exact, tensor in zip(got, expected, tensors, strict=True):
        assert value.dtype == tensor.dtype
        torch.testing.assert_close(value, exact)
        assert value.any()


def test_second_derivatives() -> None:
    """Packing and its gradient are linear: the second derivative of a square is twice the tensor's cotangent."""
    tensors, n = _three()
    (first,) = torch.autograd.grad(_packed(tensors, n)[0].weights.square().sum(), tensors[:1], create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), tensors[:1])
    assert torch.equal(first, 2 * tensors[0])
    assert torch.equal(second, torch.full_like(second, 2))


def test_opcheck() -> None:
    tensors, numbers = [], []
    for maps in NAMES:
        StackWeights(random_layers(D, (8,), 2, maps=maps), D, random_map(D, maps)).describe(tensors, numbers)
    flat = torch.cat([t.flatten() for t in tensors])
    constants = (numbers, 0.5, "exact", HALF)
    assert_registered(torch.ops.linfast.stack_pack.default, (flat, *constants))
    values = torch.ops.linfast.stack_pack.default(flat, *constants)[0]
    backward = torch.ops.linfast.stack_pack_backward.default
    assert_registered(backward, (flat, torch.randn_like(values), None, None, *constants))


def test_tables_are_kept_by_shape_and_those_of_a_captured_graph_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[int] = []
    StackWeights(random_layers(D, (8,), 2), D).describe([], numbers)
    cpu = torch.device("cpu")
    table = pack_table.pack_table(numbers, cpu)
    assert pack_table.pack_table(list(numbers), cpu) is table
    assert table not in pack_table._captured
    monkeypatch.setattr(pack_table, "_captured", set())
    monkeypatch.setattr(pack_table, "_kept", lambda rows, device: table)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    pack_table.pack_table(numbers, torch.device("cuda"))
    assert table in pack_table._captured
