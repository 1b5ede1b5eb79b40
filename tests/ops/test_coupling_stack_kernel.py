"""The coupling stack's kernel against float64: directions, activations, depths, sizes, maps, modes, strides."""

from __future__ import annotations

import pytest
import torch
from linfast.kernels import coupling_stack as kernels
from linfast.kernels import stack_configs
from torch import Tensor

import linfast as lf
from linfast.ops import AffineMap, CouplingLayer, coupling_stack, mlp_coupling
from linfast.ops.activations import ACTIVATION_NAMES
from linfast.ops.stack_weights import pack_stack
from linfast.precision import PRECISIONS, half_dtype
from linfast.scale_maps import SCALE_MAP_KINDS, ScaleMap
from tests.marks import long
from tests.ops.budget import DEVICE, HALF_DTYPES, assert_accurate, assert_within_budget, hostile
from tests.ops.checks import (
    assert_registered,
    assert_transforms,
    fixed_cotangents,
    refuse_launches,
    second_derivatives,
    turned,
)
from tests.ops.stacks import (
    NAMES,
    doubled,
    factors_of_every_part,
    leaves,
    plain_stack,
    random_layers,
    random_map,
    rebuilt,
    rounding,
)


def _run(x: Tensor, layers, **options):
    """(y, log_det) from the kernel."""
    options = {"activation": "silu", "scale_map": ScaleMap(), "log_det": True, "precision": "exact", **options}
    with lf.backend("triton"), torch.no_grad():
        return coupling_stack(x, layers, **options)


def _assert_accurate(x: Tensor, layers, precision: str = "exact", head: AffineMap | None = None, **options) -> None:
    """Within the rounding of the same formulas in fp32, with operands rounded as the mode rounds them."""
    options = {"activation": "silu", "scale_map": ScaleMap(), **options}
    got = _run(x, layers, precision=precision, head=head, **options)
    wide, wide_head = doubled(layers, head)
    truth = plain_stack(x.double(), wide, head=wide_head, **options)
    assert [t.dtype for t in got] == [torch.float32] * 2
    options |= {"head": head, "rounded": rounding(precision)}
    assert_accurate(got, lambda: plain_stack(x, layers, **options), truth)


def _x(batch: int, D: int) -> Tensor:
    return torch.randn(batch, D).to(DEVICE)


def layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stack runs layer by layer, in tiles so small that small sizes have several."""
    tile = stack_configs.LayersConfig(columns=64, last_columns=32, depth=16, rows=16, stages=2, num_warps=4)
    monkeypatch.setattr(kernels, "_tiles", kernels._tiles.__wrapped__)  # which keeps what it finds
    monkeypatch.setattr(stack_configs, "CONFIGS", {})
    monkeypatch.setattr(stack_configs, "LAYERS", {("sm_90", mode): tile for mode in PRECISIONS})


@pytest.fixture(params=["one launch", "layer by layer"])
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "layer by layer":
        layer_by_layer(monkeypatch)


@pytest.mark.parametrize("activation", ACTIVATION_NAMES)
@pytest.mark.parametrize(("inverse", "n_linear"), [(False, 2), (True, 3), *long((True, 2), (False, 3))])
def test_every_activation(activation: str, inverse: bool, n_linear: int) -> None:
    layers = random_layers(6, (16,) * (n_linear - 1), 2)
    for precision in ("exact", "fast"):
        _assert_accurate(_x(20, 6), layers, precision, activation=activation, inverse=inverse)


@pytest.mark.parametrize("n_linear", [1, 2, 3, 4])
@pytest.mark.parametrize(("inverse", "activation"), [(False, "silu"), (True, "relu"), *long((True, "silu"))])
def test_every_direction_and_conditioner_depth(n_linear: int, inverse: bool, activation: str) -> None:
    layers = random_layers(6, (16,) * (n_linear - 1), 2)
    for precision in ("exact", "fast"):
        _assert_accurate(_x(20, 6), layers, precision, activation=activation, inverse=inverse)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("batch", "activation"), [(70, "silu"), (20, "tanh")])  # 70: sm_90's tile of 128 rows
def test_every_mode(precision: str, batch: int, activation: str) -> None:
    _assert_accurate(_x(batch, 10), random_layers(10, (24, 16), 3), precision, activation=activation)


@pytest.mark.parametrize(
    ("D", "hidden"),
    [(2, (8, 8)), (3, (8,)), (7, (20, 33)), (33, (16, 40)), (40, (128, 64)), (64, (128, 128)), (65, (17,))],
)
@pytest.mark.parametrize("inverse", [False, True])
def test_every_size_is_padded(D: int, hidden: tuple[int, ...], inverse: bool) -> None:
    precision = "fast" if D > 64 else "exact"
    _assert_accurate(_x(40, D), random_layers(D, hidden, 2), precision, inverse=inverse)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("batch", [0, 1, 150])
def test_every_batch(batch: int, precision: str) -> None:
    _assert_accurate(_x(batch, 6), random_layers(6, (16,), 2), precision)


@pytest.mark.parametrize("maps", NAMES)
@pytest.mark.parametrize("head", NAMES)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("D", [7, *long(32)])
def test_maps_between_layers_and_before_the_first(maps: str, head: str, inverse: bool, D: int) -> None:
    layers = random_layers(D, (16,), 2, maps=maps)
    layers[0] = layers[0]._replace(map=None)  # the identity there
    _assert_accurate(_x(9, D), layers, head=random_map(D, head), inverse=inverse)
    _assert_accurate(_x(9, D), layers, "fast", head=random_map(D, head), inverse=inverse)


@pytest.mark.parametrize(("kind", "inverse", "order"), turned(SCALE_MAP_KINDS))
def test_every_scale_map_and_order(kind: str, inverse: bool, order: str) -> None:
    x, layers = _x(60, 5), random_layers(5, (16,), 2)
    for precision in ("exact", "fast"):
        _assert_accurate(x, layers, precision, scale_map=ScaleMap(kind), order=order, inverse=inverse)


@pytest.mark.parametrize("kind", SCALE_MAP_KINDS)
@pytest.mark.parametrize("precision", ["tf32", "fast"])
def test_the_scale_and_the_inverses_scale_cancel(kind: str, precision: str) -> None:
    """Conditioners without weights: only e^s e^-s and the shift's rounding separate a round trip from the input."""
    layers = [layer._replace(weights=[0 * w for w in layer.weights]) for layer in random_layers(6, (16,), 4)]
    x, scale_map = _x(20, 6), ScaleMap(kind)
    y, log_det = _run(x, layers, precision=precision, scale_map=scale_map)
    back, _ = _run(y, layers, precision=precision, scale_map=scale_map, inverse=True)
    growth = 4 * (8 + log_det.abs().max())  # of each rounding by 4 layers, and roundings of exp2's argument
    assert float((back - x).abs().max()) <= growth * torch.finfo(torch.float32).eps * float(y.abs().max())


@pytest.mark.parametrize("moves", ["first", "second"])
@pytest.mark.parametrize("layout", ["halves", "interleaved"])
@pytest.mark.parametrize(("bias", "D"), [(True, 7), *long((False, 7), (True, 6), (False, 6))])
def test_which_half_moves_the_outputs_layout_and_bias(moves: str, layout: str, bias: bool, D: int) -> None:
    layers = random_layers(D, (16,), 3, moves=moves, layout=layout, bias=bias)
    _assert_accurate(_x(9, D), layers, moves=moves)
    _assert_accurate(_x(9, D), layers, moves=moves, inverse=True)


@pytest.mark.parametrize("depth", [1, 2, 3, 8])
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_every_depth(depth: int, precision: str) -> None:
    _assert_accurate(_x(9, 6), random_layers(6, (16, 16), depth), precision, scale_map=ScaleMap(bound=4 / depth))


def test_layers_that_differ_in_width_layout_and_bias() -> None:
    layers = [
        *random_layers(6, (16, 8), 1),
        *random_layers(6, (24, 40), 1, moves="second", layout="interleaved", bias=False),
        *random_layers(6, (9, 16), 1, maps="dense"),
    ]
    _assert_accurate(_x(9, 6), layers)
    _assert_accurate(_x(9, 6), layers, inverse=True)


@pytest.mark.usefixtures("each_way")
def test_strides_of_x_which_is_not_written() -> None:
    x, layers = _x(9, 7), random_layers(7, (16,), 2)
    for strided in hostile(x).values():
        before = strided.clone()
        _assert_accurate(strided, layers)
        assert torch.equal(strided, before)


@pytest.mark.usefixtures("each_way")
def test_int64_offsets_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    x, layers = _x(40, 7).mT.contiguous().mT, random_layers(7, (16,), 2)
    narrow = _run(x, layers)
    monkeypatch.setattr(kernels, "reaches_past_int32", lambda *_: True)
    assert all(torch.equal(a, b) for a, b in zip(narrow, _run(x, layers), strict=True))


