"""The launches and host reads of a training step of dingo's neural spline flow, before accelerate and after.

Per coupling a random permutation, an LU map and a spline coupling by a residual network of 5 blocks with ELU, batch
norm and a context (bench/cases/programs.py). Counts do not depend on the width, and grow linearly with the depth.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from linfast.bench.cases.programs import _dingo
from torch import Tensor, nn
from triton.runtime.interpreter import GridExecutor

import linfast as lf
from tests.host_reads import HostRead, forbidden
from tests.launch_counts import Launches
from tests.ops.budget import COMPILED

from .zoo import redraw, require

D, CONTEXT, BATCH, DEPTHS = 15, 129, 8, (2, 4)

pytestmark = pytest.mark.skipif(COMPILED, reason="counts what the interpreter launches")


def _model(depth: int) -> nn.Module:
    require("nflows")
    torch.manual_seed(0)
    model = _dingo(D, depth, 8)[0]
    redraw(model, model.state_dict(), 0)
    return model.train()


def _step(model: nn.Module) -> Callable[[Tensor], None]:
    context = torch.randn(BATCH, CONTEXT)

    def step(x: Tensor) -> None:
        model.zero_grad(set_to_none=True)
        z, log_det = model(x, context)
        (z.square().sum(1) / 2 - log_det).mean().backward()

    return step


@contextlib.contextmanager
def _masks_on_a_device():
    """Masks are not compared with the host's copies, as on a GPU."""
    with contextlib.ExitStack() as stack:
        for place in ("flows.remembered", "accelerate.adapter"):
            stack.enter_context(mock.patch(f"linfast.{place}.read_at_once", return_value=False))
        yield


def _counts(model: nn.Module, launches: Launches) -> Counter[str]:
    with lf.backend("triton"), _masks_on_a_device():
        return Counter(launches.of(_step(model), torch.randn(BATCH, D)))


def _of_depth(depth: int, counts: dict[int, int]) -> int:
    each = (counts[DEPTHS[1]] - counts[DEPTHS[0]]) // (DEPTHS[1] - DEPTHS[0])
    return counts[DEPTHS[0]] + each * (depth - DEPTHS[0])


def test_a_training_step_of_30_couplings_takes_at_most_so_many_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    launches, before, after, products = Launches(monkeypatch), {}, {}, {}
    for depth in DEPTHS:
        model = _model(depth)
        before[depth] = _counts(model, launches).total()
        report = lf.accelerate(model)
        assert len(report.swapped) == depth + 1, str(report)
        found = _counts(model, launches)
        after[depth], products[depth] = found.total(), found["mm"] + found["addmm"] + found["bmm"]
        each = {name: found[name] / depth for name in found if name.startswith("_")}
        assert each["_norm_activate_kernel"] == each["_norm_activate_backward_kernel"] == 11, found
        assert each["_rq_spline_kernel"] == each["_rq_spline_backward_kernel"] == 1, found
    # 13 products of a coupling forward and 17 backward; seven for the whole flow.
    assert _of_depth(30, products) <= 30 * 30 + 7
    assert _of_depth(30, after) <= 1851
    assert _of_depth(30, before) >= 7.7 * _of_depth(30, after)


def test_a_training_step_reads_nothing_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own step reads; the first accelerated call may read, which recognises the members."""
    model, x = _model(2), torch.randn(BATCH, D)
    with forbidden(), pytest.raises(HostRead):
        _step(model)(x)
    lf.accelerate(model)
    monkeypatch.setattr(GridExecutor, "__call__", lambda *_, **__: None)
    with lf.backend("triton"):
        _step(model)(x)
        with forbidden():
            _step(model)(x)
