"""The reference Linearizer repository (github.com/assafshocher/Linearizer): layers of g, and the linear networks.

    ActNorm   (x + bias) e^log_scale
    1x1       y = W x over channels
    LoRA      x -> x A1(t) A2(t)^T a sample, never through an N x N matrix here, in x's dtype also under autocast
    kernel    a depthwise kernel a sample, generated from t

People copy these classes into their own repositories, so they are recognised by name and
attributes wherever they are defined, and then by their values, as all are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..freeze import derived
from ..linalg import inverse_or_nan
from ..ops.channel_mix import channel_mix
from ..ops.depthwise_conv import depthwise_conv
from ..ops.low_rank import low_rank
from .adapter import Adapter, Draw, Options, Plan

__all__ = ["ADAPTERS", "LIBRARY", "constant_plan", "has", "reference_adapter", "shrink_lora"]

LIBRARY = "reference"


def has(*names: str) -> Callable[[Any], bool]:
    """Whether an instance has all these attributes; one that raises is there: it raises again where it is read."""

    def is_there(instance: Any, name: str) -> bool:
        try:
            return hasattr(instance, name)
        except Exception:
            return True

    return lambda instance: all(is_there(instance, name) for name in names)


# ActNorm


def _plan_actnorm(norm: Any, options: Options) -> Plan:
    loaded = norm.initialized is False and _holds_values(norm)
    if "actnorm_reinit" in options.keep_defects:
        note = "kept: it throws loaded values away at its first batch"
    else:
        note = "fixed: it had loaded values and would have thrown them away at its first batch" if loaded else ""
    return Plan("one multiply-add", note)


def _is_initialised(norm: Any) -> bool:
    """Its own flag; values that were loaded, and which a plain bool does not know of, are not initialised over."""
    if norm.initialized is False and "actnorm_reinit" not in norm._linfast_plan.options.keep_defects:
        norm.initialized = _holds_values(norm)
    return bool(norm.initialized)


def _holds_values(norm: Any) -> bool:
    return bool((norm.bias != 0).any() or (norm.log_scale != 0).any())


def _actnorm(norm: Any, x: Tensor) -> Tensor:
    if not _is_initialised(norm):
        norm._init(x)
    scale = norm.log_scale.exp()
    return torch.addcmul(norm.bias * scale, x, scale)


def _actnorm_inverse(norm: Any, y: Tensor) -> Tensor:
    if not _is_initialised(norm):
        return y
    return torch.addcmul(-norm.bias, y, (-norm.log_scale).exp())


def _probe_actnorm(norm: Any, draw: Draw) -> Sequence[Tensor]:
    shape = (3, norm.bias.shape[1], 2, 3)
    if norm.initialized is False:
        norm.initialized = _holds_values(norm)  # the defect is not compared
    return [norm.forward(draw(*shape)), norm.inverse(draw(*shape))]


# Invertible 1x1


def _mix_inverse(mix: Any, y: Tensor) -> Tensor:
    return channel_mix(y, derived(mix, "inverse", lambda: inverse_or_nan(mix.W).to(mix.W.dtype)))


def _probe_mix(mix: Any, draw: Draw) -> Sequence[Tensor]:
    shape = (3, len(mix.W), 2, 3)
    return [mix.forward(draw(*shape)), mix.inverse(draw(*shape))]


# Linear networks


def _lora(layer: Any, x: Tensor, **kwargs: Any) -> Tensor:
    shape = (x.shape[0], layer.out_features, layer.lora_features)
    A1, A2 = (net(kwargs["t"]).reshape(shape) for net in (layer.lin1, layer.lin2))
    return low_rank(x.flatten(1), A2, A1).reshape(x.shape)


class _OfTime(nn.Module):
    """tanh(w t + b), [B, n] of t [B]."""

    def __init__(self, n: int, draw: Draw) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(draw(n).detach()) for _ in range(2))

    def forward(self, t: Tensor) -> Tensor:
        return torch.tanh(t.to(self.weight)[:, None] * self.weight + self.bias)


def shrink_lora(layer: Any, draw: Draw, n: int) -> None:
    """Make this copy of a layer act on n numbers, with stubs: at N = 12288 the original needs gigabytes."""
    layer.out_features, layer.lora_features = n, 2
    layer._modules.update(lin1=_OfTime(2 * n, draw), lin2=_OfTime(2 * n, draw))


def _probe_lora(layer: Any, draw: Draw) -> Sequence[Tensor]:
    shrink_lora(layer, draw, 6)
    return [layer.forward(draw(3, 2, 1, 3), t=draw(3)), layer.get_lin_t(draw(2))]


def _probe_kernel(layer: Any, draw: Draw) -> Sequence[Tensor]:
    layer._modules["lin1"] = _OfTime(3 * layer.k**2, draw)
    return [layer.forward(draw(2, 3, 6, 7), t=draw(2))]


def reference_adapter(name: str, recognises: Callable[[Any], bool], **what: Any) -> Adapter:
    return Adapter(library=LIBRARY, where=None, name=name, recognises=recognises, **what)


def constant_plan(runs: str) -> Callable[[Any, Options], Plan]:
    return lambda instance, options: Plan(runs)


ADAPTERS = (
    reference_adapter(
        "ActNorm2d",
        has("bias", "log_scale", "initialized", "_init"),
        methods={"forward": _actnorm, "inverse": _actnorm_inverse},
        plan=_plan_actnorm,
        probe=_probe_actnorm,
    ),
    reference_adapter(
        "Inv1x1Conv",
        has("W"),
        methods={"forward": lambda mix, x: channel_mix(x, mix.W), "inverse": _mix_inverse},
        plan=constant_plan("channel mix"),
        probe=_probe_mix,
    ),
    reference_adapter(
        "TimeDependentLoRALinearLayer",
        has("lin1", "lin2", "out_features", "lora_features", "get_lin_t"),
        methods={"forward": _lora},
        plan=constant_plan("low-rank product"),
        probe=_probe_lora,
        hollow=lambda layer: (layer.lin1, layer.lin2),
        assumes=("get_lin_t",),
    ),
    reference_adapter(
        "LinearKernel",
        has("lin1", "k", "get_matrix"),
        methods={"forward": lambda layer, x, **kwargs: depthwise_conv(x, layer.get_matrix(kwargs["t"]))},
        plan=constant_plan("depthwise convolution"),
        probe=_probe_kernel,
        hollow=lambda layer: (layer.lin1,),
        assumes=("get_matrix",),
    ),
)
