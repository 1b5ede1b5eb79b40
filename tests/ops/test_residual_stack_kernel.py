"""A residual network in one launch against float64: sizes, norms, gates, activations, modes, strides."""

from __future__ import annotations

import copy

import pytest
import torch
from linfast.bench.rounding import operand_rounding
from linfast.kernels import residual_stack as kernel
from torch import nn

import linfast as lf
from linfast.ops.masked_autoregressive import MASKED_ACTIVATIONS
from linfast.ops.residual_network import residual_network
from linfast.precision import PRECISIONS, half_dtype
from tests.launch_counts import Launches
from tests.ops.budget import COMPILED, DEVICE, HALF_DTYPES, assert_within_budget, hostile
from tests.ops.checks import assert_registered, assert_same_bits
from tests.ops.residual import Net

# Batches of more than 16 rows run on the larger tiles (tests/conftest.py).
SIZES = [(1, 50, 161, 77), (3, 1, 1, 1), (5, 33, 23, 17), (33, 128, 40, 5), (2, 64, 70, 33), (4, 100, 5, 40)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("n_in", "hidden", "n_out", "batch"), SIZES)
def test_every_size(n_in: int, hidden: int, n_out: int, batch: int, transposed: bool) -> None:
    net = Net(n_in, hidden, n_out, transposed=transposed)
    assert_within_budget(net.run, net.tensors(batch))
    with lf.backend("triton"):
        (y,) = net.run(*net.tensors(batch))
    assert y.stride() == ((1, batch) if transposed else (n_out, 1))


@pytest.mark.parametrize("rows", [None, 1])
@pytest.mark.parametrize("context", [0, 4])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("blocks", [1, 5])
def test_norms_gates_and_depths(blocks: int, norms: bool, context: int, rows: int | None) -> None:
    net = Net(blocks=blocks, norms=norms, context=context, activation="elu")
    if context or rows is None:
        assert_within_budget(net.run, net.tensors(21, rows))