def test_int64_is_chosen_where_a_tile_reaches_past_two_to_the_31() -> None:
    assert not kernels.reaches_past_int32(torch.empty(4, 64, device="meta"), 128)
    assert kernels.reaches_past_int32(torch.empty_strided((4, 64), (1, 2**25), device="meta"), 128)
    assert kernels.reaches_past_int32(torch.empty_strided((4, 64), (2**24, 1), device="meta"), 128)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("depth", [1, 8])
def test_half_precision_keeps_the_state_in_fp32(dtype: torch.dtype, depth: int) -> None:
    x, layers = _x(20, 6).to(dtype), random_layers(6, (16,), depth)
    y, log_det = _run(x, layers, precision="exact")
    assert (y.dtype, log_det.dtype) == (dtype, torch.float32)
    expected, _ = _run(x.float(), layers, precision="exact")
    assert torch.equal(y, expected.to(dtype))
    for name, strided in hostile(x).items():
        same = y[:1].expand(y.shape) if name == "expanded" else y
        assert torch.equal(_run(strided, layers, precision="exact")[0], same), name


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("order", ["shift_first", "scale_first"])
def test_forward_and_inverse_use_bit_identical_shift_and_scale(precision: str, order: str) -> None:
    layers = random_layers(10, (24, 16), 1)
    x = _x(40, 10)
    y, forward = _run(x, layers, precision=precision, order=order)
    _, inverse = _run(y, layers, precision=precision, order=order, inverse=True)
    assert torch.equal(forward, -inverse)
    # A moved half of 0 becomes t (times e^s): inverted with another t it would not return to 0.
    x[:, :5] = 0
    shift, _ = _run(x, layers, precision=precision, order="scale_first")
    back, _ = _run(shift, layers, precision=precision, order="scale_first", inverse=True)
    assert not back[:, :5].any()


