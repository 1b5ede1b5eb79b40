"""On a CPU a short batch runs a chain's couplings in one loop, or the library's own code to the last bit."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from linfast.bench.cases.libraries import LIBRARIES
from torch.utils._python_dispatch import TorchDispatchMode

import linfast as lf

COUPLINGS = 4
MOST_CALLS = 5  # per replaced method of a coupling, beside those of the library
DECIDES = 18  # of zuko's, whose transform is ours
SPLINES = [name for name in LIBRARIES if "Quadratic" in name or "NSF" in name]
AFFINE = [name for name in LIBRARIES if name not in SPLINES]
TOGETHER = [name for name in AFFINE if not name.startswith(("glasflow", "memcnn"))]  # whose chain is one loop
WHOLE = [name for name in SPLINES if name.startswith(("nflows", "glasflow"))]  # likewise
MASKS = 14  # operations of a coupling with masks: comparing its masks, and slicing the weights of two nets


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def _models(name):
    try:
        model, forward, inverse = LIBRARIES[name](64, COUPLINGS, (128, 128))
    except ImportError as error:
        pytest.skip(f"{name}: {error}")
    fast = copy.deepcopy(model)
    report = lf.accelerate(fast)
    assert report.swapped, str(report)
    return model, fast, (forward, inverse)


def _python_calls(work):
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_chain_of_mlp_couplings_is_one_loop(name):
    _, fast, _ = _models(name)
    rows = [row for row in lf.accelerate(fast).rows if "couplings in one loop" in row.runs]
    assert bool(rows) == (name in TOGETHER + WHOLE)


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_short_batch_runs_the_originals_own_operations(name):
    model, fast, directions = _models(name)
    x = torch.randn(16, 64)
    for i, run in enumerate(directions):
        calls, operations, values = [], [], []
        for each in (model, fast):
            run(each, x)
            calls.append(_python_calls(lambda each=each, run=run: run(each, x)))
            with _Operations() as mode:
                values.append(run(each, x))
            operations.append(mode.names)
        if name in TOGETHER + WHOLE:
            assert name in WHOLE or calls[1] < calls[0], calls
            assert len(operations[1]) < len(operations[0]) + MASKS * COUPLINGS
            for actual, expected in zip(values[1], values[0], strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
            continue
        most = DECIDES if "zuko" in name else MOST_CALLS * (3 if "AllInOne" in name else 1)
        assert calls[1] <= calls[0] + most * COUPLINGS, calls
        if i and "zuko" in name:
            assert len(operations[1]) < len(operations[0])  # whose inverse runs its conditioner twice
            continue
        assert operations[1] == operations[0]
        for actual, expected in zip(values[1], values[0], strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", AFFINE)
def test_a_long_batch_is_cut_where_the_report_says_so(name):
    model, fast, (run, _) = _models(name)
    x = torch.randn(4 * 2048 * torch.get_num_threads(), 64)
    with torch.no_grad():
        outputs, products = [], []
        for each in (model, fast):
            with _Operations() as mode:
                outputs.append(run(each, x))
            products.append(mode.names.count("aten::addmm"))
        for actual, expected in zip(outputs[1], outputs[0], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    report = str(lf.accelerate(fast))
    cuts = name in TOGETHER or "as many at a time as fit its cache" in report
    assert products[1] == products[0] * (4 if cuts else 1)


@pytest.mark.parametrize("name", [name for name in SPLINES if name not in WHOLE])
def test_a_spline_coupling_runs_the_op_from_the_rows_of_the_report_on(name):
    _, fast, (run, _) = _models(name)
    assert "from 64 rows per thread on, from 192 with gradients" in lf.accelerate(fast).rows[0].runs
    threads = torch.get_num_threads()
    for gradients, least in ((False, 64), (True, 192)):
        for rows, runs in ((least * threads - 1, False), (least * threads, True)):
            with torch.set_grad_enabled(gradients), _Operations() as mode:
                run(fast, torch.randn(rows, 64))
            assert any(name.startswith("linfast::rq_spline") for name in mode.names) == runs


def test_the_report_says_what_runs_on_this_cpu():
    _, fast, _ = _models("normflows AffineCouplingBlock exp")
    rows = 4096 * torch.get_num_threads()
    runs = lf.accelerate(fast).rows[1].runs
    assert (
        f"on this CPU: the original's own code, and from {rows} rows on as many at a time as fit its cache" in runs
    )


@pytest.mark.parametrize("rows", [16, 1 << 16])
def test_a_mask_written_through_data_is_followed_at_every_length(rows):
    model, fast, (run, _) = _models("normflows MaskedAffineFlow")
    x = torch.randn(rows, 64)
    for each in (model, fast):
        for module in each.modules():
            if "b" in module._buffers:
                module.b.data.copy_(1 - module.b)
    with torch.no_grad():
        for actual, expected in zip(run(fast, x), run(model, x), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
