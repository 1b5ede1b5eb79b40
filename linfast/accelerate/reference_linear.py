"""The research repository's linear networks, and its FlowMatcher, which samples through them.

    LoRA           x -> x A1(t) A2(t)^T per sample, never through an N x N matrix, in x's dtype also under autocast
    LinearKernel   a depthwise kernel per sample, generated from t
    FlowMatcher    get_sampling_terms(device, T, sampling_method) -> B [N, N], z B the latents after T - 1 steps
                   of size 1 / T;  sample_one_step(...) -> g_x^{-1}(g_y(x) B)

The original FlowMatcher multiplies N x N matrices, one or three per step, and for "rk" does not compose the stages
(k3 = k2, and each k is evaluated at the step's start), so that its one step differs from its many steps. Here
``linfast.collapse`` composes all steps into one operator, exactly. It stays factored unless the matrix B is
requested. A class of this name whose "rk" is another scheme is left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..operators.base import LatentOperator
from ..operators.time import TimeLowRank
from ..ops.depthwise_conv import depthwise_conv
from ..ops.low_rank import low_rank
from ..sampling.collapsed import collapse
from ..sampling.sampler import at_work
from .adapter import Draw, Options, Plan, Unfit
from .identity import PLAN, changed_method, has
from .reference_unet import constant_plan, reference_adapter

# The linear networks


_LORA = ("lin1", "lin2", "out_features", "lora_features", "get_lin_t")


def _lora(layer: Any, x: Tensor, **kwargs: Any) -> Tensor:
    shape = (x.shape[0], layer.out_features, layer.lora_features)
    A1, A2 = (net(kwargs["t"]).reshape(shape) for net in (layer.lin1, layer.lin2))
    return low_rank(x.flatten(1), A2, A1).reshape(x.shape)


class _OfTime(nn.Module):
    """A stub for a network of time: tanh(w t + b), [B, n] of t [B]."""

    def __init__(self, n: int, draw: Draw) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(draw(n).detach()) for _ in range(2))

    def forward(self, t: Tensor) -> Tensor:
        return torch.tanh(t.to(self.weight)[:, None] * self.weight + self.bias)


def _shrink_lora(layer: Any, draw: Draw, n: int) -> None:
    """Shrink a copy of a layer to n features, with stubs: at N = 12288 the original needs gigabytes."""
    layer.out_features, layer.lora_features = n, 2
    layer._modules.update(lin1=_OfTime(2 * n, draw), lin2=_OfTime(2 * n, draw))


def _probe_lora(layer: Any, draw: Draw) -> Sequence[Tensor]:
    _shrink_lora(layer, draw, 6)
    return [layer.forward(draw(3, 2, 1, 3), t=draw(3)), layer.get_lin_t(draw(2))]


def _probe_kernel(layer: Any, draw: Draw) -> Sequence[Tensor]:
    layer._modules["lin1"] = _OfTime(3 * layer.k**2, draw)
    return [layer.forward(draw(2, 3, 6, 7), t=draw(2))]


# FlowMatcher


_METHODS = {"euler": "euler", "rk": "rk4"}


class _LayerView(TimeLowRank):
    """The LoRA layer as an operator on columns, A_t z = A2(t) (A1(t)^T z), which shares the layer's networks."""

    def __init__(self, layer: Any) -> None:
        LatentOperator.__init__(self)
        self.n = self.n_out = self.n_in = layer.out_features
        self.rank_bound, self.alpha = layer.lora_features, 0.0
        self.embedding = nn.Identity()  # type: ignore[assignment]
        self.u_net, self.v_net = layer.lin2, layer.lin1


def _plan_matcher(matcher: Any, options: Options) -> Plan:
    layer = getattr(matcher.linearizer, "linear_network", None)
    if not has(layer, _LORA):
        raise Unfit(f"its linear network is a {type(layer).__name__}, not the repository's LoRA layer")
    if changed_method(layer, ("get_lin_t",)) is not None:
        raise Unfit("the get_lin_t of its linear network was replaced")
    if "rk_collapse" in options.keep_defects:
        return Plan("factored collapse for euler", "kept: the one step of rk is not its many steps")
    return Plan("factored collapse", "fixed: the one step of rk is its many steps")


def _all_steps(matcher: Any, method: str, T: int) -> LatentOperator | None:
    """All steps as one operator; None where the original is to run."""
    kept = method == "rk" and "rk_collapse" in matcher._linfast_plan.options.keep_defects
    layer = matcher.linearizer.linear_network
    if method not in _METHODS or T < 2 or kept or "get_lin_t" in vars(layer):
        return None
    with torch.no_grad():
        return collapse(_LayerView(layer), steps=T, method=_METHODS[method])


def _terms(matcher: Any, device: Any, T: int = 100, sampling_method: str = "euler") -> Tensor:
    B = _all_steps(matcher, sampling_method, T)
    if B is None:
        return matcher._linfast_original.get_sampling_terms(matcher, device, T, sampling_method)
    with torch.no_grad():
        return B.to_dense().mT.contiguous().to(device)


