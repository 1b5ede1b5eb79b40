"""The reference repository's FlowMatcher: all sampling steps as one operator, from ``linfast.collapse``.

    get_sampling_terms(device, T, sampling_method) -> B [N, N] with z B the latents after T - 1 steps of size 1 / T
    sample_one_step(x, device, sampling_method, T, B=None) -> g_x^{-1}(g_y(x) B)

The original multiplies N x N matrices, one or three a step, and for "rk" leaves out the stages'
composition (k3 = k2, and each k taken at the step's start), so that its one step is not its many
steps: 32 dB in the paper. Here it is exact, and B stays factored unless it is asked for as a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..operators.base import LatentOperator
from ..operators.time_low_rank import TimeLowRank
from ..sampling.propagator import collapse
from ..sampling.sampler import at_work
from .adapter import Adapter, Draw, Options, Plan, Unfit
from .identity import changed_method
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
    if method not in _METHODS or T < 2 or kept:
        return None
    with torch.no_grad():
        return collapse(_LayerView(matcher.linearizer.linear_network), steps=T, method=_METHODS[method])


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


class _Linearizer(nn.Module):
    """The parts of a linearizer that the sampler touches, on 6 numbers a sample."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.linear_network = layer
        self.net_gy = nn.Module()
        vars(self.net_gy)["dim"] = 6

    def gy(self, x: Tensor) -> Tensor:
        return x.tanh()

    def gx_inverse(self, z: Tensor) -> Tensor:
        return z.sinh()


def _probe(matcher: Any, draw: Draw) -> Sequence[Tensor]:
    layer = matcher.linearizer.linear_network
    shrink_lora(layer, draw, 6)
    matcher.linearizer = _Linearizer(layer)
    x = draw(3, 1, 2, 3)
    terms = matcher.get_sampling_terms(x.device, 5, "euler")
    one_step = matcher.sample_one_step(x, x.device, sampling_method="euler", T=5)
    return [terms, one_step, matcher.sample_one_step(x, x.device, B=terms)]


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
