"""Coupling flows of other libraries, built as their users build them.

Each maker takes (features, depth, hidden) and returns the model, a function (model, x) -> tensors and the same
function of the other direction. Halves or masks are the library's defaults. A two-sided block counts as two of the
``depth`` couplings. Conditioners are MLPs D/2 - hidden - D with SiLU, or the library's own default networks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .common import perturb, seeded

Run = Callable[[Any, Tensor], Sequence[Tensor]]
Model = tuple[nn.Module, Run, Run]
Maker = Callable[[int, int, tuple[int, ...]], Model]


def mlp(n_in: int, n_out: int, hidden: tuple[int, ...]) -> nn.Sequential:
    """Linear layers with SiLU between them."""
    layers: list[nn.Module] = []
    for a, b in pairwise((n_in, *hidden)):
        layers += [nn.Linear(a, b), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], n_out))


class _WithContext(nn.Module):
    """An MLP that ignores the context that nflows passes to its nets."""

    def __init__(self, n_in: int, n_out: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.net = mlp(n_in, n_out, hidden)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.net(x)


def _normflows(scale_map: str | None) -> Maker:
    """Couplings of halves, or of alternating masks where there is no scale map."""

    def make(features: int, depth: int, hidden: tuple[int, ...]) -> Model:
        import normflows as nf

        b, flows = torch.arange(features).remainder(2).float(), list[nn.Module]()
        for i in range(depth):
            if scale_map is None:
                nets = [mlp(features, features, hidden) for _ in range(2)]
                flows.append(nf.flows.MaskedAffineFlow(1 - b if i % 2 else b, *nets))
            else:
                net = mlp(features // 2, features, hidden)
                flows.append(nf.flows.AffineCouplingBlock(net, scale_map=scale_map))
                flows.append(nf.flows.Permute(features, mode="swap"))
        model = nf.NormalizingFlow(nf.distributions.DiagGaussian(features, trainable=False), flows)
        return model, lambda m, x: m.forward_and_log_det(x), lambda m, x: m.inverse_and_log_det(x)

    return make


def _nflows(name: str) -> Maker:
    def make(features: int, depth: int, hidden: tuple[int, ...]) -> Model:
        import nflows.transforms as transforms

        masks = [torch.arange(features).add(i).remainder(2) for i in range(depth)]
        couplings = [getattr(transforms, name)(mask, lambda i, o: _WithContext(i, o, hidden)) for mask in masks]
        return transforms.CompositeTransform(couplings), lambda m, x: m(x), lambda m, x: m.inverse(x)

    return make


def _nflows_spline(features: int, depth: int, hidden: tuple[int, ...]) -> Model:
    """As sbi builds its ``nsf``, without a context and without the linear maps between the couplings."""
    import nflows.transforms as transforms
    from nflows.nn.nets import ResidualNet

    coupling = functools.partial(
        transforms.PiecewiseRationalQuadraticCouplingTransform,
        transform_net_create_fn=lambda i, o: ResidualNet(i, o, hidden_features=hidden[0]),
        num_bins=10,
        tails="linear",
        tail_bound=3.0,
    )
    masks = [torch.arange(features).add(i).remainder(2) for i in range(depth)]
    couplings = [coupling(mask) for mask in masks]
    return transforms.CompositeTransform(couplings).eval(), lambda m, x: m(x), lambda m, x: m.inverse(x)


def _normflows_spline(features: int, depth: int, hidden: tuple[int, ...]) -> Model:
    import normflows as nf

    kind = functools.partial(nf.flows.CoupledRationalQuadraticSpline, features, 2, hidden[0])
    flows = [kind(reverse_mask=i % 2 == 1) for i in range(depth)]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(features, trainable=False), flows)
    return model, lambda m, x: m.inverse_and_log_det(x), lambda m, x: m.forward_and_log_det(x)


def _glasflow_spline(features: int, depth: int, hidden: tuple[int, ...]) -> Model:
    import glasflow

    model = glasflow.CouplingNSF(features, depth, n_neurons=hidden[0])
    return model.eval(), lambda m, x: m.forward(x), lambda m, x: m.inverse(x)


def _glasflow(features: int, depth: int, hidden: tuple[int, ...]) -> Model:
    """RealNVP with the library's residual networks, of one block each."""
    import glasflow

    model = glasflow.RealNVP(features, depth, n_neurons=hidden[0], n_blocks_per_transform=1)
    return model.eval(), lambda m, x: m.forward(x), lambda m, x: m.inverse(x)


