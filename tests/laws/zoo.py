"""Every bijection that the laws check, and helpers that the law tests share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

import linfast as lf
from linfast.flows import Bijection
from linfast.scale_maps import SCALE_MAP_KINDS
from tests.seeds import seeded


def perturb(module: nn.Module, std: float = 0.05, seed: int = 0) -> nn.Module:
    """Add std * randn to every parameter, because default initialisations contain many zeros."""
    generator = torch.Generator().manual_seed(seeded(seed))
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(std * noise.to(parameter.dtype))
    return module


def density(base: Distribution | nn.Module | None = None, **options: object) -> lf.Density:
    """The perturbed density of a coupling flow on two features, in float64."""
    flow = lf.coupling_flow(2, 4, (16,), **options)  # type: ignore[arg-type]
    return perturb(lf.Density(flow, base), 0.3).double()  # type: ignore[return-value]


def relative(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth|, in float64."""
    value, truth = value.detach().double(), truth.detach().double()
    return float((value - truth).norm() / truth.norm().clamp(min=1e-300))


def _affine(features: int, moves: str = "first", **options: object) -> Bijection:
    first, second = (features + 1) // 2, features // 2
    moved, kept = (first, second) if moves == "first" else (second, first)
    return lf.AffineCoupling(lf.MLP(kept, 2 * moved, (16,)), features, moves, **options)  # type: ignore[arg-type]


def _initialised(bijection: Bijection, x: Tensor) -> Bijection:
    bijection(x)
    return bijection


def _unet_flow(channels: int, **options: object) -> lf.Flow:
    unet = {"blocks": 1, "attention_resolutions": (4,), "dropout": 0.0}
    side = 8 if channels == 1 else 4
    return lf.image_flow(channels, side, width=4, conditioner="unet", unet_options=unet, **options)  # type: ignore[arg-type]


def _masked(features: int, scale_map: object = "smooth", order: str = "scale_first", **net: object) -> Bijection:
    """Its features are in a random order."""
    net.setdefault("feature_order", torch.randperm(features).tolist())
    net.setdefault("per_feature", 1 if scale_map is None else 2)
    of_spline = {name: net.pop(name) for name in ("bins", "tail_bound", "tails") if name in net}
    made = lf.MaskedMLP(features, **net)  # type: ignore[arg-type]
    return lf.MaskedAutoregressive(made, scale_map, order, **of_spline)  # type: ignore[arg-type]


def _spline(features: int, moves: str = "first", **options: object) -> Bijection:
    """Its parameters are of the size that training gives them."""
    first, second = (features + 1) // 2, features // 2
    moved, kept = (first, second) if moves == "first" else (second, first)
    parameters = 3 * 5 + ("linear", "circular", "bounded").index(str(options.get("tails", "linear"))) - 1
    conditioner = perturb(lf.MLP(kept, parameters * moved, (16,)), 0.2)
    return lf.SplineCoupling(conditioner, features, moves, 5, **options)  # type: ignore[arg-type]


def _timed_splines(**options: int) -> lf.Flow:
    return lf.image_flow(2, 4, 2, 8, transform="spline", time_features=8, **options)


def _in_context(g: lf.Flow, **context: object) -> Bijection:
    """The flow in one context of three numbers."""
    return g.at(context=torch.tensor([[0.5, -1.0, 2.0]]), **context)


Make = Callable[[], Bijection]

