"""The reference Linearizer repository (github.com/assafshocher/Linearizer): g, and the linear networks.

    block     ActNorm, then y1 = (x1 + t) e^s with (t, s) = F(x2), y2 likewise of G(y1), then y = W (y1 | y2)
    ActNorm   (x + bias) e^log_scale
    g         mode "gx" runs the blocks at time 1, "gy" at time 0
    LoRA      x -> x A1(t) A2(t)^T a sample, never through an N x N matrix here
    kernel    a depthwise kernel a sample, generated from t

People copy these classes into their own repositories, so they are recognised by name and
attributes wherever they are defined, and then by their values, as all are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.affine_coupling import affine_coupling
from ..ops.channel_mix import channel_mix
from ..ops.depthwise_conv import depthwise_conv
from ..ops.low_rank import low_rank
from ..scale_maps import ScaleMap
from .adapter import Adapter, Draw, Options, Plan, Stub, Unfit
from .identity import changed_method

__all__ = ["ADAPTERS", "LIBRARY", "has", "shrink_lora"]

LIBRARY = "reference"


def has(*names: str) -> Callable[[Any], bool]:
    """Whether an instance has all these attributes."""
    return lambda instance: all(hasattr(instance, name) for name in names)


# ActNorm


def _plan_actnorm(norm: Any, options: Options) -> Plan:
    loaded = not norm.initialized and _holds_values(norm)
    if "actnorm_reinit" in options.keep_defects:
        note = "kept: it throws loaded values away at its first batch"
    else:
        note = "fixed: it had loaded values and would have thrown them away at its first batch" if loaded else ""
    return Plan("one multiply-add", note)


def _settle_actnorm(norm: Any) -> None:
    """Loaded values are not initialised over."""
    if "actnorm_reinit" not in norm._linfast_plan.options.keep_defects and _holds_values(norm):
        norm.initialized = True


def _holds_values(norm: Any) -> bool:
    return bool((norm.bias != 0).any() or (norm.log_scale != 0).any())


def _actnorm(norm: Any, x: Tensor) -> Tensor:
    if not norm.initialized:
        norm._init(x)
    scale = norm.log_scale.exp()
    return torch.addcmul(norm.bias * scale, x, scale)


def _actnorm_inverse(norm: Any, y: Tensor) -> Tensor:
    if not norm.initialized:
        return y
    return torch.addcmul(-norm.bias, y, (-norm.log_scale).exp())


def _probe_actnorm(norm: Any, draw: Draw) -> Sequence[Tensor]:
    shape = (3, norm.bias.shape[1], 2, 3)
    return [norm.forward(draw(*shape)), norm.inverse(draw(*shape))]


# Invertible 1x1


def _probe_mix(mix: Any, draw: Draw) -> Sequence[Tensor]:
    shape = (3, len(mix.W), 2, 3)
    return [mix.forward(draw(*shape)), mix.inverse(draw(*shape))]


# Block


def _plan_block(block: Any, options: Options) -> Plan:
    for coupling in (block.F, block.G):
        name = type(coupling).__name__
        if name != "AffineCoupling" or not has("cond", "clamp")(coupling):
            raise Unfit(f"its couplings are {name}, not the repository's AffineCoupling")
        changed = changed_method(coupling, ("forward", "inverse", "_shift_log_scale"))
        if changed is not None:
            raise Unfit(f"the {changed} of its AffineCoupling was replaced")
    return Plan("two affine couplings, clamp")


def _block(block: Any, X: Tensor, t: Any) -> Tensor:
    x = X if block.actnorm is None else block.actnorm(X)
    x = _couple(block.F, x, t, "first", inverse=False)
    return block.mix(_couple(block.G, x, t, "second", inverse=False))


def _block_inverse(block: Any, Y: Tensor, t: Any) -> Tensor:
    y = _couple(block.G, block.mix.inverse(Y), t, "second", inverse=True)
    x = _couple(block.F, y, t, "first", inverse=True)
    return x if block.actnorm is None else block.actnorm.inverse(x)


def _couple(coupling: Any, x: Tensor, t: Any, moves: str, inverse: bool) -> Tensor:
    first, second = x.chunk(2, 1)
    params = coupling.cond(second if moves == "first" else first, t)
    return affine_coupling(x, params, ScaleMap("clamp", coupling.clamp), moves=moves, inverse=inverse)[0]


def _probe_block(block: Any, draw: Draw) -> Sequence[Tensor]:
    half = len(block.mix.W) // 2
    for coupling in (block.F, block.G):
        coupling._modules["cond"] = Stub(half, 2 * half, draw)
    shape = (3, 2 * half, 2, 3)
    return [block.forward(draw(*shape), draw(3)), block.inverse(draw(*shape), draw(3))]


# g


_TIMES = {"gx": 1.0, "gy": 0.0}


def _g(g: Any, x: Tensor, **kwargs: Any) -> Tensor:
    return g.g(x, _time(x, kwargs["mode"]))


def _g_inverse(g: Any, x: Tensor, **kwargs: Any) -> Tensor:
    return g.g.inverse(x, _time(x, kwargs["mode"]))


def _time(x: Tensor, mode: str) -> Tensor:
    """[B], one number expanded: conditioners that see this embed it once."""
    if mode not in _TIMES:
        raise NotImplementedError(f"No such mode exists: {mode}")
    return torch.full((1,), _TIMES[mode], device=x.device).expand(x.shape[0])


class _Invertible(Stub):
    def inverse(self, x: Tensor, t: Tensor) -> Tensor:
        return self(x, t) + t.mean()


def _probe_g(g: Any, draw: Draw) -> Sequence[Tensor]:
    g._modules["g"] = _Invertible(2, 2, draw)
    return [run(draw(3, 2, 2, 3), mode=mode) for run in (g.forward, g.inverse) for mode in _TIMES]


# Linear networks


def _lora(layer: Any, x: Tensor, **kwargs: Any) -> Tensor:
    shape = (x.shape[0], layer.out_features, layer.lora_features)
    A1, A2 = (net(kwargs["t"]).reshape(shape) for net in (layer.lin1, layer.lin2))
    return low_rank(x.reshape(x.shape[0], -1), A2, A1).reshape(x.shape)


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


def _adapter(name: str, recognises: Callable[[Any], bool], **what: Any) -> Adapter:
    return Adapter(library=LIBRARY, where=None, name=name, recognises=recognises, **what)


def _constant(runs: str) -> Callable[[Any, Options], Plan]:
    return lambda instance, options: Plan(runs)


ADAPTERS = (
    _adapter(
        "ActNorm2d",
        has("bias", "log_scale", "initialized", "_init"),
        methods={"forward": _actnorm, "inverse": _actnorm_inverse},
        plan=_plan_actnorm,
        probe=_probe_actnorm,
        settle=_settle_actnorm,
    ),
    _adapter(
        "Inv1x1Conv",
        has("W"),
        methods={
            "forward": lambda mix, x: channel_mix(x, mix.W),
            "inverse": lambda mix, y: channel_mix(y, torch.linalg.inv(mix.W)),
        },
        plan=_constant("channel mix"),
        probe=_probe_mix,
    ),
    _adapter(
        "InvUnetBlock",
        has("F", "G", "mix", "actnorm"),
        methods={"forward": _block, "inverse": _block_inverse},
        plan=_plan_block,
        probe=_probe_block,
        inner=lambda block: (block.F, block.G),
        conditioners=lambda block: (block.F.cond, block.G.cond),
    ),
    _adapter(
        "InverseUnet",
        has("g", "dim"),
        methods={"forward": _g, "inverse": _g_inverse},
        plan=_constant("one time for the batch"),
        probe=_probe_g,
        hollow=lambda g: (g.g,),
    ),
    _adapter(
        "TimeDependentLoRALinearLayer",
        has("lin1", "lin2", "out_features", "lora_features", "get_lin_t"),
        methods={"forward": _lora},
        plan=_constant("low-rank product"),
        probe=_probe_lora,
        hollow=lambda layer: (layer.lin1, layer.lin2),
    ),
    _adapter(
        "LinearKernel",
        has("lin1", "k", "get_matrix"),
        methods={"forward": lambda layer, x, **kwargs: depthwise_conv(x, layer.get_matrix(kwargs["t"]))},
        plan=_constant("depthwise convolution"),
        probe=_probe_kernel,
        hollow=lambda layer: (layer.lin1,),
        assumes=("get_matrix",),
    ),
)
