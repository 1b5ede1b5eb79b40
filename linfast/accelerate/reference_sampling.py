"""The reference repository's FlowMatcher: all sampling steps as one operator, from ``linfast.collapse``.

    get_sampling_terms(device, T, sampling_method) -> B [N, N] with z B the latents after T - 1 steps of size 1 / T
    sample_one_step(x, device, sampling_method, T, B=None) -> g_x^{-1}(g_y(x) B)

The original multiplies N x N matrices, one or three a step, and for "rk" leaves out the stages'
composition (k3 = k2, and each k taken at the step's start), so that its one step is not its many
steps: 32 dB in the paper. Here it is exact, and B stays factored unless it is asked for as a matrix. A class of
this name whose "rk" is another scheme is left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..operators.base import LatentOperator
from ..operators.time import TimeLowRank
from ..sampling.collapsed import collapse
from ..sampling.sampler import at_work
from .adapter import Adapter, Draw, Options, Plan, Unfit
from .identity import PLAN, changed_method
from .reference import LIBRARY, has, shrink_lora

__all__ = ["ADAPTER"]

_METHODS = {"euler": "euler", "rk": "rk4"}


class _LayerView(TimeLowRank):
    """The LoRA layer as an operator on columns, A_t z = A2(t) (A1(t)^T z); its networks are the layer's."""

    def __init__(self, layer: Any) -> None:
        LatentOperator.__init__(self)
        self.n = self.n_out = self.n_in = layer.out_features
        self.rank_bound, self.alpha = layer.lora_features, 0.0
        self.embedding = nn.Identity()  # type: ignore[assignment]
        self.u_net, self.v_net = layer.lin2, layer.lin1


def _plan(matcher: Any, options: Options) -> Plan:
    layer = getattr(matcher.linearizer, "linear_network", None)
    if not has("lin1", "lin2", "out_features", "lora_features", "get_lin_t")(layer):
        raise Unfit(f"its linear network is a {type(layer).__name__}, not the repository's LoRA layer")
    if changed_method(layer, ("get_lin_t",)) is not None:
        raise Unfit("the get_lin_t of its linear network was replaced")
    if "rk_collapse" in options.keep_defects:
        return Plan(
            "factored collapse for euler", "kept: the one step of rk is not its many steps", options=options
        )
    return Plan("factored collapse", "fixed: the one step of rk is its many steps")


def _operator(matcher: Any, method: str, T: int) -> LatentOperator | None:
    """All steps in one; None where the original has to run."""
    kept = method == "rk" and "rk_collapse" in matcher._linfast_plan.options.keep_defects
    layer = matcher.linearizer.linear_network
    if method not in _METHODS or T < 2 or kept or "get_lin_t" in vars(layer):
        return None
    with torch.no_grad():
        return collapse(_LayerView(layer), steps=T, method=_METHODS[method])


def _terms(matcher: Any, device: Any, T: int = 100, sampling_method: str = "euler") -> Tensor:
    B = _operator(matcher, sampling_method, T)
    if B is None:
        return matcher._linfast_original.get_sampling_terms(matcher, device, T, sampling_method)
    with torch.no_grad():
        return B.to_dense().mT.contiguous().to(device)


def _sample(
    matcher: Any, x: Tensor, device: Any, sampling_method: str = "rk", T: int = 100, B: Tensor | None = None
) -> Tensor:
    operator = _operator(matcher, sampling_method, T) if B is None else None
    if operator is None:
        return matcher._linfast_original.sample_one_step(matcher, x, device, sampling_method, T, B)
    f = matcher.linearizer
    f.eval()
    with at_work(f):
        return f.gx_inverse(operator(f.gy(x)))


_N, _STEPS, _ROUNDING = 6, 5, 1e-4
"""Of the check: numbers a sample, steps, and how far float32 may take two ways to one matrix apart."""


class _Linearizer(nn.Module):
    """The parts of a linearizer that the sampler touches, on few numbers a sample."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.linear_network = layer
        self.net_gy = nn.Module()
        vars(self.net_gy)["dim"] = _N

    def gx(self, x: Tensor) -> Tensor:
        return x.sin()

    def gy(self, x: Tensor) -> Tensor:
        return x.tanh()

    def gx_inverse(self, z: Tensor) -> Tensor:
        return z.sinh()


def _probe(matcher: Any, draw: Draw) -> Sequence[Tensor]:
    layer = matcher.linearizer.linear_network
    widths = [name for name, value in vars(matcher).items() if type(value) is int and value == layer.out_features]
    vars(matcher).update(dict.fromkeys(widths, _N))  # forks keep the layer's width under a name of their own
    shrink_lora(layer, draw, _N)
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
    """Raise Unfit where "rk" is neither the repository's formula nor Runge-Kutta 4: only the first is a defect."""
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
    """Of the repository: I + (k(t) + 4 k(t + h / 2) + k(t + h)) / 6 a step, k(t) = h (A_t - I) / (1 - t)."""
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


ADAPTER = Adapter(
    library=LIBRARY,
    where=None,
    name="FlowMatcher",
    methods={"get_sampling_terms": _terms, "sample_one_step": _sample},
    plan=_plan,
    probe=_probe,
    recognises=has("linearizer"),
    hollow=lambda matcher: (
        *(getattr(matcher.linearizer, name) for name in ("net_gx", "net_gy")),
        *(getattr(matcher.linearizer.linear_network, name) for name in ("lin1", "lin2")),
    ),
    float64=False,  # its identity matrix is float32
)