# name -> (make, sample shape)
VECTORS: dict[str, tuple[Make, tuple[int, ...]]] = {
    **{f"affine-{kind}": (lambda kind=kind: _affine(6, scale_map=kind), (6,)) for kind in SCALE_MAP_KINDS},
    "affine-scale-first": (lambda: _affine(6, order="scale_first"), (6,)),
    "affine-interleaved": (lambda: _affine(6, layout="interleaved"), (6,)),
    "affine-second": (lambda: _affine(6, "second"), (6,)),
    "affine-odd-first": (lambda: _affine(7), (7,)),
    "affine-odd-second": (lambda: _affine(7, "second"), (7,)),
    "affine-two": (lambda: _affine(2), (2,)),
    "affine-residual": (lambda: lf.AffineCoupling(lf.ResidualMLP(3, 6, 16, activation="silu"), 6), (6,)),
    "additive": (lambda: lf.AdditiveCoupling(lf.MLP(3, 4, (16,)), 7), (7,)),
    "masked-one": (lambda: _masked(1), (1,)),
    "masked-two": (lambda: _masked(2, order="shift_first"), (2,)),
    "masked-additive": (lambda: _masked(3, None), (3,)),
    "masked-softplus": (lambda: _masked(8, "softplus", hidden=(12, 5, 9)), (8,)),
    "masked-residual": (lambda: _masked(8, "exp", hidden=(16, 16, 16), activation="tanh", residual=True), (8,)),
    "masked-few-units": (lambda: _masked(33, "tanh", hidden=(8,), activation="elu"), (33,)),
    "masked-wide": (lambda: _masked(64, activation="gelu"), (64,)),
    "spline": (lambda: _spline(6), (6,)),
    "spline-bins-first": (lambda: _spline(6, layout="bins_first"), (6,)),
    "spline-circular": (lambda: _spline(5, "second", tails="circular", layout="bins_first"), (5,)),
    "spline-bounded": (lambda: _spline(7, tails="bounded", tail_bound=1.5), (7,)),
    "spline-two": (lambda: _spline(2, "second", min_width=0.1, min_height=0.05, min_derivative=0.5), (2,)),
    "masked-spline": (lambda: _masked(5, bins=5, per_feature=14), (5,)),
    "masked-spline-one": (lambda: _masked(1, bins=4, per_feature=11, tail_bound=1.0), (1,)),
    "masked-spline-circular": (
        lambda: _masked(4, bins=3, per_feature=9, tails="circular", hidden=(12, 12), residual=True),
        (4,),
    ),
    "actnorm": (lambda: _initialised(lf.ActNorm(6), 2 + 3 * torch.randn(64, 6)), (6,)),
    "mix-lu": (lambda: lf.Mix(6), (6,)),
    "mix-free": (lambda: lf.Mix(6, "free"), (6,)),
    "mix-one": (lambda: lf.Mix(1), (1,)),
    "householder": (lambda: lf.Householder(6), (6,)),
    "permute": (lambda: lf.Permute(6), (6,)),
    "permute-reverse": (lambda: lf.Permute(5, "reverse"), (5,)),
    "identity": (lambda: lf.Flow([], features=4), (4,)),
    "inverse": (lambda: lf.Inverse(lf.coupling_flow(6, 2, (16,), mix="lu")), (6,)),
    "flow-mixed": (lambda: lf.coupling_flow(6, 3, (16,), mix="lu"), (6,)),
    "flow-additive": (lambda: lf.coupling_flow(6, 4, (16,), transform="additive", mix="householder"), (6,)),
    "flow-permute": (lambda: lf.coupling_flow(5, 4, (16,), "tanh", mix="permute"), (5,)),
    "flow-spline": (lambda: lf.coupling_flow(5, 3, (16,), transform="spline", bins=4, mix="lu"), (5,)),
    "flow-spline-timed": (
        lambda: lf.coupling_flow(6, 2, (16,), transform="spline", tail_bound=2.0, time_features=8).at(t=0.7),
        (6,),
    ),
    "flow-masked-spline": (lambda: lf.autoregressive_flow(4, 2, (16,), transform="spline", mix="permute"), (4,)),
    "flow-masked": (lambda: lf.autoregressive_flow(5, 3, (16, 16), "silu", actnorm=False, mix="lu"), (5,)),
    "flow-masked-timed": (
        lambda: lf.autoregressive_flow(3, 2, (16,), "silu", feature_order="random", time_features=8).at(t=0.7),
        (3,),
    ),
    "flow-timed": (lambda: lf.coupling_flow(6, 2, (16,), time_features=8).at(t=0.7), (6,)),
}
IMAGES: dict[str, tuple[Make, tuple[int, ...]]] = {
    "image-affine": (lambda: lf.AffineCoupling(lf.ConvNet(1, 4, 8), 3), (3, 4, 2)),
    "image-spline": (lambda: lf.SplineCoupling(lf.ConvNet(1, 2 * 11, 8), 3, bins=4), (3, 4, 2)),
    "image-spline-bounded": (
        lambda: lf.SplineCoupling(lf.ConvNet(2, 13, 8), 3, "second", 4, tails="bounded", layout="bins_first"),
        (3, 4, 2),
    ),
    "image-flow-spline": (lambda: lf.image_flow(2, 4, 2, 8, transform="spline"), (2, 4, 4)),
    "image-actnorm": (lambda: _initialised(lf.ActNorm(3), 2 + 3 * torch.randn(16, 3, 4, 2)), (3, 4, 2)),
    "image-mix": (lambda: lf.Mix(3), (3, 4, 2)),
    "image-mix-free": (lambda: lf.Mix(3, "free"), (3, 4, 2)),
    "image-householder": (lambda: lf.Householder(3, 2), (3, 4, 2)),
    "image-permute": (lambda: lf.Permute(3), (3, 4, 2)),
    "squeeze": (lambda: lf.Squeeze(2), (2, 4, 2)),
    "image-flow-one-channel": (lambda: lf.image_flow(1, 4, 2, 8), (1, 4, 4)),
    "image-flow-even": (lambda: lf.image_flow(2, (3, 5), 4, 8), (2, 3, 5)),
    "image-flow-unet": (lambda: _unet_flow(2, depth=3), (2, 4, 4)),
    "image-flow-unet-timed": (lambda: _unet_flow(1, depth=2, time_features=8).at(t=0.3), (1, 8, 8)),
    "image-flow-timed": (lambda: lf.image_flow(2, 4, 2, 8, time_features=8).at(t=0.3), (2, 4, 4)),
    "image-flow-context": (lambda: _in_context(lf.image_flow(1, 4, 2, 8, context_features=3)), (1, 4, 4)),
    "image-flow-context-timed": (
        lambda: _in_context(_timed_splines(context_features=3), t=0.3),
        (2, 4, 4),
    ),
    "image-flow-unet-context": (
        lambda: _in_context(_unet_flow(2, depth=2, transform="additive", context_features=3)),
        (2, 4, 4),
    ),
    "image-flow-unet-context-timed": (
        lambda: _in_context(_unet_flow(2, depth=2, time_features=8, context_features=3), t=0.3),
        (2, 4, 4),
    ),
}
BIJECTIONS = {**VECTORS, **IMAGES}


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[Bijection, tuple[int, ...]]:
    """The named bijection, perturbed, in this dtype, and its sample shape."""
    make, shape = BIJECTIONS[name]
    return perturb(make()).to(dtype), shape  # type: ignore[return-value]
