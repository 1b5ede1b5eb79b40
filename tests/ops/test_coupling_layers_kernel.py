"""The coupling stack layer by layer against float64: shipped tiles at large sizes, and small tiles for the rest.

What test_coupling_stack_kernel.py tests "each way" is tested there.
"""

from __future__ import annotations

import pytest
import torch
from linfast.kernels import coupling_layers, stack_configs
from linfast.kernels.stack_configs import LARGEST_LAYERS, LayersConfig, StackEntry, entry_for, tiles_for
from linfast.kernels.stack_spec import DENSE, DIAGONAL

import linfast as lf
from linfast.ops.activations import ACTIVATION_NAMES
from linfast.precision import PRECISIONS
from linfast.scale_maps import SCALE_MAP_KINDS, ScaleMap
from tests.launch_counts import Launches
from tests.marks import long
from tests.ops.budget import COMPILED, HALF_DTYPES, assert_within_budget
from tests.ops.checks import turned
from tests.ops.stacks import leaves, random_layers, rounding
from tests.ops.test_coupling_stack_kernel import _assert_accurate, _outputs_and_gradients, _run, _x, layer_by_layer

_D, _HIDDEN, _ROWS = 37, (24, 70), 20  # half 32 and hidden 128 when padded: two tiles of each, the rest masked


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    layer_by_layer(monkeypatch)


# The shipped tiles. A GPU's own tile runs there; in the interpreter, that of sm_90.


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("D", "hidden", "inverse"), [(131, (260,), False), (40, (300, 20), True), *long((256, (512, 512), False))]
)
def test_large_sizes_in_every_mode(D: int, hidden: tuple[int, ...], inverse: bool, precision: str) -> None:
    _assert_accurate(_x(3, D), random_layers(D, hidden, 2), precision, inverse=inverse, activation="gelu")


@pytest.mark.parametrize("precision", ["exact", "fast", *long("high", "tf32")])
def test_gradients_of_large_sizes(precision: str) -> None:
    layers = random_layers(200, (300,), 2)
    inputs = [t.requires_grad_() for t in (_x(3, 200), *leaves(layers))]
    assert_within_budget(_outputs_and_gradients(layers, precision=precision), inputs, rounding(precision))


def test_which_sizes_run_layer_by_layer() -> None:
    assert isinstance(tiles_for(64, 128, 3, "exact", "sm_90"), StackEntry)
    for target, mode in stack_configs.CONFIGS:
        found = tiles_for(*LARGEST_LAYERS, mode, target)
        assert isinstance(found, LayersConfig) == ((target, mode) != ("sm_100", "tf32"))
        for i, most in enumerate(LARGEST_LAYERS):
            too_large = (*LARGEST_LAYERS[:i], most + 1, *LARGEST_LAYERS[i + 1 :])
            assert tiles_for(*too_large, mode, target) is None
        assert tiles_for(256, 512, 3, mode, target, DIAGONAL) is None
        assert tiles_for(256, 512, 3, mode, target, DENSE) is None
    assert entry_for(256, 512, 3, "fast", "sm_90", linearizer=True) is None
    assert tiles_for(256, 512, 3, "fast", None) is None


@pytest.mark.skipif(COMPILED, reason="counts what the interpreter launches")
@pytest.mark.parametrize(("dtype", "copies"), [(torch.float32, 0), (torch.float16, 2)])
def test_a_layer_is_one_launch_for_each_linear_layer(
    dtype: torch.dtype, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, layers = _x(3, 131).to(dtype), random_layers(131, (260, 16), 3)
    names = Launches(monkeypatch).of(lambda x: _run(x, layers, precision="exact")[0], x)
    fused = [name for name in names if name.startswith("_layer")]
    assert fused == 3 * ["_layer_kernel", "_layer_kernel", "_layer_coupling_kernel"]
    assert len(names) - len(fused) <= 4 + copies, names  # two of packing, sums set to zero and summed


# Small tiles.


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("inverse", [False, True])
def test_every_mode_and_direction(precision: str, inverse: bool) -> None:
    _assert_accurate(_x(_ROWS, _D), random_layers(_D, _HIDDEN, 3), precision, inverse=inverse)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("activation", "inverse", "order"), turned(ACTIVATION_NAMES))
