"""Comparing what would run with the original, on bare copies and random inputs, before anything is swapped."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter, Plan, Unfit
from .identity import PLAN, original_class
from .swap import swap

__all__ = ["difference"]

_SEED = 20260101
# Relative L2 of the outputs and gradients of one layer: some hundred roundings.
_TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def difference(instance: Any, adapter: Adapter, plan: Plan) -> float:
    """Largest relative L2 difference, in float64 and in the instance's own dtype on its own device.

    Neither the instance nor torch's random state is touched: copies without hooks are run, which
    share no buffer with it.

    Raises:
        Unfit: it is larger than allowed, or one of the two raised.
    """
    like = next((t for t in _tensors(instance) if t.is_floating_point()), None)
    device = torch.device("cpu") if like is None else like.device
    if device.type == "meta":
        raise Unfit("it is on the meta device: nothing to compare")
    own = torch.float32 if like is None else like.dtype
    worst = 0.0
    for dtype in dict.fromkeys((torch.float64, own)):
        allowed = max(adapter.tolerance, _TOLERANCES.get(dtype, 0.0))
        error = _difference(instance, adapter, plan, dtype, device)
        if not error <= allowed:
            raise Unfit(f"it differs from the original by {error:.1e} in {str(dtype)[6:]} on a random input")
        worst = error if dtype == own else worst
    return worst


def _difference(instance: Any, adapter: Adapter, plan: Plan, dtype: torch.dtype, device: torch.device) -> float:
    before = _run(bare_copy(instance, dtype), adapter, dtype, device)
    copied = bare_copy(instance, dtype)
    swap(copied, adapter, adapter.plan(copied, plan.options))
    after = _run(copied, adapter, dtype, device)
    if len(before) != len(after):
        raise Unfit(f"it returns {len(after)} tensors, the original {len(before)}")
    return max((_relative(a, b) for a, b in zip(after, before, strict=True)), default=0.0)


def _run(instance: Any, adapter: Adapter, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """The probe's outputs and the gradients of a random sum of them."""
    inputs: list[Tensor] = []
    generator = torch.Generator().manual_seed(_SEED)

    def draw(*shape: int) -> Tensor:
        value = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        inputs.append(value.requires_grad_())
        return value

    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        torch.manual_seed(_SEED)
        try:
            outputs = list(adapter.probe(instance, draw))
            total = sum((o.double() * torch.sin(torch.arange(o.numel(), device=device)).view(o.shape)).sum() for o in outputs)
            parameters = [p for p in _tensors(instance) if p.requires_grad]
            gradients = torch.autograd.grad(total, inputs + parameters, allow_unused=True)
        except Exception as error:
            what = "the original" if PLAN not in vars(instance) else "what would replace it"
            raise Unfit(f"{what} raised {type(error).__name__} on a random input: {str(error)[:80]}") from error
    return [o.detach() for o in outputs] + [torch.zeros(()) if g is None else g for g in gradients]


def _relative(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    error, size = (actual.double() - expected.double()).norm(), expected.double().norm()
    return float(error / size) if size > 0 else float(error)


def _tensors(instance: Any) -> Sequence[Tensor]:
    modules = [instance] if isinstance(instance, nn.Module) else [v for v in vars(instance).values() if isinstance(v, nn.Module)]
    return [t for m in modules for t in itertools.chain(m.parameters(), m.buffers())]


def bare_copy(instance: Any, dtype: torch.dtype) -> Any:
    """A copy of the original class without hooks, of detached tensors of this dtype, that may be changed."""
    copied = object.__new__(original_class(instance))
    vars(copied).update({key: value for key, value in vars(instance).items() if key != PLAN})
    if not isinstance(instance, nn.Module):
        vars(copied).update({k: bare_copy(v, dtype) for k, v in vars(instance).items() if isinstance(v, nn.Module)})
        return copied
    for name, value in vars(nn.Module()).items():
        if "hook" in name:
            vars(copied)[name] = value
    copied._modules = {k: None if m is None else bare_copy(m, dtype) for k, m in instance._modules.items()}
    copied._parameters = {k: None if p is None else nn.Parameter(_cast(p, dtype), p.requires_grad) for k, p in instance._parameters.items()}
    copied._buffers = {k: None if b is None else _cast(b, dtype).clone() for k, b in instance._buffers.items()}
    return copied


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