@pytest.mark.parametrize("activation", MASKED_ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    net = Net(activation=activation, norms=activation in ("tanh", "gelu"))
    assert_within_budget(net.run, net.tensors(20))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch", [9, 40])
def test_every_mode(batch: int, precision: str) -> None:
    net = Net(hidden=40, context=3)
    inputs = net.tensors(batch)
    # The interpreter's parts are of tf32, which is finer than bf16.
    operands = operand_rounding(precision, half_dtype(inputs[0]) if precision == "fast" else torch.bfloat16)
    assert_within_budget(lambda *t: net.stack(*t, precision=precision), inputs, operands)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("norms", [False, True])
def test_half_precision_sums_in_fp32(norms: bool, dtype: torch.dtype) -> None:
    net = Net(hidden=40, context=3, norms=norms, activation="silu")
    assert_within_budget(net.run, net.tensors(30, dtype=dtype))


def test_strides_of_x_and_of_a_context() -> None:
    net = Net(context=4)
    x, context, *weights = net.tensors(18)
    for name in hostile(x):
        assert_within_budget(net.run, [hostile(x)[name], hostile(context)[name], *weights])


def test_int64_offsets_and_a_second_run_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    for rows, transposed in ((None, False), (1, True)):
        net = Net(context=4, norms=True, transposed=transposed)
        assert_same_bits(net.run, net.tensors(40, rows), monkeypatch, kernel)


def test_nan_and_infinity_stay_in_their_row() -> None:
    net = Net()
    x, *weights = net.tensors(9)
    bad = x.clone()
    bad[3, 1], bad[5, 0] = float("nan"), float("inf")
    with lf.backend("triton"):
        (y,), (expected,) = net.run(bad, *weights), net.run(x, *weights)
    rest = [i for i in range(9) if i not in (3, 5)]
    assert torch.equal(y[rest], expected[rest])
    assert bool(y[3].isnan().all())


def _model(**options: object) -> lf.ResidualMLP:
    model = lf.ResidualMLP(3, 7, 12, zero_last=False, **options).eval().to(DEVICE)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def _launches(model: nn.Module, monkeypatch: pytest.MonkeyPatch, batch: int = 5, **given: object) -> list[str]:
    with monkeypatch.context() as patch, lf.backend("triton"), torch.no_grad():
        return Launches(patch).of(lambda x: model(x, **given), torch.randn(batch, 3))


@pytest.mark.skipif(COMPILED, reason="counts what the interpreter launches")
def test_a_network_is_one_launch_and_one_that_packs_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({}, {"batch_norm": True}, {"blocks": 5, "activation": "gelu"}):
        model = _model(**options)
        assert _launches(model, monkeypatch) == ["cat", "_residual_stack_kernel"]
        with lf.freeze(model):
            assert _launches(model, monkeypatch) == ["_residual_stack_kernel"]
    with monkeypatch.context() as patch:  # before: the products, and the steps between them, each on its own
        patch.setattr("linfast.ops.residual_network.is_one_launch", lambda *_: False)
        assert len(_launches(_model(), monkeypatch)) == 11
        assert len(_launches(_model(blocks=5), monkeypatch)) == 23


def test_shapes_that_do_not_fit_are_those_of_torch() -> None:
    """A block that is wider inside runs as it does in torch; a wrong number of features raises torch's error."""
    model, x = _model(), torch.randn(5, 3, device=DEVICE)
    model.blocks[0].layers = nn.ModuleList([nn.Linear(12, 24), nn.Linear(24, 12)]).to(DEVICE)
    with torch.no_grad():
        expected = residual_network(x.double(), copy.deepcopy(model).double().network())
        with lf.backend("triton"):
            assert float((residual_network(x, model.network()) - expected).norm() / expected.norm()) < 1e-6
            with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
                residual_network(x[:, :2], model.network())


@pytest.mark.skipif(COMPILED, reason="the interpreter's tiles are those of a small GPU")
def test_the_sizes_of_these_tests_run_every_tile() -> None:
    tiles = [kernel.tile_for(torch.empty(77, 3), hidden, parts) for hidden, parts in ((64, 3), (128, 1), (128, 3))]
    assert tiles == [kernel.IN_PARTS, kernel.IN_ONE_PART, kernel.FEW]


@pytest.mark.skipif(COMPILED, reason="counts what the interpreter launches")
def test_what_one_launch_does_not_compute_runs_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    no_bias, other_eps, half_affine = (_model(batch_norm=True) for _ in range(3))
    no_bias.blocks[0].layers[0].bias = None
    other_eps.blocks[1].norms[0].eps = 1e-5
    half_affine.blocks[1].norms[0].bias = None
    models = [
        no_bias, other_eps, half_affine, _model(batch_norm=True).train(), _model(dropout=0.5).train(),
        _model(blocks=0), lf.ResidualMLP(3, 7, 129).to(DEVICE),
    ]  # fmt: skip
    for model in models:
        assert "_residual_stack_kernel" not in _launches(model, monkeypatch)
    model, x = _model(), torch.randn(5, 3, device=DEVICE)
    assert "_residual_stack_kernel" not in _launches(model, monkeypatch, batch=0)
    with monkeypatch.context() as patch, lf.backend("triton"):
        launches = Launches(patch)
        assert "_residual_stack_kernel" not in launches.of(model, x)  # gradients are required
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
            assert "_residual_stack_kernel" not in launches.of(model, x)
        with torch.no_grad():
            assert "_residual_stack_kernel" not in launches.of(torch.func.vmap(lambda row: model(row[None])[0]), x)
            assert "_residual_stack_kernel" in launches.of(model, x)
    with torch.no_grad():  # on a CPU nothing changes
        assert torch.equal(model(x), residual_network(x, model.network()))


def test_writes_to_weights_are_seen() -> None:
    model, x = _model(batch_norm=True), torch.randn(5, 3, device=DEVICE)
    with torch.no_grad(), lf.backend("triton"):
        before = model(x)
        model.blocks[0].layers[1].weight.data.mul_(2)  # torch counts no write
        after = model(x)
        model.blocks[1].norms[0].running_var.mul_(4)
        last = model(x)
    with torch.no_grad(), lf.backend("reference"):
        expected = copy.deepcopy(model).double()(x.double())
    assert float((last - expected).norm() / expected.norm()) < 1e-6
    assert float((after - before).norm() / before.norm()) > 1e-3
    assert float((last - after).norm() / after.norm()) > 1e-3


def test_opcheck() -> None:
    net = Net(n_in=3, hidden=6, n_out=5, context=2, norms=True)
    x, *_ = net.tensors(4)
    of_block = 2 * (36 + 6) + 8 * 6
    packed, terms = torch.rand(6 * 5 + 2 * of_block + 5 * 7, device=DEVICE), torch.randn(4, 18, device=DEVICE)
    given = (x, packed, terms, 5, 2, 5, True, True, 1e-3, 4, True, "exact", torch.float32)
    few = torch.randn(18 + 84 + 35, device=DEVICE), terms[:1, :6]
    bare = (x, *few, 5, 1, 3, False, False, 0.0, 0, False, "fast", torch.float16)
    assert_registered(torch.ops.linfast.residual_stack.default, given, bare)
