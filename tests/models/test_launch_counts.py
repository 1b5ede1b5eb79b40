"""The number of launches of an unfrozen model on a GPU, by torch and by linfast, counted on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import linfast as lf
from linfast.ops.stack_weights import pack_stack
from tests.launch_counts import Launches
from tests.ops.budget import COMPILED
from tests.ops.stacks import random_layers

D, B = 7, 40

pytestmark = pytest.mark.skipif(COMPILED, reason="counts what the interpreter launches")


def _flow(depth: int = 8, **options: Any) -> lf.Flow:
    return lf.coupling_flow(D, depth, hidden=(16, 16), **options).eval()


def _calls() -> dict[str, Callable[[Tensor], Tensor]]:
    g, h = _flow(), _flow()
    low_rank = lf.LowRank(0.5, torch.randn(D, 2), torch.randn(D, 2))
    return {
        "g": g,
        "g inverse": g.inverse,
        "g, log_det": lambda x: g.forward_and_log_det(x)[0],
        "f, dense": lf.Linearizer(g, lf.Dense(D)),
        "f, diagonal": lf.Linearizer(g, lf.Diagonal(D)),
        "f, low rank": lf.Linearizer(g, low_rank),
        "f, two networks, dense": lf.Linearizer(g, lf.Dense(D), h),
        "f, two networks, low rank": lf.Linearizer(g, low_rank, h),
    }


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", _calls())
def test_an_unfrozen_call_is_four_launches_at_most(name: str, grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    call, x = _calls()[name], torch.randn(B, D)
    with lf.backend("triton"), torch.set_grad_enabled(grad):
        names = Launches(monkeypatch).of(call, x)
    assert len(names) <= 4, names
    assert names[-2:-1] == ["_stack_pack_kernel"], names


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("context_features", [3, 0])
def test_a_residual_block_is_eight_launches(
    batch_norm: bool, context_features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four of the forward, two products and what lies between them, and as many backward."""
    launches, counts = Launches(monkeypatch), []
    x, context = torch.randn(B, D), torch.randn(B, 3) if context_features else None
    for blocks in (2, 5):
        net = lf.ResidualMLP(D, 4, 16, blocks, "elu", batch_norm=batch_norm, context_features=context_features)
        with lf.backend("triton"):
            names = launches.of(lambda x: net(x, context=context), x)  # noqa: B023
            loss = net(x, context=context).sum()
            launches.names.clear()
            with launches:
                loss.backward()
        counts.append((len(names), len(launches.names)))
    assert (counts[1][0] - counts[0][0], counts[1][1] - counts[0][1]) == (3 * 4, 3 * 4)


@pytest.mark.parametrize("maps", ["none", "dense"])
def test_the_backward_of_a_stack_is_three_launches_for_any_batch_and_depth(
    maps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("linfast.kernels.coupling_stack_backward.multiprocessors", lambda *_: 132)
    launches, backward = Launches(monkeypatch), torch.ops.linfast.coupling_stack_backward.default
    for depth in (2, 8):
        layers = random_layers(D, (16, 16), depth, maps=maps)
        packed = pack_stack(layers, D, inverse=False, precision="exact", dtype=torch.float16)
        constants = (D, 3, 16, packed.layout.maps, False, 1, 2, 0.5, 0.0, False, False, False, True, "exact")
        for batch in (B, 2**20):
            x, grad_log_det = torch.ones(1, D).expand(batch, D), torch.ones(1).expand(batch)
            needs = [True, True, False, False]
            names = launches.of(lambda x: backward(x, *packed.tensors, x, grad_log_det, *constants, needs), x)  # noqa: B023
            assert names == ["_coupling_stack_backward_kernel", "sum", "fill_"]  # zeros for the scales


_MAPS: dict[str, tuple[dict[str, Any], int]] = {  # what is between the couplings, and the launches at most
    "actnorm": ({"actnorm": True}, 21),
    "lu": ({"mix": "lu"}, 38),
    "free": ({"mix": "free"}, 19),
    "householder": ({"mix": "householder"}, 31),
    "permute": ({"mix": "permute"}, 16),
    "actnorm, lu": ({"actnorm": True, "mix": "lu"}, 97),
    "actnorm, householder": ({"actnorm": True, "mix": "householder"}, 83),
}


@pytest.mark.parametrize("name", _MAPS)
def test_maps_between_the_couplings_take_as_many_launches_at_any_depth(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, at_most = _MAPS[name]
    counts, launches = [], Launches(monkeypatch)
    for depth in (4, 8):
        g, x = _flow(depth, **options), torch.randn(B, D)
        for call in (g, g.inverse, g.forward_and_log_det, g.inverse_and_log_det):
            with lf.backend("triton"), torch.no_grad():
                counts.append(len(launches.of(call, x)))
    assert counts[:4] == counts[4:]
    assert max(counts) <= at_most, counts
