"""run_blocks by kernels, as one autograd function and one operation after the other, against float64."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import linfast as lf
from linfast.ops import residual_blocks
from linfast.ops.residual_blocks import Step, run_blocks
from tests.ops.budget import DEVICE, HALF_DTYPES, assert_within_budget
from tests.ops.checks import fixed_cotangents

B, H, BLOCKS = 9, 4, 2
KINDS = {
    "bare": {"bias": False},
    "bias, term": {"term": True},
    "gates, of the batch": {"norm": "of the batch", "gate": B, "term": True},
    "one-row gates, given": {"norm": "given", "gate": 1},
}


def _drawn(
    bias: bool = True,
    gate: int = 0,
    norm: str = "none",
    term: bool = False,
    dtype: torch.dtype = torch.float32,
    blocks: int = BLOCKS,
) -> dict[str, Tensor]:
    """All tensors by name, as leaves that require gradients; the given statistics do not."""
    shapes: dict[str, tuple[int, ...]] = {"r": (B, H)} | ({"h": (B, H)} if term else {})
    for k in range(2 * blocks + 1):
        shapes |= {f"weight {k}": (H, H)} if k < 2 * blocks else {}
        shapes |= {f"bias {k}": (H,)} if bias else {}
        shapes |= {f"gate {k}": (gate, H)} if gate and k and k % 2 == 0 else {}
        if norm != "none" and k < 2 * blocks:
            shapes |= {f"scale {k}": (H,), f"shift {k}": (H,)}
            shapes |= {f"mean {k}": (H,), f"var {k}": (H,)} if norm == "given" else {}
    drawn = {name: torch.randn(shape).to(DEVICE, dtype) for name, shape in shapes.items()}
    return {
        name: t.exp() if name[:3] == "var" else t.requires_grad_(name[:4] != "mean") for name, t in drawn.items()
    }  # fmt: skip


def _run(named: dict[str, Tensor], norm: str = "none", dropout: float = 0.0) -> tuple[Tensor, list[Any]]:
    n = sum(name.startswith("weight") for name in named)
    steps = [
        Step(
            *(named.get(f"{name} {k}") for name in ("bias", "gate", "scale", "shift", "mean", "var")),
            *((True, 1e-3) if norm == "of the batch" and k < n else (False, 1e-3)),
        )
        for k in range(n + 1)
    ]
    return run_blocks(named["r"], named.get("h"), steps, [named[f"weight {k}"] for k in range(n)], "elu", dropout)


def _call(names: Sequence[str], norm: str) -> Any:
    """u, the statistics and all gradients, as a function of the tensors."""

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        u, found = _run(dict(zip(names, tensors, strict=True)), norm)
        wanted = [t for t in tensors if t.requires_grad]
        statistics = [t for t in itertools.chain(*found) if t is not None]
        return (u, *statistics, *torch.autograd.grad(u, wanted, fixed_cotangents(u)))

    return call


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_values_statistics_and_gradients(kind: str, joined: bool) -> None:
    named, norm = _drawn(**KINDS[kind]), KINDS[kind].get("norm", "none")
    blocks = residual_blocks._Blocks
    with mock.patch.object(blocks, "apply", side_effect=blocks.apply) as seen, contextlib.ExitStack() as stack:
        if not joined:
            stack.enter_context(mock.patch.object(residual_blocks, "_can_join", return_value=False))
        assert_within_budget(_call([*named], norm), [*named.values()])
    assert seen.called == joined


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_half_precision(dtype: torch.dtype) -> None:
    named = _drawn(norm="of the batch", gate=B, term=True, dtype=dtype, blocks=1)
    assert_within_budget(_call([*named], "of the batch"), [*named.values()])


@pytest.mark.parametrize("only", [*_drawn(norm="of the batch", gate=1, term=True)])
def test_each_gradient_alone(only: str) -> None:
    named = _drawn(norm="of the batch", gate=1, term=True)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(named, tensors, strict=True))
        u = _run(given, "of the batch")[0]
        return torch.autograd.grad(u, given[only], fixed_cotangents(u))

    assert_within_budget(call, [*named.values()])


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind: str) -> None:
    named, norm = _drawn(**KINDS[kind], blocks=1), KINDS[kind].get("norm", "none")

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        r = tensors[0] * 1.5  # gradients reach what r and h depend on
        u, _ = _run(dict(zip(named, (r, *tensors[1:]), strict=True)), norm)
        wanted = [t for t in tensors if t.requires_grad]
        first = torch.autograd.grad(u.pow(3).sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), wanted)

    assert_within_budget(call, [*named.values()])


def test_third_derivatives() -> None:
    named = _drawn(term=True, blocks=1)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        loss = _run(dict(zip(named, (tensors[0] * 1.5, *tensors[1:]), strict=True)))[0].pow(3).sum()
        for _ in range(2):
            gradients = torch.autograd.grad(loss, tensors, create_graph=True)
            loss = sum((g.square().sum() for g in gradients), torch.zeros_like(loss))
        return torch.autograd.grad(loss, tensors)

    with lf.backend("triton"):
        found = call(*named.values())
    with lf.backend("reference"):
        expected = call(*(t.detach().double().requires_grad_() for t in named.values()))
    for got, exact in zip(found, expected, strict=True):
        assert float((got - exact).norm()) <= 1e-4 * float(exact.norm())


def test_what_one_function_cannot_do_runs_one_by_one() -> None:
    """A transform, autocast, no gradients, frozen weights, dropout; and arguments that norm_activate refuses."""
    named = _drawn(norm="of the batch", gate=1, term=True)
    with lf.backend("triton"), mock.patch.object(residual_blocks._Blocks, "apply", side_effect=AssertionError):
        with torch.no_grad():
            _run(named, "of the batch")
        with torch.autocast(DEVICE, torch.bfloat16):
            half = {name: t.bfloat16() if name in ("h", "r") else t for name, t in named.items()}
            assert _run(half, "of the batch")[0].dtype == torch.bfloat16
        _run({**named, "weight 2": named["weight 2"].detach()}, "of the batch")
        _run(named, "of the batch", dropout=0.5)
        torch.func.grad(lambda r: _run({**named, "r": r}, "of the batch")[0].sum())(named["r"])
        for name, shape, message in (
            ("h", (B - 1, H), r"skip must be \[9, 4\]"),
            ("gate 2", (B - 1, H), r"gate must be \[9, 4\] or \[1, 4\]"),
            ("scale 1", (H + 1,), r"weight must be \[4\]"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=message):
                _run({**named, name: torch.ones(shape)}, "of the batch")
        wide = {"weight 0": torch.randn(2 * H, H), "weight 1": torch.randn(H, 2 * H), "bias 1": torch.zeros(2 * H)}
        assert _run(_drawn(bias=False) | {k: t.requires_grad_() for k, t in wide.items() if k != "bias 1"})
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            _run({name: t[:1] if t.shape == (B, H) else t for name, t in named.items()}, "of the batch")


@pytest.mark.parametrize("norm", ["none", "given"])
def test_many_gradients_at_once(norm: str) -> None:
    """``is_grads_batched``, of torch's older transform of operations, which torch.func does not know."""
    named, cotangents = _drawn(norm=norm, term=True), torch.randn(3, B, H, device=DEVICE)
    wanted = [t for t in named.values() if t.requires_grad]
    with lf.backend("triton"):
        u, _ = _run(named, norm)
        found = torch.autograd.grad(u, wanted, cotangents, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(u, wanted, c, retain_graph=True) for c in cotangents]
    for got, *expected in zip(found, *each, strict=True):
        torch.testing.assert_close(got, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_a_write_to_one_weights_gradient_is_none_to_anothers() -> None:
    named, factor = _drawn(), torch.ones((), requires_grad=True, device=DEVICE)
    with lf.backend("triton"):
        first, second = torch.autograd.grad(_run(named)[0].sum(), [named["weight 0"], named["weight 1"]])
    scaled = (factor * first).sum()
    second.mul_(2)
    scaled.backward()
    assert factor.grad == first.sum()


def test_statistics_changed_between_forward_and_backward_raise() -> None:
    named = _drawn(norm="given")
    with lf.backend("triton"):
        u = _run(named)[0]
        named["mean 1"].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            u.sum().backward()


def test_the_network_keeps_no_more_than_its_operations_do() -> None:
    """Bytes of the tensors that are saved for the backward, each storage once."""
    for kind, options in KINDS.items():
        kept: list[dict[int, int]] = []
        named = _drawn(**options)

        for joined in (True, False):
            found: dict[int, int] = {}

            def keep(t: Tensor, found: dict[int, int] = found) -> Tensor:
                found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
                return t

            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
            choice = mock.patch.object(residual_blocks, "_can_join", return_value=joined)
            with choice, lf.backend("triton"), hooks:
                graph = _run(named, options.get("norm", "none"))[0]
            del graph
            kept.append(found)
        assert sum(kept[0].values()) <= sum(kept[1].values()), kind