def _sample(
    matcher: Any, x: Tensor, device: Any, sampling_method: str = "rk", T: int = 100, B: Tensor | None = None
) -> Tensor:
    operator = _all_steps(matcher, sampling_method, T) if B is None else None
    if operator is None:
        return matcher._linfast_original.sample_one_step(matcher, x, device, sampling_method, T, B)
    f = matcher.linearizer
    f.eval()
    with at_work(f):
        return f.gx_inverse(operator(f.gy(x)))


_N, _STEPS, _ROUNDING = 6, 5, 1e-4
"""Of the check: features, steps, and the relative difference between two ways to compute a matrix in float32."""


class _Linearizer(nn.Module):
    """The parts of a linearizer that the sampler uses, on a few features."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.linear_network = layer
        self.net_gy = nn.Module()
        vars(self.net_gy)["dim"] = _N
        self.gx, self.gy, self.gx_inverse = torch.sin, torch.tanh, torch.sinh


def _probe_matcher(matcher: Any, draw: Draw) -> Sequence[Tensor]:
    layer = matcher.linearizer.linear_network
    widths = [name for name, value in vars(matcher).items() if type(value) is int and value == layer.out_features]
    vars(matcher).update(dict.fromkeys(widths, _N))  # forks keep the layer's width under a name of their own
    _shrink_lora(layer, draw, _N)
    matcher.linearizer = _Linearizer(layer)
    x = draw(3, 1, 2, _N // 2)
    if PLAN in vars(matcher) and "rk_collapse" not in matcher._linfast_plan.options.keep_defects:
        _check_rk(copy.copy(matcher), x)
    terms = matcher.get_sampling_terms(x.device, _STEPS, "euler")
    one_step = matcher.sample_one_step(x, x.device, sampling_method="euler", T=_STEPS)
    if matcher.linearizer.training:
        raise Unfit("its one step leaves its model in train mode, the repository's in eval mode")
    return [terms, one_step, matcher.sample_one_step(x, x.device, B=terms)]


def _check_rk(original: Any, x: Tensor) -> None:
    """Raise Unfit where "rk" is neither the repository's formula, the known defect, nor Runge-Kutta 4."""
    layer = original.linearizer.linear_network
    with torch.no_grad():
        try:
            B = original.get_sampling_terms(x.device, _STEPS, "rk")
            y = original.sample_one_step(x, x.device, "rk", _STEPS)
            composed = original.sample_one_step(x, x.device, "rk", _STEPS, B)
        except Exception as error:
            raise Unfit('it has no "rk", which the repository\'s has') from error
        exact = collapse(_LayerView(layer), steps=_STEPS, method="rk4").to_dense().mT
        if not (_agree(B, _repository_rk(layer, x.device)) or _agree(B, exact)) or not _agree(y, composed):
            raise Unfit('its "rk" is a scheme of its own, neither the repository\'s formula nor Runge-Kutta 4')


def _repository_rk(layer: Any, device: torch.device) -> Tensor:
    """The repository's: I + (k(t) + 4 k(t + h / 2) + k(t + h)) / 6 per step, k(t) = h (A_t - I) / (1 - t)."""
    h = 1 / _STEPS
    B = eye = torch.eye(_N, device=device)

    def k(t: float) -> Tensor:
        return h / (1 - t) * (layer.get_lin_t(torch.full((1,), t, device=device))[0] - eye)

    for t in (i * h for i in range(_STEPS - 1)):
        B = B @ (eye + (k(t) + 4 * k(t + h / 2) + k(t + h)) / 6)
    return B


def _agree(actual: Any, expected: Tensor) -> bool:
    same = isinstance(actual, Tensor) and actual.shape == expected.shape
    return same and bool((actual - expected).norm() <= _ROUNDING * expected.norm())


ADAPTERS = (
    reference_adapter(
        name="TimeDependentLoRALinearLayer",
        attributes=_LORA,
        methods={"forward": _lora},
        plan=constant_plan("low-rank product"),
        probe=_probe_lora,
        emptied=lambda layer: (layer.lin1, layer.lin2),
        assumes=("get_lin_t",),
    ),
    reference_adapter(
        name="LinearKernel",
        attributes=("lin1", "k", "get_matrix"),
        methods={"forward": lambda layer, x, **kwargs: depthwise_conv(x, layer.get_matrix(kwargs["t"]))},
        plan=constant_plan("depthwise convolution"),
        probe=_probe_kernel,
        emptied=lambda layer: (layer.lin1,),
        assumes=("get_matrix",),
    ),
    reference_adapter(
        name="FlowMatcher",
        attributes=("linearizer",),
        methods={"get_sampling_terms": _terms, "sample_one_step": _sample},
        plan=_plan_matcher,
        probe=_probe_matcher,
        emptied=lambda matcher: (
            *(getattr(matcher.linearizer, name) for name in ("net_gx", "net_gy")),
            *(getattr(matcher.linearizer.linear_network, name) for name in ("lin1", "lin2")),
        ),
        float64=False,  # its identity matrix is float32
    ),
)
