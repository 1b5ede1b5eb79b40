"""The comparison in accelerate: the original runs in plain torch, both run in full precision, by every path."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import linfast as lf
from linfast.accelerate import adapter as adapters
from linfast.accelerate import verify
from linfast.accelerate.swap import Swapped
from linfast.precision import full_precision, resolve_precision
from tests.kernel_stand_in import FAULTS

from . import stand_in
from .zoo import KINDS, make

BACKENDS = torch.backends
SETTINGS = {
    "all": BACKENDS, "cudnn": BACKENDS.cudnn, "matmul": BACKENDS.cuda.matmul, "conv": BACKENDS.cudnn.conv,
    "rnn": BACKENDS.cudnn.rnn, "mkldnn matmul": BACKENDS.mkldnn.matmul, "mkldnn conv": BACKENDS.mkldnn.conv,
    "mkldnn rnn": BACKENDS.mkldnn.rnn,
}  # fmt: skip
FULL = dict.fromkeys(SETTINGS, "ieee")


def _settings() -> dict[str, str]:
    return {name: setting.fp32_precision for name, setting in SETTINGS.items()}


def _matmul() -> str:
    """The setting of torch's older interface, which raises where the newer one contradicts it."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "contradicted"


@pytest.fixture(autouse=True)
def _as_before():
    """All settings follow the widest one; afterwards they are restored in both of torch's interfaces."""
    before, older = _settings(), torch.get_float32_matmul_precision()
    for setting in SETTINGS.values():
        setting.fp32_precision = "none"
    yield
    torch.set_float32_matmul_precision(older)  # which writes to the matmuls' settings
    for name, setting in SETTINGS.items():
        setting.fp32_precision = before[name]
    assert (_settings(), _matmul()) == (before, older)


def _all_tf32():
    for setting in SETTINGS.values():
        setting.fp32_precision = "tf32"


def _older(name: str):
    torch.set_float32_matmul_precision(name)


def _contradicting():
    torch.set_float32_matmul_precision("medium")
    BACKENDS.cuda.matmul.fp32_precision = "ieee"
    BACKENDS.mkldnn.matmul.fp32_precision = "tf32"


WAYS = {
    "as torch starts": lambda: None,
    "all at tf32": _all_tf32,
    "the wide one": lambda: setattr(BACKENDS, "fp32_precision", "tf32"),
    "cuDNN's": lambda: setattr(BACKENDS.cudnn, "fp32_precision", "tf32"),
    "high": lambda: _older("high"),
    "medium": lambda: _older("medium"),
    "contradicting": _contradicting,
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_full_precision_is_for_its_block_only(way: str, fails: bool) -> None:
    WAYS[way]()
    before = _settings(), _matmul()
    try:
        with full_precision(), full_precision():
            assert (_settings(), _matmul()) == (FULL, "highest")
            assert resolve_precision(torch.ones(1)) == "exact"
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert (_settings(), _matmul()) == before


def test_a_setting_that_follows_a_wider_one_still_follows_it() -> None:
    BACKENDS.fp32_precision = "tf32"
    with full_precision():
        pass
    BACKENDS.fp32_precision = "ieee"
    assert _settings() == FULL


ROUTES = {
    "a reference model": (lambda: stand_in.build(1), {}),
    "one rebuilt in the backward": (lambda: stand_in.build(1), {"memory": "invert"}),
    "a sampler": (lambda: stand_in.FlowMatcher(stand_in.build(1)), {}),
    "a library's layers": (lambda: make(KINDS["normflows exp channel"], 0), {}),
    "a library's chain": (lambda: make(KINDS["normflows exp channel"], 0), {"memory": "invert"}),
}


@pytest.mark.parametrize("way", ["all at tf32", "medium"])
@pytest.mark.parametrize("route", ROUTES)
def test_both_sides_are_compared_in_full_precision(route: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for the whole layer in one launch, where kernels run (in the interpreter)."""
    build, options = ROUTES[route]
    model, seen, run = build(), [], verify._run
    where = "triton" if route == "a library's layers" else "auto"

    def recording(instance, *arguments):
        seen.append((isinstance(instance, Swapped), _settings(), _matmul()))
        return run(instance, *arguments)

    monkeypatch.setattr(verify, "_run", recording)
    WAYS[way]()
    before = _settings(), _matmul()
    with lf.backend(where):
        report = lf.accelerate(model, **options)
    assert report.rows
    assert not report.left
    assert {swapped for swapped, _, _ in seen} == {False, True}
    assert where == "auto" or len(seen) == 4 * 2  # the chain; a coupling in float64, in float32, and whole
    assert all((settings, matmul) == (FULL, "highest") for _, settings, matmul in seen)
    assert (_settings(), _matmul()) == before


def test_settings_come_back_where_the_original_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(KINDS["normflows exp channel"], 0)

    def fail(*arguments):
        raise MemoryError

    monkeypatch.setattr(verify, "_run", fail)
    _all_tf32()
    with pytest.raises(MemoryError):
        lf.accelerate(model)
    assert set(_settings().values()) == {"tf32"}


class Ours(nn.Module):
    """A user's coupling that already runs on linfast's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.net = 4, nn.Linear(2, 4)

    def forward(self, x, inverse=False):
        return lf.ops.affine_coupling(x, self.net(x[:, 2:]), lf.ScaleMap("tanh", 2.0), inverse=inverse)[0]

    def inverse(self, y):
        return self(y, inverse=True)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_kernel_is_left_alone_where_the_original_runs_it_too(
    kernels, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "ADAPTERS", dict(adapters.ADAPTERS))
    lf.register_adapter(Ours, conditioner="net", scale_map=lf.ScaleMap("tanh", 2.0), features="features")
    assert not lf.accelerate(Ours()).left
    launched = kernels.launches
    assert launched > 0
    kernels.fault = FAULTS[fault]
    (row,) = lf.accelerate(Ours()).left
    assert "differs from the original" in row.note
    assert kernels.launches > launched


def _cancelling(permutations: int) -> nn.Module:
    """FrEIA's blocks with permutations for which the gradient of the reflection's vector cancels."""
    return make(KINDS["FrEIA all in one learned reverse"], 0, permutations)


@pytest.mark.parametrize("permutations", [8, 9, 20, 25])
def test_a_gradient_that_the_original_computes_no_better_is_no_difference(permutations: int) -> None:
    with lf.backend("triton"):
        report = lf.accelerate(_cancelling(permutations))
    assert not report.left, str(report)


def test_what_the_rounding_of_the_original_does_not_explain_is_a_difference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same model and gradients, one output off by five times the tolerance: its own rounding is far smaller."""
    run = verify._run

    def off(instance, adapter, case, *arguments, **options):
        first, *rest = run(instance, adapter, case, *arguments, **options)
        wrong = isinstance(instance, Swapped) and case.dtype == torch.float32
        return [first * (1 + 5 * case.allowed) if wrong else first, *rest]

    monkeypatch.setattr(verify, "_run", off)
    with lf.backend("triton"):
        report = lf.accelerate(_cancelling(25))
    assert not report.swapped
    assert all("differs from the original" in row.note for row in report.left), str(report)


def test_an_original_that_does_not_run_in_float64_explains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    run = verify._run

    def raising(*arguments, exact=False):
        if exact:
            raise adapters.Unfit("it has tensors of its own in float32")
        return run(*arguments)

    monkeypatch.setattr(verify, "_run", raising)
    with lf.backend("triton"):
        report = lf.accelerate(_cancelling(25))
    assert [row.note.partition(" by ")[0] for row in report.left] == [
        "the layer in one launch differs from the original"
    ], str(report)
