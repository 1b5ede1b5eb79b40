"""FlowTransform: a bijection as a torch.distributions Transform, for code that composes distributions.

y = g(x),   log|det dy/dx| of the Jacobian, for x [..., *event]: any number of batch dimensions, or none
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.distributions import Transform, constraints
from torch.distributions.transforms import _InverseTransform

from .checks import check_count, check_dense, check_kind
from .flows.bijection import Bijection


class _Inverted(_InverseTransform):
    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__


class FlowTransform(Transform):
    """A view of a Bijection g as a transform from data x to noise z. Its ``.inv`` maps noise to data:

        noise = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2), torch.ones(2)), 1)
        p = torch.distributions.TransformedDistribution(noise, [lf.FlowTransform(g).inv])

    ``p.log_prob(x)`` and ``p.rsample()`` have gradients. The parameters belong to g: train ``g.parameters()``, and
    in Pyro register them with ``pyro.module("g", g)``. For a flow with a context, pass ``g.at(context=c)``.

    Args:
        flow: g, a Bijection whose z has the shape of x.
        cache_size: as in torch.distributions: 1 keeps the last pair (x, z), so that a sample is not inverted again;
            the weights must not change between the two.

    Raises:
        TypeError: flow is not a Bijection.
        ValueError: z has another shape than x.
    """

    bijective = True

    def __init__(self, flow: Bijection, cache_size: int = 0) -> None:
        super().__init__(cache_size=check_count("cache_size", cache_size, least=0, most=1))
        check_kind("flow", flow, Bijection)
        if flow.features_out != flow.features:
            raise ValueError(f"flow must keep the shape of x: {flow.features} features become {flow.features_out}")
        self.flow = flow
        self._event = 1 if flow.shape is None else len(flow.shape)

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.independent(constraints.real, self._event)

    codomain = domain

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cached_x_y": (None, None)}  # a result of the flow cannot be copied

    @property
    def inv(self) -> Transform:
        """The transform from noise to data. torch's own loses its transform where it is copied or pickled."""
        kept: Any = self._inv  # a weak reference, as in torch's own
        inverse = None if kept is None else kept()
        if inverse is None:
            inverse = _Inverted(self)
            self._inv = weakref.ref(inverse)  # type: ignore[assignment]
        return inverse

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        cache_size = check_count("cache_size", cache_size, least=0, most=1)
        return self if cache_size == self._cache_size else FlowTransform(self.flow, cache_size)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log|det dg/dx| [...] at x; y = g(x)."""
        return self.flow.forward_and_log_det(self._batch(x))[1].reshape(x.shape[: x.ndim - self._event])

    def _call(self, x: Tensor) -> Tensor:
        return self.flow(self._batch(x)).reshape(x.shape)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.flow.inverse(self._batch(y)).reshape(y.shape)

    def _batch(self, x: Tensor) -> Tensor:
        """x [..., *event] as [B, *event]."""
        if check_dense("x", x).ndim < self._event:
            raise ValueError(f"x must have at least {self._event} dimensions; got {tuple(x.shape)}")
        return x.reshape(-1, *x.shape[x.ndim - self._event :])

    def __repr__(self) -> str:
        return f"FlowTransform({type(self.flow).__name__})"