def _freia(name: str, per_block: int) -> Maker:
    def make(features: int, depth: int, hidden: tuple[int, ...]) -> Model:
        import FrEIA.framework as framework
        import FrEIA.modules as modules

        model = framework.SequenceINN(features)
        for i in range(depth // per_block):
            model.append(getattr(modules, name), subnet_constructor=lambda n, m: mlp(n, m, hidden))
            if name == "AffineCouplingOneSided":
                model.append(modules.PermuteRandom, seed=i)
        # FrEIA's log-determinant of an additive coupling is a number.
        tensors = functools.partial(filter, lambda value: isinstance(value, Tensor))
        return model, lambda m, x: list(tensors(m(x))), lambda m, x: list(tensors(m(x, rev=True)))

    return make


def _zuko(features: int, depth: int, hidden: tuple[int, ...]) -> Model:
    import zuko

    model = zuko.flows.RealNVP(features, transforms=depth, hidden_features=hidden, activation=nn.SiLU)
    return (
        model,
        lambda m, x: m().transform.call_and_ladj(x),
        lambda m, x: m().transform.inv.call_and_ladj(x),
    )


def _memcnn(name: str, adapter: str | None) -> Maker:
    def make(features: int, depth: int, hidden: tuple[int, ...]) -> Model:
        import memcnn

        n, out = features // 2, features if adapter is not None else features // 2
        options = {} if adapter is None else {"adapter": getattr(memcnn, adapter)}
        block = functools.partial(getattr(memcnn, name), **options)
        model = nn.Sequential(*(block(mlp(n, out, hidden), mlp(n, out, hidden)) for _ in range(depth // 2)))
        return (
            model,
            lambda m, x: [m(x)],
            lambda m, y: [functools.reduce(lambda y, b: b.inverse(y), reversed(m), y)],
        )

    return make


LIBRARIES: dict[str, Maker] = {  # by library and class
    "normflows AffineCouplingBlock exp": _normflows("exp"),
    "normflows AffineCouplingBlock sigmoid": _normflows("sigmoid"),
    "normflows MaskedAffineFlow": _normflows(None),
    "nflows AffineCouplingTransform": _nflows("AffineCouplingTransform"),
    "nflows AdditiveCouplingTransform": _nflows("AdditiveCouplingTransform"),
    "glasflow RealNVP": _glasflow,
    "nflows PiecewiseRationalQuadraticCouplingTransform": _nflows_spline,
    "normflows CoupledRationalQuadraticSpline": _normflows_spline,
    "glasflow CouplingNSF": _glasflow_spline,
    "FrEIA GLOWCouplingBlock": _freia("GLOWCouplingBlock", 2),
    "FrEIA RNVPCouplingBlock": _freia("RNVPCouplingBlock", 2),
    "FrEIA NICECouplingBlock": _freia("NICECouplingBlock", 2),
    "FrEIA AffineCouplingOneSided": _freia("AffineCouplingOneSided", 1),
    "FrEIA AllInOneBlock": _freia("AllInOneBlock", 1),
    "zuko RealNVP": _zuko,
    "memcnn AffineCoupling sigmoid": _memcnn("AffineCoupling", "AffineAdapterSigmoid"),
    "memcnn AdditiveCoupling": _memcnn("AdditiveCoupling", None),
}
PEERS: dict[str, str] = {  # timed against coupling_flow: as many affine couplings as it has
    "normflows": "normflows AffineCouplingBlock exp",
    "nflows": "nflows AffineCouplingTransform",
    "zuko": "zuko RealNVP",
    "glasflow": "glasflow RealNVP",
    "FrEIA": "FrEIA AffineCouplingOneSided",
    "FrEIA GLOW": "FrEIA GLOWCouplingBlock",
}


def library(name: str, features: int, depth: int, hidden: tuple[int, ...], inverse: bool) -> tuple[nn.Module, Run]:
    """The model of this name, with the same weights in every run, and its function of (model, x).

    Raises:
        ImportError: the library is not installed.
    """
    model, *functions = seeded(lambda: LIBRARIES[name](features, depth, hidden))
    if not name.startswith("glasflow"):  # its inverse would divide by scales near 0.001
        seeded(lambda: perturb(model))
    return model, functions[inverse]


def peer(
    name: str, features: int, depth: int, hidden: tuple[int, ...], inverse: bool
) -> tuple[nn.Module, Run] | None:
    """The model, and (model, x) -> (z, log_det) or, where it is the inverse, (model, z) -> (x, ...).

    None where the library is not installed, or has no such model: an odd number of features, or of couplings
    where a block holds two.
    """
    if features % 2 or (depth % 2 and name == "FrEIA GLOW"):
        return None
    try:  # normflows' forward is from latents to data
        model, function = library(PEERS[name], features, depth, hidden, inverse != (name == "normflows"))
    except ImportError:
        return None
    if name == "zuko" and inverse:  # it would compute the log-determinant by a second pass, on request
        return model, lambda m, z: (m().transform.inv(z),)
    return model, function
