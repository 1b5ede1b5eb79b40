"""Properties of every op, with all optional inputs and outputs and with none of them.

Training and inference under torch.compile(fullgraph=True), torch.export, and no autocast inside an op.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any
from unittest import mock

import pytest
import torch
from linfast.bench.rounding import allowed_errors
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import linfast as lf
from linfast import ops
from linfast.ops.register import RAW_OPS, RawOp
from tests.marks import long
from tests.ops.budget import DEVICE, Outputs, assert_within
from tests.ops.op_cases import CASES, drawn, gradients_of, with_gradients

_INDUCTOR = ("coupling_stack, no log_det", "conv2d_fused")  # those of the short run: a C++ compiler takes seconds


@pytest.mark.parametrize("name", [name for name in CASES if name not in _INDUCTOR])
def test_compiled_it_trains_and_serves(name: str) -> None:
    """Those that Inductor does not compile in the same run; it does all that "aot_eager" does, and more."""
    _assert_compiles(name, "aot_eager")


# Of each other op the case with everything optional. An output that is None is in the short run.
_OTHER_OPS = sorted({case.op for case in CASES.values()} - {CASES[name].op for name in _INDUCTOR})


@pytest.mark.parametrize("name", [*_INDUCTOR, *long(*_OTHER_OPS)])
def test_inductor_compiles_it(name: str) -> None:
    _assert_compiles(name, "inductor")


def _assert_compiles(name: str, backend: str) -> None:
    """Compiled without graph breaks, outputs and gradients of the kernels are within the budget."""
    call, inputs = CASES[name].call, drawn(name)
    with lf.backend("reference"):
        wide = [t.detach().double().requires_grad_() for t in inputs]
        truth = with_gradients(call)(*wide)
        allowed = allowed_errors(lambda: with_gradients(call)(*inputs), truth)
    torch.compiler.reset()
    with lf.backend("triton"):
        compiled = torch.compile(call, fullgraph=True, backend=backend)
        got = with_gradients(compiled)(*inputs)
        with torch.no_grad():
            served = compiled(*inputs)
    assert_within(got, truth, allowed, "the compiled op")
    assert_within(served, truth[: len(served)], allowed[: len(served)], "the compiled op without gradients")


def test_a_gradient_of_log_det_alone() -> None:
    """torch.compile then passes a zero gradient for y."""
    call, inputs = CASES["coupling_stack"].call, drawn("coupling_stack")
    torch.compiler.reset()
    with lf.backend("triton"):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        got, expected = (gradients_of(run(*inputs)[1:], inputs) for run in (compiled, call))
    torch.testing.assert_close(got, expected)


_WITHOUT_GRADIENT = ("residual_stack",)  # nor compiled; tests/ops/test_residual_stack_kernel.py


def test_no_op_and_nothing_optional_is_forgotten() -> None:
    """Every exported op has a case; every optional tensor of a raw op, and log_det, is given and omitted."""
    exported = {name for name in ops.__all__ if isinstance(getattr(ops, name), FunctionType)}
    assert {case.op for case in CASES.values()} == exported
    seen: dict[tuple[str, str], set[bool]] = {}
    for name in CASES:
        for op, arguments in _raw_calls(name):
            for argument, value in zip(op._schema.arguments, arguments, strict=True):
                given = value if isinstance(value, bool) else value is not None
                seen.setdefault((op.name(), argument.name), set()).add(given)
    raw = [getattr(torch.ops.linfast, name).default for name in RAW_OPS if name not in _WITHOUT_GRADIENT]
    assert {name for name, _ in seen} == {op.name() for op in raw}
    for op in raw:
        for argument in op._schema.arguments if not op.name().endswith("_backward") else ():
            if str(argument.type) == "Optional[Tensor]" or argument.name == "log_det":
                assert seen[op.name(), argument.name] == {True, False}, f"{op.name()}: {argument.name}"


@pytest.mark.parametrize("name", CASES)
def test_no_part_of_an_op_is_in_autocast(name: str) -> None:
    """Inside autocast raw ops, forward, backward and differentiated backward, give the same bits.

    Of the last only the gradient of x is compared, since the backward of packing in plain torch is torch's own.
    """
    for op, arguments in _raw_calls(name):
        expected = op(*arguments)
        with torch.autocast(DEVICE, torch.bfloat16):
            _assert_same_bits(op(*arguments), expected)
    x, *rest = drawn(name)
    with lf.backend("triton"):
        outputs = CASES[name].call(x, *rest)
        for again in (False, True):
            expected = gradients_of(outputs, [x], again)
            with torch.autocast(DEVICE, torch.bfloat16):
                _assert_same_bits(gradients_of(outputs, [x], again), expected)


def test_a_raw_op_runs_alone_only_where_nothing_is_differentiated() -> None:
    """Without gradients there is no autograd function; a tangent raises and is not dropped, under no_grad too."""
    x, params = torch.randn(2, 4, device=DEVICE), torch.randn(2, 4, device=DEVICE)
    with lf.backend("triton"), mock.patch.object(torch.autograd.Function, "apply") as applied:
        ops.affine_coupling(x, params, lf.ScaleMap())
        with torch.no_grad():
            ops.affine_coupling(x.clone().requires_grad_(), params, lf.ScaleMap())
        assert not applied.called
    with lf.backend("triton"), torch.no_grad(), forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        ops.affine_coupling(forward_ad.make_dual(x, x), params, lf.ScaleMap())

    def derivative(x: torch.Tensor) -> torch.Tensor:
        return torch.func.jvp(lambda x: ops.affine_coupling(x, params, lf.ScaleMap())[0], (x,), (x,))[1]

    torch.compiler.reset()  # a compiled graph would return zeros
    with lf.backend("triton"), pytest.raises(Exception, match="no forward-mode derivative|implement the jvp"):
        torch.compile(derivative, backend="eager")(x)


def test_an_op_runs_on_its_first_tensors_gpu() -> None:
    """A stand-in for a second GPU: the launcher is called inside torch.cuda.device of the tensor's."""
    x, events = torch.randn(2, 3), mock.MagicMock()
    with (
        mock.patch.object(torch.cuda, "device", events.device),
        mock.patch.object(RawOp, "_run", events.run),
    ):
        RAW_OPS["low_rank"]._run_on_gpu(x)
    names = [name for name, _, _ in events.mock_calls]
    assert names == ["device", "device().__enter__", "run", "device().__exit__"]
    assert events.device.call_args.args == (x.device,)


