"""The cost of accelerate on a CPU, counted in elements that torch's ops write, so that there is no timing noise."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from linfast.bench.cases.libraries import LIBRARIES
from torch.utils._python_dispatch import TorchDispatchMode

import linfast as lf

ROWS, FEATURES, DEPTH, HIDDEN = 256, 64, 4, (128, 128)
MOST = 1.03  # a loop adds the log-scales of couplings feature by feature, to sum them over the features once


class Written(TorchDispatchMode):
    """Elements of the results that are not views."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and not any(name in function.__name__ for name in ("detach", "empty")):
            results = result if isinstance(result, (tuple, list)) else (result,)
            self.elements += sum(r.numel() for r in results if isinstance(r, torch.Tensor))
        return result


def written(run, model, x, train):
    with Written() as mode, torch.set_grad_enabled(train):
        outputs = run(model, x)
        if train:
            sum(o.square().mean() for o in outputs).backward()
    model.zero_grad()
    return mode.elements


@pytest.mark.parametrize("direction", ["forward", "inverse", "training"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_no_more_is_written_than_by_the_original(name, direction):
    try:
        model, forward, inverse = LIBRARIES[name](FEATURES, DEPTH, HIDDEN)
    except ImportError as error:
        pytest.skip(f"{name}: {error}")
    fast, x = copy.deepcopy(model), torch.randn(ROWS, FEATURES)
    assert not lf.accelerate(fast).left
    run, train = inverse if direction == "inverse" else forward, direction == "training"
    before, after = (written(run, each, x, train) for each in (model, fast))
    assert after <= MOST * before, f"{after / before:.3f}"


def test_the_check_imports_no_algebra_system():
    """torch imports sympy, which takes a second, where torch.autograd.grad is given gradients of the outputs."""
    code = f"""
import sys
import linfast as lf
from linfast.bench.cases.libraries import LIBRARIES
model = LIBRARIES["normflows MaskedAffineFlow"]({FEATURES}, {DEPTH}, {HIDDEN})[0]
assert lf.accelerate(model).swapped
assert "sympy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
