"""The couplings that ``accelerate`` knows, as their libraries' users build flows of them.

Each maker takes (features, depth, hidden) and gives the model, a function (model, x) -> tensors and one for
the other direction; halves or masks as the library has them by default; depth couplings, of which a
two-sided block holds two; conditioners D/2 - hidden - D with SiLU, or what the library itself builds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LIBRARIES", "Maker", "Run"]

Run = Callable[[Any, Tensor], Sequence[Tensor]]
Maker = Callable[[int, int, tuple[int, ...]], tuple[nn.Module, Run, Run]]


def mlp(n_in: int, n_out: int, hidden: tuple[int, ...]) -> nn.Sequential:
    """Linear layers with SiLU between them, the last one small."""
    layers: list[nn.Module] = []
    for a, b in pairwise((n_in, *hidden)):
        layers += [nn.Linear(a, b), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], n_out))


class _PassesOn(nn.Module):
    """nflows gives its nets a context."""

    def __init__(self, n_in: int, n_out: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.net = mlp(n_in, n_out, hidden)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.net(x)


def _normflows(scale_map: str) -> Maker:
    def make(features: int, depth: int, hidden: tuple[int, ...]) -> tuple[nn.Module, Run, Run]:
        import normflows as nf

        flows: list[nn.Module] = []
        for _ in range(depth):
            flows.append(nf.flows.AffineCouplingBlock(mlp(features // 2, features, hidden), scale_map=scale_map))
            flows.append(nf.flows.Permute(features, mode="swap"))
        return _normflows_model(features, flows)

    return make


def _normflows_masked(features: int, depth: int, hidden: tuple[int, ...]) -> tuple[nn.Module, Run, Run]:
    import normflows as nf

    b = torch.arange(features).remainder(2).float()
    nets = [[mlp(features, features, hidden) for _ in range(2)] for _ in range(depth)]
    return _normflows_model(
        features, [nf.flows.MaskedAffineFlow(1 - b if i % 2 else b, *both) for i, both in enumerate(nets)]
    )


def _normflows_model(features: int, flows: list[nn.Module]) -> tuple[nn.Module, Run, Run]:
    import normflows as nf

    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(features, trainable=False), flows)
    return model, lambda m, x: m.forward_and_log_det(x), lambda m, x: m.inverse_and_log_det(x)


def _nflows(name: str) -> Maker:
    def make(features: int, depth: int, hidden: tuple[int, ...]) -> tuple[nn.Module, Run, Run]:
        import nflows.transforms as transforms

        masks = [torch.arange(features).add(i).remainder(2) for i in range(depth)]
        couplings = [getattr(transforms, name)(mask, lambda i, o: _PassesOn(i, o, hidden)) for mask in masks]
        model = transforms.CompositeTransform(couplings)
        return model, lambda m, x: m(x), lambda m, x: m.inverse(x)

    return make


def _glasflow(features: int, depth: int, hidden: tuple[int, ...]) -> tuple[nn.Module, Run, Run]:
    """Its own nets: residual, one block of this width."""
    import glasflow

    model = glasflow.RealNVP(features, depth, n_neurons=hidden[0], n_blocks_per_transform=1)
    return model.eval(), lambda m, x: m.forward(x), lambda m, x: m.inverse(x)


def _freia(name: str, per_block: int, **options: Any) -> Maker:
    def make(features: int, depth: int, hidden: tuple[int, ...]) -> tuple[nn.Module, Run, Run]:
        import FrEIA.framework as framework
        import FrEIA.modules as modules

        model = framework.SequenceINN(features)
        for i in range(depth // per_block):
            model.append(getattr(modules, name), subnet_constructor=lambda n, m: mlp(n, m, hidden), **options)
            if per_block == 1 and name != "AllInOneBlock":
                model.append(modules.PermuteRandom, seed=i)
        return model, lambda m, x: _tensors(m(x)), lambda m, x: _tensors(m(x, rev=True))

    return make


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    return [v for v in values if isinstance(v, Tensor)]


def _zuko(features: int, depth: int, hidden: tuple[int, ...]) -> tuple[nn.Module, Run, Run]:
    import zuko

    model = zuko.flows.RealNVP(features, transforms=depth, hidden_features=hidden, activation=nn.SiLU)
    return (
        model,
        lambda m, x: m().transform.call_and_ladj(x),
        lambda m, x: m().transform.inv.call_and_ladj(x),
    )


def _memcnn(name: str, adapter: str | None) -> Maker:
    def make(features: int, depth: int, hidden: tuple[int, ...]) -> tuple[nn.Module, Run, Run]:
        import memcnn

        n, out = features // 2, features if adapter == "AffineAdapterSigmoid" else features // 2
        options = {} if adapter is None else {"adapter": getattr(memcnn, adapter)}
        blocks = [
            getattr(memcnn, name)(mlp(n, out, hidden), mlp(n, out, hidden), **options) for _ in range(depth // 2)
        ]
        return nn.Sequential(*blocks), lambda m, x: [m(x)], _memcnn_inverse

    return make


def _memcnn_inverse(model: Any, y: Tensor) -> list[Tensor]:
    for block in reversed(model):
        y = block.inverse(y)
    return [y]


LIBRARIES: dict[str, Maker] = {
    "normflows AffineCouplingBlock exp": _normflows("exp"),
    "normflows AffineCouplingBlock sigmoid": _normflows("sigmoid"),
    "normflows MaskedAffineFlow": _normflows_masked,
    "nflows AffineCouplingTransform": _nflows("AffineCouplingTransform"),
    "nflows AdditiveCouplingTransform": _nflows("AdditiveCouplingTransform"),
    "glasflow RealNVP": _glasflow,
    "FrEIA GLOWCouplingBlock": _freia("GLOWCouplingBlock", 2),
    "FrEIA RNVPCouplingBlock": _freia("RNVPCouplingBlock", 2),
    "FrEIA NICECouplingBlock": _freia("NICECouplingBlock", 2),
    "FrEIA AffineCouplingOneSided": _freia("AffineCouplingOneSided", 1),
    "FrEIA AllInOneBlock": _freia("AllInOneBlock", 1),
    "zuko RealNVP": _zuko,
    "memcnn AffineCoupling sigmoid": _memcnn("AffineCoupling", "AffineAdapterSigmoid"),
    "memcnn AdditiveCoupling": _memcnn("AdditiveCoupling", None),
}
"""By library and class."""