class _Calls(TorchDispatchMode):
    """Keeps every call of a raw op."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "linfast":
            self.made.append((func, tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)))
        return func(*args, **(kwargs or {}))


@functools.cache
def _raw_calls(name: str) -> list[tuple[Any, tuple[Any, ...]]]:
    """The raw ops that a case calls, forward and backward, and their arguments."""
    with lf.backend("triton"), _Calls() as calls:
        with_gradients(CASES[name].call)(*drawn(name))
    if CASES[name].op == "rq_spline":  # it has an op of its own there
        with lf.backend("auto"), _Calls() as without:
            with_gradients(CASES[name].call)(*(t.detach().cpu().requires_grad_() for t in drawn(name)))
        calls.made += without.made
    return calls.made


def _assert_same_bits(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=0.0, atol=0.0)


class _Op(nn.Module):
    def __init__(self, call: Callable[..., Outputs]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *tensors: Tensor) -> Outputs:
        return self.call(*tensors)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_it_exports(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "reference":  # as in a process without the interpreter: a bank is one op there too
        for module in ("latent_matmul", "register"):
            monkeypatch.setattr(sys.modules[f"linfast.ops.{module}"], "interpreting", lambda: False)
    call, inputs = CASES[name].call, tuple(t.detach() for t in drawn(name))
    with lf.backend(backend), torch.no_grad():
        program = torch.export.export(_Op(call), inputs)
        for got, expected in zip(program.module()(*inputs), call(*inputs), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    raw = {"mlp_coupling": "coupling_stack"}.get(CASES[name].op, CASES[name].op)
    called = any(str(node.target).startswith(f"linfast.{raw}.") for node in program.graph.nodes)
    in_plain_torch = raw == "latent_matmul" or name.startswith("masked_autoregressive, ")  # an inverse is one op
    assert called == (backend == "triton" or in_plain_torch)
