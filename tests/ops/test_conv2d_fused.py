"""conv2d_fused as an op: its formula, registration, compilation, transforms, second derivatives, bad input."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

import linfast as lf
from linfast.ops import conv2d_fused
from tests.marks import long
from tests.ops.budget import DEVICE, assert_within_budget
from tests.ops.checks import (
    assert_compiles_whole,
    assert_registered,
    assert_transforms,
    refuse_launches,
    second_derivatives,
    squared_sum,
)

_PART = torch.float16


def _inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, weight, bias, norm_weight, norm_bias, residual."""
    shapes = ((2, 4, 2, 3), (6, 4, 3, 3), (6,), (4,), (4,), (2, 6, 2, 3))
    return [torch.randn(s, device=DEVICE, dtype=dtype) for s in shapes]


def _y(x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, residual: Tensor) -> Tensor:
    """y in "exact", because torch's default for convolutions is tf32."""
    options = {"groups": 2, "norm_weight": norm_weight, "norm_bias": norm_bias, "residual": residual}
    return conv2d_fused(x, weight, bias, **options, alpha=0.7, next_groups=3, precision="exact")[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layout", "present"),
    [(torch.channels_last, True), *long((torch.contiguous_format, True), (torch.channels_last, False))],
)
def test_opcheck(layout: torch.memory_format, present: bool) -> None:
    x, weight, *rest = _inputs()
    x, rest = x.contiguous(memory_format=layout), rest if present else [None] * 4
    constants = (2 if present else 0, 1e-5, True, 0.7, 3 if present else 0, "exact", _PART)
    assert_registered(torch.ops.linfast.conv2d_fused.default, (x, weight, *rest, None, *constants))
    _, mean, rstd, _ = torch.ops.linfast.conv2d_fused(x, weight, *rest, None, *constants)
    grad = torch.randn(2, 6, 2, 3, device=DEVICE)
    saved, calls = (x, weight, *rest[:3], mean, rstd, grad, None, None, None), []
    for needs in ([True] * 6, [False, True] * 3, [True] + [False] * 5, [False, False, False, True, False, False]):
        given = [True, True, *(t is not None for t in rest)]
        wanted = [*(a and b for a, b in zip(needs, given, strict=True)), False]
        calls.append((*saved, *constants, wanted))
    assert_registered(torch.ops.linfast.conv2d_fused_backward.default, *calls)


def test_compiles_whole_and_runs_the_kernels() -> None:
    assert_compiles_whole(squared_sum(_y), [t.requires_grad_() for t in _inputs()], "conv2d_fused")


def test_functional_transforms() -> None:
    loss = squared_sum(_y)

    def transforms(x: Tensor, *others: Tensor) -> list[Tensor]:
        *rest, residual = others

        def one_row(x: Tensor, residual: Tensor) -> Tensor:
            return torch.func.grad(loss)(x[None], *rest, residual[None])[0]

        gradients = torch.func.grad(loss, argnums=tuple(range(6)))(x, *rest, residual)
        return [*gradients, torch.func.vmap(one_row)(x, residual)]

    assert_transforms(transforms, loss, _inputs())


def test_second_derivatives_are_the_references() -> None:
    # Small enough for fp16, in which the interpreter splits operands into parts.
    call = second_derivatives(lambda *tensors: _y(*tensors).pow(3).sum() / 1000)
    assert_within_budget(call, [t.requires_grad_() for t in _inputs()])


def test_float64_the_reference_backend_and_the_cpu_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_launches(monkeypatch)
    with lf.backend("triton"):
        _y(*_inputs(torch.float64))
        with pytest.raises(AssertionError, match="conv2d_fused:launch"):
            _y(*_inputs())
    with lf.backend("reference"):
        _y(*_inputs())
    if DEVICE == "cpu":
        _y(*_inputs())


def test_autocast_gives_its_dtype_and_keeps_a_wider_residuals() -> None:
    x, weight, bias, *_, residual = _inputs()
    dtype = torch.float16 if DEVICE == "cpu" else torch.bfloat16
    with lf.backend("triton"), torch.autocast(DEVICE, dtype):
        y, _ = conv2d_fused(x, weight, bias, groups=2)
        summed, _ = conv2d_fused(x, weight, bias, groups=2, residual=residual)
    assert y.dtype == dtype
    assert summed.dtype == torch.float32
    torch.testing.assert_close(
        summed, conv2d_fused(x, weight, bias, groups=2, residual=residual)[0], rtol=0, atol=2e-2
    )


def test_the_mode_is_that_of_torchs_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    module = importlib.import_module("linfast.ops.conv2d_fused")  # the package's name is the function
    monkeypatch.setattr(module, "runs_fused", lambda *given: bool(modes.append(given[3])))
    monkeypatch.setattr(module, "uses_triton", lambda *_: True)
    x, weight, *_ = _inputs()
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        for setting in ("tf32", "ieee"):
            torch.backends.cudnn.conv.fp32_precision = setting
            conv2d_fused(x, weight)
            conv2d_fused(x, weight, precision="high")
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    assert modes == ["tf32", "high", "exact", "high"]


def _bad(**changes: object):
    given = dict(zip(("x", "weight", "bias", "norm_weight", "norm_bias", "residual"), _inputs(), strict=True))
    given |= {"groups": 2, **changes}
    return conv2d_fused(given.pop("x"), given.pop("weight"), given.pop("bias"), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "kind", "match"),
    [
        ({"x": torch.randn(2, 4, 3)}, ValueError, r"x must be \[B, C_in, H, W\].*\(2, 4, 3\)"),
        ({"weight": torch.randn(6, 5, 3, 3)}, ValueError, r"weight \(6, 5, 3, 3\)"),
        ({"weight": torch.randn(6, 4, 3, 1)}, ValueError, r"k odd; got \(6, 4, 3, 1\)"),
        ({"weight": torch.randn(6, 4, 2, 2)}, ValueError, r"k odd; got \(6, 4, 2, 2\)"),
        ({"weight": torch.randn(6, 4, 3, 3).double()}, TypeError, "torch.float32 and weight torch.float64"),
        ({"bias": torch.randn(1, 6)}, ValueError, r"bias must be \[6\] or \[2, 6\] for weight .*; got \(1, 6\)"),
        ({"norm_weight": torch.randn(5)}, ValueError, r"norm_weight must be \(4,\).*got \(5,\)"),
        ({"groups": 0}, ValueError, r"norm_weight must be .* with groups=0"),
        ({"groups": 3}, ValueError, "groups must be 0 or divide 4 channels; got 3"),
        ({"next_groups": 4}, ValueError, "next_groups must be 0 or divide 6 channels; got 4"),
        ({"statistics": torch.randn(2, 1, 3, 2)}, ValueError, r"statistics must be .*float32 \(2, 1, 3, 2\)"),
        ({"residual": torch.randn(2, 6, 3, 2)}, ValueError, r"residual must be \(2, 6, 2, 3\).*got \(2, 6, 3, 2\)"),
        ({"precision": "half"}, ValueError, "precision must be one of"),
    ],
)  # fmt: skip
def test_bad_input(changes: dict[str, object], kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        _bad(**changes)