def test_the_same_input_gives_the_same_bits() -> None:
    x, layers = _x(150, 6), random_layers(6, (16,), 2, maps="dense")
    for precision in PRECISIONS:
        first, second = (_run(x, layers, precision=precision) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("each_way")
def test_nan_stays_in_its_row_and_is_not_lost() -> None:
    x, layers = _x(4, 6), random_layers(6, (16,), 2)
    x[1, 5] = float("nan")
    for activation in ACTIVATION_NAMES:
        for precision in ("exact", "fast"):
            y, log_det = _run(x, layers, activation=activation, precision=precision)
            assert y[1].isnan().any()
            assert log_det[1].isnan()
            assert not y[[0, 2, 3]].isnan().any()


def test_one_layer_is_mlp_coupling() -> None:
    x, (layer,) = _x(9, 6), random_layers(6, (16,), 1)
    with lf.backend("triton"):
        y, log_det = mlp_coupling(
            x, layer.weights, layer.biases, activation="relu", scale_map=ScaleMap(), log_det=True, precision="exact"
        )
    expected = _run(x, [layer], activation="relu")
    assert torch.equal(y, expected[0])
    assert torch.equal(log_det, expected[1])


def test_packed_weights_give_the_same_bits_and_take_no_gradient() -> None:
    x, layers = _x(9, 6), random_layers(6, (16,), 2, maps="dense")
    for inverse in (False, True):
        packed = pack_stack(layers, 6, inverse=inverse, precision="exact", dtype=half_dtype(x))
        y, _ = _run(x, layers, inverse=inverse)
        assert torch.equal(y, _run(x, layers, inverse=inverse, packed=packed)[0])


@pytest.mark.parametrize("n_linear", [1, 2])
def test_exact_products_keep_22_bits(n_linear: int) -> None:
    """One kept feature x, one moved feature 0: y_0 = t(x) = w x, since the log-scale's row of weights is zero.

    x and w are represented to 2^-23, and the product of their low parts, below 2^-22, is left out.
    """
    for x, w in zip(*factors_of_every_part(), strict=True):
        weights = [torch.stack((w, 0 * w))[:, None]]
        weights += [torch.eye(2, device=DEVICE)] * (n_linear - 1)
        layer = CouplingLayer(weights, [None] * n_linear)
        y, _ = _run(torch.stack((0 * x, x))[None], [layer], activation="relu")
        exact = float(x.double() * w.double())
        assert abs(float(y[0, 0]) - exact) <= (2 * 2.0**-23 + 2.0**-22) * abs(exact)


def _outputs_and_gradients(layers, head=None, **options):
    """(y, log_det, a gradient for x and every weight) for fixed random cotangents."""

    def call(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        built, new_head = rebuilt(layers, tensors, head)
        settings = {"activation": "silu", "scale_map": ScaleMap(), "precision": "exact", **options}
        y, log_det = coupling_stack(x, built, log_det=True, head=new_head, **settings)
        wanted = [t for t in (x, *tensors) if t.requires_grad]
        return (y, log_det, *torch.autograd.grad((y, log_det), wanted, fixed_cotangents(y, log_det)))

    return call


@pytest.mark.parametrize(("activation", "inverse", "order"), turned(ACTIVATION_NAMES))
def test_gradients(activation: str, inverse: bool, order: str) -> None:
    layers = random_layers(7, (20, 16), 2, maps="dense" if inverse else "diagonal")
    head = random_map(7, "diagonal")
    call = _outputs_and_gradients(layers, head, inverse=inverse, order=order, activation=activation)
    assert_within_budget(call, [t.requires_grad_() for t in (_x(20, 7), *leaves(layers, head))])


@pytest.mark.parametrize("kind", SCALE_MAP_KINDS)
@pytest.mark.parametrize("n_linear", [2, *long(1, 4)])
def test_gradients_of_every_scale_map(kind: str, n_linear: int) -> None:
    layers = random_layers(6, (16,) * (n_linear - 1), 2)
    call = _outputs_and_gradients(layers, scale_map=ScaleMap(kind))
    assert_within_budget(call, [t.requires_grad_() for t in (_x(20, 6), *leaves(layers))])


@pytest.mark.parametrize("precision", ["high", "tf32", "fast"])
def test_gradients_in_every_mode(precision: str) -> None:
    layers = random_layers(6, (16, 16), 3)
    call = _outputs_and_gradients(layers, precision=precision, activation="relu")
    inputs = [t.requires_grad_() for t in (_x(20, 6), *leaves(layers))]
    assert_within_budget(call, inputs, rounding(precision))


@pytest.mark.parametrize("batch", [0, 150])
def test_gradients_of_other_batches(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linfast.kernels.stack_backward_grid.TILES_A_RUN", 1)
    layers = random_layers(6, (16,), 2)
    assert_within_budget(
        _outputs_and_gradients(layers), [t.requires_grad_() for t in (_x(batch, 6), *leaves(layers))]
    )


@pytest.mark.parametrize("only", range(9))
def test_each_gradient_alone(only: int) -> None:
    layers = random_layers(6, (16,), 1, maps="dense")
    layers += random_layers(6, (16,), 1, moves="second", bias=False)
    tensors = [_x(9, 6), *leaves(layers)]
    assert len(tensors) == 9
    inputs = [t.detach().requires_grad_(i == only) for i, t in enumerate(tensors)]
    assert_within_budget(_outputs_and_gradients(layers), inputs)


def test_strides_of_weights_and_of_the_incoming_gradient() -> None:
    layers = random_layers(6, (16,), 2)
    tensors = [hostile(t)["batch innermost"] if t.ndim == 2 else t for t in leaves(layers)]
    cotangent = _x(9, 6)
    for name in hostile(cotangent):

        def call(x: Tensor, *tensors: Tensor, name: str = name) -> tuple[Tensor, ...]:
            built, _ = rebuilt(layers, tensors)
            y, _ = coupling_stack(x, built, activation="silu", scale_map=ScaleMap(), precision="exact")
            return torch.autograd.grad(y, (x, *tensors), hostile(cotangent.to(y.dtype))[name])

        assert_within_budget(call, [t.detach().requires_grad_() for t in (hostile(_x(9, 6))[name], *tensors)])


def test_second_derivatives_are_the_references() -> None:
    layers = random_layers(4, (8,), 2)
    first, *rest = leaves(layers)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        built, _ = rebuilt(layers, [weight, *(t.to(x.dtype) for t in rest)])
        y, log_det = coupling_stack(
            x, built, activation="tanh", scale_map=ScaleMap(), log_det=True, precision="exact"
        )
        return y.pow(3).sum() + log_det.square().sum()  # type: ignore[union-attr]

    assert_within_budget(second_derivatives(loss), [t.requires_grad_() for t in (_x(5, 4), first)])


@pytest.mark.parametrize("maps", ["dense", *long("none", "diagonal")])
def test_opcheck(maps: str) -> None:
    x, layers = _x(5, 7), random_layers(7, (16, 8), 2, maps=maps)
    forward, backward = [], []
    for precision, log_det in (("tf32", True), ("high", False)):
        packed = pack_stack(layers, 7, inverse=False, precision=precision, dtype=half_dtype(x))
        tensors = (x, packed.weights, packed.operands, packed.map_operands)
        constants = (7, 3, 16, packed.layout.maps, False, 1, 2, 0.5, 0.0, False, False, False, log_det, precision)
        gradients = (torch.randn_like(x), x.new_ones(5) if log_det else None)
        forward.append((*tensors, *constants))
        backward.append((*tensors, *gradients, *constants, [True, True, False, False]))
    assert_registered(torch.ops.linfast.coupling_stack.default, *forward)
    assert_registered(torch.ops.linfast.coupling_stack_backward.default, *backward)


def test_functional_transforms() -> None:
    layers = random_layers(4, (8,), 2)
    first, *rest = leaves(layers)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        built, _ = rebuilt(layers, [weight, *(t.to(x.dtype) for t in rest)])
        y, log_det = coupling_stack(
            x, built, activation="silu", scale_map=ScaleMap(), log_det=True, precision="exact"
        )
        return y.square().sum() + log_det.sum()  # type: ignore[union-attr]

    def transforms(x: Tensor, weight: Tensor) -> list[Tensor]:
        one_row = torch.func.vmap(lambda x: torch.func.grad(loss)(x[None], weight)[0])
        return [torch.func.grad(loss, argnums=1)(x, weight), one_row(x), torch.func.jacrev(loss)(x, weight)]

    assert_transforms(transforms, loss, [_x(3, 4), first])


def test_float64_the_reference_backend_and_larger_sizes_launch_no_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_launches(monkeypatch)
    x, layers = _x(3, 4), random_layers(4, (8,), 1)
    options = {"activation": "silu", "scale_map": ScaleMap()}
    with lf.backend("triton"):
        coupling_stack(x.double(), doubled(layers)[0], **options)
        with pytest.raises(AssertionError, match="stack_pack:launch"):
            coupling_stack(x, layers, **options)
        with pytest.raises(AssertionError, match="affine_coupling:launch"):
            coupling_stack(x, random_layers(4, (600,), 1), **options)
    with lf.backend("reference"):
        coupling_stack(x, layers, **options)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("inverse", [False, True])
def test_sizes_past_the_table_run_through_the_library(precision: str, inverse: bool) -> None:
    layers = random_layers(6, (300,), 2, maps="dense")
    _assert_accurate(_x(20, 6), layers, precision, inverse=inverse, head=random_map(6, "dense"))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"activation": "elu"}, "activation must be one of.*'elu'"),
        ({"order": "both"}, "order must be one of.*'both'"),
        ({"moves": "third"}, "moves must be one of.*'third'"),
        ({"precision": "double"}, "precision must be one of.*'double'"),
        ({"x": torch.zeros(3)}, r"x must be \[B, D\].*\(3,\)"),
        ({"layers": []}, "layers must hold at least one"),
        ({"layers": random_layers(6, (8,), 1)}, r"layers\[0\].weights: each must be \[out, 2\].*\(8, 3\)"),
        (
            {"layers": [CouplingLayer([torch.zeros(3, 2)], [None])]},
            r"layers\[0\].weights: the last must have 4 rows.*got 3",
        ),
        (
            {"layers": [CouplingLayer([torch.zeros(4, 2)], [torch.zeros(3)])]},
            r"layers\[0\].biases: each must be \[4\].*\(3,\)",
        ),
        ({"layers": [CouplingLayer([torch.zeros(4, 2)], [])]}, "as many weights and biases.*1 and 0"),
        ({"layers": [CouplingLayer([torch.zeros(4, 2)], [None], "rows")]}, "layout must be one of.*'rows'"),
        (
            {"layers": [CouplingLayer([torch.zeros(4, 2, device="meta")], [None])]},
            r"layers\[0\].weights is on meta",
        ),
        ({"head": AffineMap(torch.zeros(3))}, r"head.weight must be \(4,\).*\(3,\)"),
    ],
)
def test_what_does_not_fit_is_named(change, match: str) -> None:
    arguments = {"x": torch.zeros(2, 4), "layers": random_layers(4, (8,), 1), **change}
    x, layers = arguments.pop("x").to(DEVICE), arguments.pop("layers")
    with pytest.raises(ValueError, match=match):
        coupling_stack(x, layers, **{"activation": "silu", "scale_map": ScaleMap(), **arguments})


def test_kernels_know_the_activations_by_the_same_ids() -> None:
    from linfast.kernels import mlp

    for i, name in enumerate(ACTIVATION_NAMES):
        assert getattr(mlp, name.upper()).value == i
