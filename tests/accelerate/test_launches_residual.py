"""The launches of sbi's and nessai's neural spline flows without gradients, before accelerate and after.

The models of bench/cases/programs.py at their sizes there: sbi's has 5 features, 5 couplings, 50 hidden units and a
context, nessai's 8 features, 4 couplings and 32 hidden units. Each residual network is one launch, and one that
packs its weights, which is left out where the model is frozen.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from linfast.bench.cases.programs import _nessai, _sbi
from torch import Tensor

import linfast as lf
from tests.launch_counts import Launches
from tests.laws.zoo import relative
from tests.ops.budget import COMPILED

from .test_launches_spline import _masks_on_a_device as masks_on_a_device
from .zoo import redraw, require

BATCH = 20

# (model, features, couplings, hidden units, rows of the context, launches of the original, after, after and frozen)
# for densities and for samples.
COUNTS = {
    "sbi, a context for each sample": (_sbi, 5, 5, 50, BATCH, (687, 61, 44), (823, 69, 45)),
    "sbi, one context": (_sbi, 5, 5, 50, 1, (687, 49, 32), (823, 57, 33)),
    "nessai": (_nessai, 8, 4, 32, 0, (537, 36, 20), (649, 43, 20)),
}


def _made(name: str) -> tuple[torch.nn.Module, Tensor, dict[str, Callable[[Any, Tensor], Any]]]:
    """(the model, x, its density's and its sampling's direction)."""
    make, features, depth, hidden, rows, *_ = COUNTS[name]
    require("nflows" if make is _sbi else "glasflow")
    torch.manual_seed(0)
    model, context, forward, inverse = make(features, depth, hidden)
    redraw(model, model.state_dict(), 0)
    given = torch.randn(rows, context).expand(BATCH, -1) if context else None

    def both(run: Callable[..., Any]) -> Callable[[Any, Tensor], Any]:
        return lambda m, x: run(m, x, None if given is None else given.to(x))

    return model.eval(), torch.randn(BATCH, features), {"density": both(forward), "samples": both(inverse)}


@pytest.mark.skipif(COMPILED, reason="counts what the interpreter launches")
@pytest.mark.parametrize("name", COUNTS)
def test_a_residual_network_takes_one_launch_in_densities_and_samples(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, runs = _made(name)
    accelerated = copy.deepcopy(model)
    lf.accelerate(accelerated)
    for run, expected in zip(runs.values(), COUNTS[name][5:], strict=True):

        def count(model: torch.nn.Module, run: Any = run) -> Counter[str]:
            with monkeypatch.context() as patch, masks_on_a_device(), lf.backend("triton"), torch.no_grad():
                return Counter(Launches(patch).of(lambda x: run(model, x), x))

        found = count(accelerated)
        with lf.freeze(accelerated):
            frozen = count(accelerated)
        assert found["_residual_stack_kernel"] == frozen["_residual_stack_kernel"] == COUNTS[name][2]
        assert found["mm"] == found["_norm_activate_kernel"] == 0
        assert (count(model).total(), found.total(), frozen.total()) == expected
        with mock.patch("linfast.ops.residual_network.is_one_launch", return_value=False):
            assert count(accelerated).total() >= found.total() + 6 * COUNTS[name][2]


@pytest.mark.parametrize("name", COUNTS)
def test_the_values_are_the_originals(name: str) -> None:
    model, x, runs = _made(name)
    accelerated, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    lf.accelerate(accelerated)
    for run in runs.values():
        with torch.no_grad():
            expected = run(wide, x.double())
            with lf.backend("triton"):
                found = run(accelerated, x)
                with lf.freeze(accelerated):
                    frozen = run(accelerated, x)
        for got, again, exact in zip(found, frozen, expected, strict=True):
            assert relative(got, exact) < 5e-6
            assert torch.equal(got, again)
