"""Other coupling-flow libraries, where installed: the same architecture in each one's own terms.

A maker takes (features, depth, hidden) and gives the model, a function (model, x) ->
(z, log_det) and one (model, z) -> (x, ...), or None where the library is not installed or has
no such model. Conditioners are MLPs with SiLU; halves move in turn; weights and scale maps
are the library's own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PEERS", "Peer"]

Run = Callable[[Any, Tensor], tuple[Tensor, ...]]
Peer = tuple[nn.Module, Run, Run]


def _mlp(n_in: int, n_out: int, hidden: tuple[int, ...]) -> nn.Sequential:
    widths = (n_in, *hidden)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], n_out))


def _normflows(features: int, depth: int, hidden: tuple[int, ...]) -> Peer:
    """Its forward is latent to data: the density is the inverse."""
    import normflows as nf

    flows: list[nn.Module] = []
    for _ in range(depth):
        flows.append(nf.flows.AffineCouplingBlock(_mlp(features // 2, features, hidden)))
        flows.append(nf.flows.Permute(features, mode="swap"))
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(features, trainable=False), flows)
    return model, lambda m, x: m.inverse_and_log_det(x), lambda m, z: m.forward_and_log_det(z)


def _nflows(features: int, depth: int, hidden: tuple[int, ...]) -> Peer:
    from nflows.transforms import AffineCouplingTransform, CompositeTransform

    class MLP(nn.Module):
        def __init__(self, n_in: int, n_out: int) -> None:
            super().__init__()
            self.net = _mlp(n_in, n_out, hidden)

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            y: Tensor = self.net(x)
            return y

    masks = [(torch.arange(features) // (features // 2) + i) % 2 for i in range(depth)]
    model = CompositeTransform([AffineCouplingTransform(mask, MLP) for mask in masks])
    return model, lambda m, x: m(x), lambda m, z: m.inverse(z)


def _zuko(features: int, depth: int, hidden: tuple[int, ...]) -> Peer:
    import zuko

    masks = [(torch.arange(features) // (features // 2) + i) % 2 == 1 for i in range(depth)]
    layers = [
        zuko.flows.coupling.GeneralCouplingTransform(
            features=features, mask=mask, hidden_features=hidden, activation=nn.SiLU
        )
        for mask in masks
    ]
    model = zuko.lazy.LazyComposedTransform(*layers)
    return model, lambda m, x: m().call_and_ladj(x), lambda m, z: (m().inv(z),)


def _freia(features: int, depth: int, hidden: tuple[int, ...]) -> Peer:
    """Its one-sided affine block, so that it has as many couplings as the others."""
    import FrEIA.framework as framework
    import FrEIA.modules as modules

    model = framework.SequenceINN(features)
    for i in range(depth):
        block = modules.AffineCouplingOneSided
        model.append(block, subnet_constructor=lambda n_in, n_out: _mlp(n_in, n_out, hidden))
        model.append(modules.PermuteRandom, seed=i)
    return model, lambda m, x: m(x), lambda m, z: m(z, rev=True)


def _where_installed(
    package: str, make: Callable[[int, int, tuple[int, ...]], Peer]
) -> Callable[[int, int, tuple[int, ...]], Peer | None]:
    def maker(features: int, depth: int, hidden: tuple[int, ...]) -> Peer | None:
        if features % 2 or importlib.util.find_spec(package) is None:
            return None
        return make(features, depth, hidden)

    return maker


PEERS = {
    package: _where_installed(package, make)
    for package, make in (("normflows", _normflows), ("nflows", _nflows), ("zuko", _zuko), ("FrEIA", _freia))
}