def test_every_activation(activation: str, inverse: bool, order: str) -> None:
    for precision in ("exact", "fast"):
        options = {"activation": activation, "inverse": inverse, "order": order}
        _assert_accurate(_x(_ROWS, 9), random_layers(9, (70,), 2), precision, **options)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("kind", "inverse", "order"), turned(SCALE_MAP_KINDS))
def test_every_scale_map_and_order(kind: str, inverse: bool, order: str) -> None:
    layers = random_layers(_D, (16,), 2)
    _assert_accurate(_x(_ROWS, _D), layers, scale_map=ScaleMap(kind), inverse=inverse, order=order)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("n_linear", [1, 2, 3, 4])
@pytest.mark.parametrize(("moves", "layout", "bias"), [("first", "halves", False), ("second", "interleaved", True)])
def test_every_depth_of_a_conditioner(n_linear: int, moves: str, layout: str, bias: bool) -> None:
    for depth in (1, 2, 3):  # a stack of one layer moves only one half
        layers = random_layers(7, (20, 33, 16)[: n_linear - 1], depth, moves=moves, layout=layout, bias=bias)
        _assert_accurate(_x(9, 7), layers, moves=moves, inverse=depth == 2)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
def test_runs_of_rows_give_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, layers = _x(100, 7).to(dtype), random_layers(7, (16, 16), 2)
    whole = _run(x, layers)
    monkeypatch.setattr(coupling_layers, "ROWS_AT_A_TIME", 48)
    assert all(torch.equal(a, b) for a, b in zip(whole, _run(x, layers), strict=True))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("inverse", "log_det"), [(False, True), (True, False)])
def test_an_output_that_is_not_requested_changes_nothing_else(inverse: bool, log_det: bool) -> None:
    x, layers = _x(20, 7), random_layers(7, (16,), 2)
    y, total = _run(x, layers, inverse=inverse, log_det=log_det)
    assert (total is None) == (not log_det)
    assert torch.equal(y, _run(x, layers, inverse=inverse)[0])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("inverse", [False, True])
def test_gradients(inverse: bool) -> None:
    layers = random_layers(_D, _HIDDEN, 3)
    call = _outputs_and_gradients(layers, inverse=inverse, order="scale_first" if inverse else "shift_first")
    assert_within_budget(call, [t.requires_grad_() for t in (_x(_ROWS, _D), *leaves(layers))])


def test_a_flow_says_which_path_it_takes_and_why() -> None:
    x, large = _x(2, 131), lf.coupling_flow(131, 2, hidden=(260, 260))
    with lf.backend("triton"):
        trained = str(lf.plan(large, x))
    with lf.backend("triton"), torch.no_grad():
        (layers,) = lf.plan(large, x).choices
        wider = str(lf.plan(lf.coupling_flow(131, 2, hidden=(600,)), x))
        maps = str(lf.plan(lf.coupling_flow(131, 2, hidden=(260,), mix="lu"), x))
        parts = lf.plan(lf.Linearizer(large, lf.Dense(131)), x).choices
    assert (layers.runs, layers.tile, layers.precision) == ("coupling_stack", "128 rows, 8 warps", "exact")
    assert "one launch per linear layer: D = 131, H = 260 are too large for a single one on sm_90" in layers.why
    assert "D = 131, H = 260 in 'exact' with gradients fit no tile on sm_90" in trained
    assert "D = 131, H = 600 in 'exact' fit no tile on sm_90" in wider
    assert "D = 131, H = 260 in 'exact' with maps between couplings fit no tile on sm_90" in maps
    assert [part.runs for part in parts] == ["part by part", "coupling_stack", "torch", "coupling_stack"]
