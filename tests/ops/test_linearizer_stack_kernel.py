"""The one-launch Linearizer against float64, and against its three parts one after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import linfast as lf
from linfast.ops import AffineMap, CouplingStack, linearizer_stack
from linfast.ops.linearizer_stack import pack_linearizer
from linfast.precision import PRECISIONS
from linfast.scale_maps import ScaleMap
from tests.marks import long
from tests.ops.budget import DEVICE, assert_accurate, assert_within_budget, error, hostile
from tests.ops.checks import assert_registered, fixed_cotangents, second_derivatives
from tests.ops.stacks import NAMES, doubled, leaves, plain_stack, random_layers, random_map, rebuilt, rounding

EPS = torch.finfo(torch.float32).eps


def _network(D: int, depth: int = 2, hidden=(16, 16), moves: str = "first", maps: str = "none") -> CouplingStack:
    head = random_map(D, maps)
    layers = random_layers(D, hidden, depth, moves=moves, maps=maps)
    return CouplingStack(layers, "silu", ScaleMap(bound=1 / depth), moves=moves, head=head)


def _operator(D: int, diagonal: bool = False) -> Tensor:
    return (torch.randn(D) if diagonal else torch.randn(D, D) / D**0.5).to(DEVICE)


def _x(batch: int, D: int) -> Tensor:
    return torch.randn(batch, D).to(DEVICE)


def _plain(
    x: Tensor,
    g_x: CouplingStack,
    A: Tensor,
    g_y: CouplingStack,
    rounded: Callable[[Tensor], Tensor] = lambda t: t,
    rounded_of_A: Callable[[Tensor], Tensor] = lambda t: t,
) -> Tensor:
    def run(x: Tensor, g: CouplingStack, inverse: bool) -> Tensor:
        return plain_stack(
            x, g.layers, g.activation, g.scale_map, order=g.order, moves=g.moves, inverse=inverse, head=g.head,
            rounded=rounded,
        )[0]  # fmt: skip

    z = run(x, g_x, False)
    return run(z * A if A.ndim == 1 else rounded_of_A(z) @ rounded_of_A(A).mT, g_y, True)


def _wide(g: CouplingStack) -> CouplingStack:
    layers, head = doubled(g.layers, g.head)
    return dataclasses.replace(g, layers=layers, head=head)


def _assert_accurate(
    x: Tensor, g_x: CouplingStack, A: Tensor, g_y: CouplingStack, precision: str = "exact", path: str = "stack"
) -> None:
    with lf.backend("triton"), torch.no_grad():
        launch = pack_linearizer(x, g_x, A, g_y, precision)
        assert ("layers" if launch is None else "stack") == path
        y = linearizer_stack(x, g_x, A, g_y, precision=precision)
    truth = _plain(x.double(), _wide(g_x), A.double(), _wide(g_y))
    rounded = rounding(precision), rounding("exact" if precision == "exact" else "high")  # A has at least two parts
    assert_accurate([y], lambda: [_plain(x, g_x, A, g_y, *rounded)], [truth])


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("hidden", [(16, 16), (300,)])  # one launch, and one after another
def test_half_inputs_meet_fp32_weights(backend: str, diagonal: bool, hidden: tuple[int, ...]) -> None:
    x, A = _x(9, 6).half(), _operator(6, diagonal)
    g_x, g_y = _network(6, hidden=hidden), _network(6, hidden=hidden)
    with lf.backend(backend), torch.no_grad():
        y = linearizer_stack(x, g_x, A, g_y)
    truth = _plain(x.double(), _wide(g_x), A.double(), _wide(g_y))
    assert y.dtype == torch.float16
    assert error(y, truth) <= 8 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_gradients_for_half_inputs_are_those_of_a_state_in_fp32(backend: str) -> None:
    x, v, A, g = _x(40, 6).half(), _x(40, 6).half(), _operator(6).requires_grad_(), _network(6)

    def gradient(x: Tensor, v: Tensor) -> Tensor:
        with lf.backend(backend):
            y = linearizer_stack(x, g, A, g, precision="exact")
        return torch.autograd.grad(y, A, v)[0]

    assert error(gradient(x, v), gradient(x.float(), v.float()).double()) <= 1e-6


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("batch", "diagonal"), [(40, False), (40, True), (70, False)])  # 70: a tile of 128 rows
def test_every_mode_and_kind_of_operator(precision: str, batch: int, diagonal: bool) -> None:
    _assert_accurate(_x(batch, 7), _network(7), _operator(7, diagonal), _network(7, 3, moves="second"), precision)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("hidden", [(16, 16), (300,)])  # one launch, and one after another
def test_a_multiple_of_the_identity_is_added_to_A(backend: str, diagonal: bool, hidden: tuple[int, ...]) -> None:
    x, A, g = _x(20, 7), _operator(7, diagonal).requires_grad_(), _network(7, hidden=hidden, maps="diagonal")
    eye = torch.ones(7, device=DEVICE) if diagonal else torch.eye(7, device=DEVICE)

    def call(x: Tensor, A: Tensor) -> tuple[Tensor, ...]:
        here = g if x.dtype == torch.float32 else _wide(g)
        y = linearizer_stack(x, here, A, here, alpha=-1.5, precision="exact")
        return y, torch.autograd.grad(y.square().sum(), A)[0]

    with lf.backend(backend):
        got = call(x, A)
    with lf.backend("reference"):
        wide = _wide(g)
        y = linearizer_stack(x.double(), wide, A.double() - 1.5 * eye.double(), wide)
        exact = y, torch.autograd.grad(y.square().sum(), A)[0]
    for value, truth in zip(got, exact, strict=True):
        assert error(value, truth) <= 2e-6


@pytest.mark.parametrize("maps_x", NAMES)
@pytest.mark.parametrize("maps_y", NAMES)
def test_maps_on_either_side(maps_x: str, maps_y: str) -> None:
    _assert_accurate(_x(9, 6), _network(6, maps=maps_x), _operator(6), _network(6, 1, maps=maps_y))


@pytest.mark.parametrize("D", [2, 5, 33])
@pytest.mark.parametrize("batch", [0, 1, 70])
def test_every_size_and_batch(D: int, batch: int) -> None:
    _assert_accurate(_x(batch, D), _network(D, hidden=(16,)), _operator(D), _network(D, hidden=(9,)))


@pytest.mark.parametrize("maps", NAMES)
def test_one_network_on_both_sides(maps: str) -> None:
    g = _network(6, maps=maps)
    _assert_accurate(_x(20, 6), g, _operator(6), g)


def test_the_identity_as_operator_gives_x_back() -> None:
    x, g = _x(20, 6), _network(6, 4)
    with lf.backend("triton"):
        y = linearizer_stack(x, g, torch.ones(6, device=DEVICE), g, precision="fast")
    torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)  # the same shift and scale in both directions


def test_strides_of_x() -> None:
    x, g, A = _x(9, 6), _network(6), _operator(6)
    for strided in hostile(x).values():
        _assert_accurate(strided, g, A, g)


def test_packed_weights_give_the_same_bits() -> None:
    x, g_x, g_y, A = _x(9, 6), _network(6), _network(6, maps="dense"), _operator(6)
    with lf.backend("triton"):
        packed, *_ = pack_linearizer(x, g_x, A, g_y, "exact")
        y = linearizer_stack(x, g_x, A, g_y, precision="exact")
        assert torch.equal(y, linearizer_stack(x, g_x, A, g_y, precision="exact", packed=packed))


@pytest.mark.parametrize(
    "other",
    [
        lambda: CouplingStack(random_layers(6, (16, 16), 1), "relu", ScaleMap()),
        lambda: CouplingStack(random_layers(6, (40, 16), 1), "silu", ScaleMap()),
        lambda: CouplingStack(random_layers(6, (16,), 1), "silu", ScaleMap("tanh")),
        lambda: CouplingStack(random_layers(4, (16, 16), 1), "silu", ScaleMap()),
    ],
)
def test_networks_that_share_no_tile_run_one_after_another(other) -> None:
    x, g_x, g_y = _x(20, 6), _network(6), other()
    A = _operator(6)[: 4 if g_y.layers[0].weights[0].shape[1] == 2 else 6]
    _assert_accurate(x, g_x, A, g_y, path="layers")


def _call(g_x: CouplingStack, g_y: CouplingStack):
    """(y, a gradient for every input that requires one); tensors: x, A, those of g_x, those of g_y."""
    n = len(leaves(g_x.layers, g_x.head))

    def filled(g: CouplingStack, tensors) -> CouplingStack:
        layers, head = rebuilt(g.layers, tensors, g.head)
        return dataclasses.replace(g, layers=layers, head=head)

    def call(x: Tensor, A: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        y = linearizer_stack(x, filled(g_x, tensors[:n]), A, filled(g_y, tensors[n:]), precision="exact")
        return (y, *torch.autograd.grad(y, [t for t in (x, A, *tensors) if t.requires_grad], fixed_cotangents(y)))

    return call


@pytest.mark.parametrize(
    ("diagonal", "maps"),
    [
        (False, "none"),
        (True, "diagonal"),
        (False, "dense"),
        *long((True, "none"), (False, "diagonal"), (True, "dense")),
    ],
)
def test_gradients(diagonal: bool, maps: str) -> None:
    g_x, g_y = _network(7, maps=maps), _network(7, 3, moves="second")
    inputs = [_x(20, 7), _operator(7, diagonal), *leaves(g_x.layers, g_x.head), *leaves(g_y.layers, g_y.head)]
    assert_within_budget(_call(g_x, g_y), [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize("only", range(10))
def test_each_gradient_alone(only: int) -> None:
    g_x, g_y = (_network(6, 1, hidden=(16,)) for _ in range(2))
    inputs = [_x(60, 6), _operator(6), *leaves(g_x.layers), *leaves(g_y.layers)]
    assert len(inputs) == 10
    assert_within_budget(_call(g_x, g_y), [t.detach().requires_grad_(i == only) for i, t in enumerate(inputs)])


def test_second_derivatives_are_the_references() -> None:
    g = _network(4, hidden=(8,))

    def loss(x: Tensor, A: Tensor) -> Tensor:
        here = g if x.dtype == torch.float32 else _wide(g)
        return linearizer_stack(x, here, A, here, precision="exact").pow(3).sum()

    assert_within_budget(second_derivatives(loss), [t.requires_grad_() for t in (_x(5, 4), _operator(4))])


@pytest.mark.parametrize("maps", ["dense", *long("none")])
def test_opcheck(maps: str) -> None:
    x, A, g_x, g_y = _x(5, 6), _operator(6), _network(6, maps=maps), _network(6)
    with lf.backend("triton"):
        packed, spec_x, spec_y = pack_linearizer(x, g_x, A, g_y, "high")
    tensors = (x, *packed.g_x.tensors, packed.A.weights, packed.A.map_operands, *packed.g_y.tensors)
    constants = (*spec_x.constants, *spec_y.constants)
    assert_registered(torch.ops.linfast.linearizer_stack.default, (*tensors, *constants))
    backward = torch.ops.linfast.linearizer_stack_backward.default
    needs = [True, True, False, False, True, False, True, False, False]
    assert_registered(backward, (*tensors, torch.randn_like(x), *constants, needs))


def test_functional_gradient() -> None:
    x, A, g = _x(5, 6).requires_grad_(), _operator(6), _network(6, maps="dense")

    def loss(x: Tensor) -> Tensor:
        return linearizer_stack(x, g, A, g).square().sum()

    with lf.backend("triton"):
        torch.testing.assert_close(torch.func.grad(loss)(x.detach()), torch.autograd.grad(loss(x), x)[0])


def test_what_does_not_fit_is_named() -> None:
    x, g = _x(2, 6), _network(6, 1)
    with pytest.raises(ValueError, match=r"A must be \[D_y, D\].*\(2, 6\).*\(6, 5\)"):
        linearizer_stack(x, g, torch.zeros(6, 5), g)
    with pytest.raises(ValueError, match=r"alpha must be 0 unless A is square.*\(4, 6\)"):
        linearizer_stack(x, g, torch.zeros(4, 6, device=DEVICE), g, alpha=0.5)
    with pytest.raises(ValueError, match=r"g_y for A .*layers\[0\].weights: each must be"):
        linearizer_stack(x, g, torch.zeros(4, 6, device=DEVICE), g)
    with pytest.raises(ValueError, match=r"head.weight must be \(6,\)"):
        linearizer_stack(x, dataclasses.replace(g, head=AffineMap(torch.zeros(5, device=DEVICE))), _operator(6), g)
