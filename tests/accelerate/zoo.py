"""Small random models of each library's real release, and how to run each in both directions.

The tests of a library that cannot be imported are skipped, or fail where ``LINFAST_REQUIRE_PEERS`` is set.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from . import stand_in

FEATURES, CONTEXT, BATCH = 6, 3, 5


@dataclass(frozen=True)
class Kind:
    """build() -> model; run(model, x, c) -> outputs of both directions; how many modules are to be swapped.

    whole: how many launches with their conditioners the couplings of a run are where kernels run, if alone.
    calls: how often a run calls the whole chain.
    """

    library: str
    build: Callable[[], nn.Module]
    run: Callable[[nn.Module, Tensor, Tensor], list[Tensor]]
    swapped: int
    shape: tuple[int, ...] = (FEATURES,)
    context: tuple[int, ...] = (CONTEXT,)
    whole: int = 0
    calls: int = 2


def require(library: str):
    """The library, or a skip that names it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(library)
    except ImportError as error:
        if os.environ.get("LINFAST_REQUIRE_PEERS"):
            raise
        pytest.skip(f"{library} is not installed: {error}")


def make(kind: Kind, seed: int, permutations: int | None = None) -> nn.Module:
    """A model of this kind in float32, with every weight perturbed; another seed for FrEIA's permutations."""
    torch.manual_seed(seed)
    np.random.seed(seed if permutations is None else permutations)  # noqa: NPY002  # which they are drawn by
    model = kind.build()
    redraw(model, model.state_dict(), seed)
    return model


def redraw(model: nn.Module, start: dict[str, Tensor], seed: int) -> None:
    """Set every weight to a value near that in ``start``."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "log_S" not in name:
                parameter.copy_(start[name] + 0.05 * torch.randn_like(parameter))


def inputs(kind: Kind, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (BATCH, *kind.shape), (BATCH, *kind.context)
    x, c = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return x.requires_grad_(), c.requires_grad_()


def net(n_in: int, n_out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(n_in, 16), nn.SiLU(), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, n_out))


def conv(n_in: int, n_out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(n_in, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, n_out, 1))


class ConvNet(nn.Module):
    """Takes a context, as nflows' nets do, and leaves it."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.net = conv(n_in, n_out)

    def forward(self, x, context=None):
        return self.net(x)


# normflows


def _normflows(scale_map: str = "exp", split: str = "channel", scale: bool = True):
    def build():
        nf = require("normflows")
        half = FEATURES // 2
        flows = []
        for _ in range(2):
            mlp = nf.nets.MLP([half, 16, 16, half * (2 if scale else 1)], init_zeros=False)
            flows += [nf.flows.AffineCouplingBlock(mlp, scale, scale_map, split), nf.flows.Permute(FEATURES)]
        return nf.NormalizingFlow(nf.distributions.DiagGaussian(FEATURES), flows)

    return build


def _glow():
    nf = require("normflows")
    flows = [nf.flows.GlowBlock(4, 8, init_zeros=False) for _ in range(2)]
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian((4, 2, 3)), flows)
    flow.forward_and_log_det(torch.randn(16, 4, 2, 3))  # initialises ActNorm
    return flow


def _normflows_masked(masks: str, activation: type[nn.Module] = nn.ReLU, scale: bool = True):
    def build():
        nf = require("normflows")

        def mlp():
            layers = nn.Linear(FEATURES, 16), activation(), nn.Linear(16, 16), activation(), nn.Linear(16, FEATURES)
            return nn.Sequential(*layers)

        flows = [
            nf.flows.MaskedAffineFlow(torch.tensor(mask).gt(0).float(), mlp(), mlp() if scale else None)
            for mask in _masks(masks)
        ]
        return nf.NormalizingFlow(nf.distributions.DiagGaussian(FEATURES), flows)

    return build


class Residual(nn.Module):
    """Not an MLP."""

    def __init__(self, features):
        super().__init__()
        self.net = net(features, features)

    def forward(self, x):
        return x + self.net(x)


def _normflows_masked_residual():
    nf = require("normflows")
    flows = [
        nf.flows.MaskedAffineFlow(torch.tensor(mask).gt(0).float(), Residual(FEATURES), Residual(FEATURES))
        for mask in (*_masks("alternate"), *_masks("gather"))
    ]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(FEATURES), flows)


def _run_normflows(model, x, c):
    return [*model.forward_and_log_det(x), *model.inverse_and_log_det(x)]


# nflows and glasflow


def _masks(kind: str) -> list[list[int]]:
    if kind == "alternate":
        return [[1, -1] * 3, [-1, 1] * 3]
    if kind == "halves":
        return [[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]]
    return [[1, 0, 0, 1, 1, 0], [0, 1, 1, 1, 1, 0]]


def _nflows(name: str, masks: str):
    def build():
        nflows = require("nflows.transforms")
        nets = require("nflows.nn.nets")

        def resnet(n_in, n_out):
            return nets.ResidualNet(n_in, n_out, hidden_features=16, context_features=CONTEXT)

        transform = getattr(nflows, name)
        return nflows.CompositeTransform([transform(mask, resnet) for mask in _masks(masks)])

    return build


class PassesOn(nn.Module):
    """Takes a context, as nflows' nets do, and leaves it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, context=None):
        return self.inner(x)


def _nflows_mlp(name: str, masks: str):
    def build():
        nflows, nets = require("nflows.transforms"), require("nflows.nn.nets")

        def mlp(n_in, n_out):
            return PassesOn(nets.MLP([n_in], [n_out], [16, 16], activation=torch.tanh))

        return nflows.CompositeTransform([getattr(nflows, name)(mask, mlp) for mask in _masks(masks)])

    return build


def _glasflow_mlp():
    transforms, coupling = require("glasflow.nflows.transforms"), require("glasflow.transforms.coupling")
    mlp = require("glasflow.nets.mlp").MLP
    return transforms.CompositeTransform(
        [coupling.AffineCouplingTransform(mask, lambda i, o: mlp(i, o, [16])) for mask in _masks("alternate")]
    )


def _run_nflows_alone(model, x, c):
    return [*model(x), *model.inverse(x)]


def _nflows_image():
    nflows = require("nflows.transforms")

    return nflows.CompositeTransform(
        [nflows.AffineCouplingTransform(mask, ConvNet) for mask in ([1, -1] * 2, [0, 1, 1, 0])]
    )


def _spline(masks: str, package: str = "nflows", context: int | None = CONTEXT, build_net=None, **options):
    """Two spline couplings with residual networks, and an LU map between them."""

    def build():
        transforms, nets = require(f"{package}.transforms"), require(f"{package}.nn.nets")

        def resnet(n_in, n_out):
            return nets.ResidualNet(n_in, n_out, hidden_features=16, context_features=context, **net_options)

        named = {"num_bins": 5, "tails": "linear", "tail_bound": 2.0, **options}
        net_options = named.pop("net", {})
        kind = transforms.PiecewiseRationalQuadraticCouplingTransform
        one, two = (kind(mask, build_net or resnet, **named) for mask in _masks(masks))
        between = [transforms.LULinear(FEATURES)] if named["tails"] else []
        return transforms.CompositeTransform([one, *between, two]).eval()

    return build


def _run_bounded_alone(model, x, c):
    return _run_nflows_alone(model, x.sigmoid(), c)


def _spline_image():
    coupling = require("nflows.transforms").PiecewiseRationalQuadraticCouplingTransform
    options = {"num_bins": 4, "tails": "linear", "apply_unconditional_transform": True, "img_shape": [2, 3]}
    transforms = [coupling(torch.tensor(mask), ConvNet, **options) for mask in ([1, -1] * 2, [0, 1, 1, 0])]
    return require("nflows.transforms").CompositeTransform(transforms)


def _normflows_spline(name: str = "CoupledRationalQuadraticSpline", **options):
    def build():
        nf = require("normflows")
        named = {"num_bins": 5, "activation": nn.ELU, **options}
        kind = getattr(nf.flows, name)
        flows = [kind(FEATURES, 2, 16, reverse_mask=reverse, **named) for reverse in (False, True)]
        return nf.NormalizingFlow(nf.distributions.DiagGaussian(FEATURES), flows)

    return build


def _glasflow_nsf(**options):
    def build():
        nsf = require("glasflow").CouplingNSF
        return nsf(FEATURES, 2, n_conditional_inputs=CONTEXT, n_neurons=16, **options).eval()

    return build


def _run_nflows(model, x, c):
    return [*model(x, c), *model.inverse(x, c)]


def _glasflow(activation: str, **options):
    def build():
        flow = require("glasflow").RealNVP(
            FEATURES,
            2,
            n_conditional_inputs=CONTEXT,
            n_neurons=16,
            **options,
            **({"scale_activation": activation} if activation else {}),
        )
        return flow.eval()

    return build


def _run_glasflow(model, x, c):
    return [*model.forward(x, conditional=c), *model.inverse(x, conditional=c)]


# FrEIA


def _freia(name: str, shape: tuple[int, ...] = (FEATURES,), context: int = 0, **options):
    def build():
        frames, modules = require("FrEIA.framework"), require("FrEIA.modules")
        inn = frames.SequenceINN(*shape)
        subnet = net if len(shape) == 1 else conv
        for _ in range(2):
            condition = {"cond": 0, "cond_shape": (context, *shape[1:])} if context else {}
            inn.append(getattr(modules, name), subnet_constructor=subnet, **condition, **options)
        return inn

    return build


def _run_freia(model, x, c):
    condition = [c] if model.conditions and model.conditions[0] is not None else None
    (y, log_det), (back, log_det_back) = model(x, c=condition), model(x, c=condition, rev=True)
    values = y, 1 + log_det, back, 1 + log_det_back  # a log-det of zero may be rounding errors alone
    for block in model:
        if getattr(block, "householder", 0):
            block.w_perm = block.w_perm_inv = None  # FrEIA leaves tensors with a graph, which cannot be copied
    return [v if isinstance(v, Tensor) else x.new_tensor(v) for v in values]  # a log-det may be a float


# zuko


def _zuko(context: int = CONTEXT, name: str = "RealNVP", **options):
    def build():
        flow = getattr(require("zuko").flows, name)
        return flow(FEATURES, context, transforms=2, hidden_features=(16, 16), **options)

    return build


def _run_zuko(model, x, c):
    conditioned = c if model.transform.transforms[0].hyper.in_features > FEATURES // 2 + 1 else None
    transform = model(conditioned).transform
    back = transform.inv.call_and_ladj(x)
    return [
        *transform.call_and_ladj(x),
        *back,
        transform(x),
        transform.inv(x),
        transform.log_abs_det_jacobian(x, x),
    ]


# memcnn


def _memcnn(name: str, adapter: str | None = None, wrapped: bool = False):
    def build():
        memcnn = require("memcnn")
        width = FEATURES if adapter == "AffineAdapterSigmoid" else FEATURES // 2
        options = {} if adapter is None else {"adapter": getattr(memcnn, adapter)}
        couplings = [
            getattr(memcnn, name)(net(FEATURES // 2, width), net(FEATURES // 2, width), **options) for _ in range(2)
        ]
        return nn.Sequential(
            *(memcnn.InvertibleModuleWrapper(c, keep_input=True, keep_input_inverse=True) for c in couplings)
            if wrapped
            else couplings
        )

    return build


def _run_memcnn(model, x, c):
    y, back = x, x
    for layer in model:
        y = layer(y)
    for layer in reversed(model):
        back = layer.inverse(back)
    return [y, back]


# The reference repository's classes, from the stand-in


def reference(blocks: int):
    def build():
        model = stand_in.build(blocks)
        with torch.no_grad():
            model.gx(torch.randn(16, 1, 8, 8))  # initialises ActNorm
        return model.eval()

    return build


def _run_reference(model, x, c):
    t = c[:, 0].sigmoid()
    z = model.gx(x)
    return [z, model.gy_inverse(x), model(x, t=t), model.linear_network.get_lin_t(t)]


# Couplings of a run in both directions; the second of the other masks does not split the features in halves.
UNCONDITIONED = {"alternate": 4, "halves": 2, "gather": 2}

KINDS = {
    **{
        f"normflows {scale_map} {split}": Kind(
            "normflows", _normflows(scale_map, split), _run_normflows, 2, whole=4
        )
        for scale_map in ("exp", "sigmoid", "sigmoid_inv")
        for split in ("channel", "channel_inv")
    },
    "normflows additive": Kind("normflows", _normflows(scale=False), _run_normflows, 2, whole=4),
    **{
        f"normflows masked {masks}": Kind("normflows", _normflows_masked(masks), _run_normflows, 2, whole=whole)
        for masks, whole in UNCONDITIONED.items()
    },
    "normflows masked without scale": Kind(
        "normflows", _normflows_masked("alternate", scale=False), _run_normflows, 2, whole=4
    ),
    "normflows masked softplus": Kind("normflows", _normflows_masked("gather", nn.Softplus), _run_normflows, 2),
    "normflows masked residual": Kind("normflows", _normflows_masked_residual, _run_normflows, 4),
    "normflows glow": Kind("normflows", _glow, _run_normflows, 2, shape=(4, 2, 3)),
    **{
        f"nflows {kind} {masks}": Kind("nflows", _nflows(f"{kind}CouplingTransform", masks), _run_nflows, 2)
        for kind in ("Affine", "Additive")
        for masks in ("alternate", "halves", "gather")
    },
    **{
        f"nflows {kind} MLP {masks}": Kind(
            "nflows", _nflows_mlp(f"{kind}CouplingTransform", masks), _run_nflows_alone, 2, whole=whole
        )
        for kind in ("Affine", "Additive")
        for masks, whole in UNCONDITIONED.items()
    },
    "nflows image": Kind("nflows", _nflows_image, _run_nflows, 2, shape=(4, 2, 3)),
    "glasflow": Kind("glasflow", _glasflow(""), _run_glasflow, 2),
    "glasflow log2 lu": Kind("glasflow", _glasflow("log2", linear_transform="lu"), _run_glasflow, 2),
    "glasflow MLP": Kind("glasflow", _glasflow_mlp, _run_nflows_alone, 2, whole=4),
    "glasflow additive": Kind("glasflow", _glasflow("", volume_preserving=True), _run_glasflow, 2),
    **{
        f"FrEIA {name} {clamp}": Kind("FrEIA", _freia(name, clamp_activation=clamp), _run_freia, 2, whole=whole)
        for name, clamp, whole in (
            ("GLOWCouplingBlock", "ATAN", 4),
            ("GLOWCouplingBlock", "SIGMOID", 0),
            ("GINCouplingBlock", "ATAN", 0),
            ("RNVPCouplingBlock", "TANH", 4),
            ("AffineCouplingOneSided", "ATAN", 4),
        )
    },
    **{
        f"nflows spline {masks}": Kind("nflows", _spline(masks), _run_nflows, 2)
        for masks in ("alternate", "halves", "gather")
    },
    "nflows spline of all features": Kind(
        "nflows", _spline("gather", context=None, apply_unconditional_transform=True), _run_nflows_alone, 2
    ),
    "nflows spline without tails": Kind(
        "nflows",
        _spline("alternate", context=None, tails=None, apply_unconditional_transform=True),
        _run_bounded_alone,
        2,
    ),
    "nflows spline batch norm": Kind(
        "nflows", _spline("halves", net={"use_batch_norm": True, "activation": torch.tanh}), _run_nflows, 2
    ),
    "nflows spline MLP": Kind(
        "nflows", _spline("alternate", build_net=lambda i, o: PassesOn(net(i, o))), _run_nflows_alone, 2
    ),
    "nflows spline image": Kind("nflows", _spline_image, _run_nflows, 2, shape=(4, 2, 3)),
    "glasflow NSF": Kind("glasflow", _glasflow_nsf(linear_transform="lu"), _run_glasflow, 2),
    "glasflow NSF batch norm": Kind(
        "glasflow",
        _glasflow_nsf(batch_norm_within_blocks=True, linear_transform="permutation"),
        _run_glasflow,
        2,
    ),
    "normflows spline": Kind("normflows", _normflows_spline(), _run_normflows, 2),
    "normflows spline circular": Kind(
        "normflows", _normflows_spline(tails="circular", tail_bound=2.0), _run_normflows, 2
    ),
    "normflows circular spline": Kind(
        "normflows",
        _normflows_spline(
            "CircularCoupledRationalQuadraticSpline",
            ind_circ=[0, 3],
            tail_bound=torch.tensor([2.0, 3, 2, 4, 2, 5]),
        ),
        _run_normflows,
        2,
    ),
    "FrEIA NICE": Kind("FrEIA", _freia("NICECouplingBlock"), _run_freia, 2, whole=4),
    "FrEIA NICE image": Kind(
        "FrEIA", _freia("NICECouplingBlock", (5, 2, 2), 2), _run_freia, 2, shape=(5, 2, 2), context=(2, 2, 2)
    ),
    "FrEIA GLOW image": Kind(
        "FrEIA", _freia("GLOWCouplingBlock", (5, 2, 2), 2), _run_freia, 2, shape=(5, 2, 2), context=(2, 2, 2)
    ),
    "FrEIA all in one": Kind("FrEIA", _freia("AllInOneBlock"), _run_freia, 2, whole=4),
    "FrEIA all in one conditional": Kind("FrEIA", _freia("AllInOneBlock", context=CONTEXT), _run_freia, 2),
    "FrEIA all in one image": Kind(
        "FrEIA",
        _freia("AllInOneBlock", (5, 2, 2), 0, reverse_permutation=True, gin_block=True),
        _run_freia,
        2,
        shape=(5, 2, 2),
    ),
    **{
        f"FrEIA all in one {name}": Kind("FrEIA", _freia("AllInOneBlock", **options), _run_freia, 2, whole=whole)
        for name, whole, options in (
            ("soft", 4, {"permute_soft": True}),
            ("soft reverse", 4, {"permute_soft": True, "reverse_permutation": True}),
            ("soft GIN", 0, {"permute_soft": True, "gin_block": True}),
            ("learned", 4, {"learned_householder_permutation": 2, "global_affine_type": "EXP"}),
            ("learned reverse", 4, {"learned_householder_permutation": 1, "reverse_permutation": True}),
        )
    },
    "FrEIA all in one soft conditional": Kind(
        "FrEIA",
        _freia("AllInOneBlock", context=CONTEXT, permute_soft=True, reverse_permutation=True),
        _run_freia,
        2,
    ),
    "FrEIA all in one learned image": Kind(
        "FrEIA",
        _freia("AllInOneBlock", (4, 2, 2), learned_householder_permutation=2, reverse_permutation=True),
        _run_freia,
        2,
        shape=(4, 2, 2),
    ),
    "zuko": Kind("zuko", _zuko(), _run_zuko, 2),
    "zuko alone": Kind("zuko", _zuko(0), _run_zuko, 2, whole=10, calls=5),
    "zuko NICE": Kind("zuko", _zuko(0, "NICE"), _run_zuko, 2, whole=10, calls=5),
    "zuko random masks": Kind("zuko", _zuko(0, randmask=True), _run_zuko, 2, whole=10, calls=5),
    "memcnn sigmoid": Kind("memcnn", _memcnn("AffineCoupling", "AffineAdapterSigmoid"), _run_memcnn, 2, whole=4),
    "memcnn naive": Kind("memcnn", _memcnn("AffineCoupling", "AffineAdapterNaive"), _run_memcnn, 2, whole=4),
    "memcnn additive": Kind("memcnn", _memcnn("AdditiveCoupling"), _run_memcnn, 2, whole=4),
    "reference": Kind("reference", reference(1), _run_reference, 19, shape=(1, 8, 8)),
}

# Masked autoregressive transforms, whose inverse is one walk


def _masked(name: str, package: str = "nflows", **options):
    def build():
        transforms = require(f"{package}.transforms.autoregressive")
        return getattr(transforms, f"Masked{name}AutoregressiveTransform")(
            **{"features": FEATURES, "hidden_features": 16, **options}
        ).eval()

    return build


def _normflows_autoregressive(name: str, **options):
    def build():
        flows = require("normflows").flows
        where = flows.neural_spline.autoregressive if "Piecewise" in name else flows
        made = getattr(where, name)(**{"features": FEATURES, "hidden_features": 16, **options})
        return made.eval()

    return build


def _normflows_wrapper():
    flows = require("normflows").flows
    return flows.AutoregressiveRationalQuadraticSpline(FEATURES, 2, 16, CONTEXT, permute_mask=True).eval()


def _run_bounded(model, x, c):
    return _run_nflows(model, x.sigmoid(), c)


_OF_CONTEXT, _FEEDFORWARD = {"context_features": CONTEXT}, {"use_residual_blocks": False}
AUTOREGRESSIVE = {
    name: Kind(name.split()[0], build, run, 1)
    for name, build, run in (
        ("nflows", _masked("Affine", activation=torch.tanh, **_FEEDFORWARD, **_OF_CONTEXT), _run_nflows),
        ("nflows residual", _masked("Affine", **_OF_CONTEXT), _run_nflows),
        ("nflows random masks", _masked("Affine", random_mask=True, **_FEEDFORWARD), _run_nflows_alone),
        ("nflows batch norm", _masked("Affine", use_batch_norm=True, **_FEEDFORWARD), _run_nflows_alone),
        ("nflows residual batch norm", _masked("Affine", use_batch_norm=True, **_OF_CONTEXT), _run_nflows),
        (
            "nflows leaky relu",
            _masked("Affine", activation=torch.nn.functional.leaky_relu, num_blocks=1, dropout_probability=0.3),
            _run_nflows_alone,
        ),
        ("nflows no block", _masked("Affine", num_blocks=0, **_FEEDFORWARD), _run_nflows_alone),
        (
            "nflows rational-quadratic spline",
            _masked("PiecewiseRationalQuadratic", tails="linear", tail_bound=2.0, **_OF_CONTEXT),
            _run_nflows,
        ),
        ("nflows spline without tails", _masked("PiecewiseRationalQuadratic", **_OF_CONTEXT), _run_bounded),
        ("nflows linear spline", _masked("PiecewiseLinear", num_bins=5, **_OF_CONTEXT), _run_bounded),
        ("nflows quadratic spline", _masked("PiecewiseQuadratic", tails="linear", **_OF_CONTEXT), _run_nflows),
        ("nflows cubic spline", _masked("PiecewiseCubic", num_bins=5, **_OF_CONTEXT), _run_bounded),
        ("glasflow", _masked("Affine", "glasflow.nflows", activation=torch.nn.SiLU(), **_OF_CONTEXT), _run_nflows),
        (
            "glasflow own scale",
            _masked("Affine", "glasflow.nflows", scale_activation=lambda raw: 1 + raw.tanh() / 2, **_OF_CONTEXT),
            _run_nflows,
        ),
        (
            "glasflow spline",
            _masked("PiecewiseRationalQuadratic", "glasflow.nflows", tails="linear", **_OF_CONTEXT),
            _run_nflows,
        ),
        ("normflows", _normflows_autoregressive("MaskedAffineAutoregressive", **_FEEDFORWARD), _run_nflows_alone),
        (
            "normflows residual",
            _normflows_autoregressive("MaskedAffineAutoregressive", activation=nn.GELU(), **_OF_CONTEXT),
            _run_nflows,
        ),
        (
            "normflows batch norm",
            _normflows_autoregressive("MaskedAffineAutoregressive", use_batch_norm=True, **_FEEDFORWARD),
            _run_nflows_alone,
        ),
        (
            "normflows circular spline",
            _normflows_autoregressive(
                "MaskedPiecewiseRationalQuadraticAutoregressive", tails="circular", permute_mask=True, **_OF_CONTEXT
            ),
            _run_nflows,
        ),
        ("normflows spline", _normflows_wrapper, _run_nflows),
    )
}

# Every library, scale map, mask and shape is in at least one of these; the others are other combinations.
SOME = {
    "normflows exp channel",
    "normflows sigmoid channel_inv",
    "normflows sigmoid_inv channel",
    "normflows additive",
    "normflows masked alternate",
    "normflows masked gather",
    "normflows masked without scale",
    "normflows masked residual",
    "normflows glow",
    "nflows Affine alternate",
    "nflows Additive gather",
    "nflows Affine MLP halves",
    "nflows Additive MLP gather",
    "nflows image",
    "glasflow log2 lu",
    "glasflow MLP",
    "nflows spline alternate",
    "nflows spline of all features",
    "nflows spline without tails",
    "nflows spline image",
    "glasflow NSF batch norm",
    "normflows spline circular",
    "normflows circular spline",
    "FrEIA GLOWCouplingBlock SIGMOID",
    "FrEIA RNVPCouplingBlock TANH",
    "FrEIA AffineCouplingOneSided ATAN",
    "FrEIA NICE",
    "FrEIA GLOW image",
    "FrEIA all in one",
    "FrEIA all in one conditional",
    "FrEIA GINCouplingBlock ATAN",
    "FrEIA all in one soft reverse",
    "FrEIA all in one soft GIN",
    "FrEIA all in one soft conditional",
    "FrEIA all in one learned",
    "FrEIA all in one learned image",
    "zuko",
    "zuko NICE",
    "zuko random masks",
    "memcnn sigmoid",
    "memcnn naive",
    "memcnn additive",
    "reference",
}
assert KINDS.keys() >= SOME


def sweep(names: Iterable[str], now: Collection[str] = SOME) -> list:
    """These kinds as parameters of a test; those that are not in ``now`` run in the long set."""
    return [pytest.param(name, marks=() if name in now else pytest.mark.long) for name in names]


# (train, steps) of the reference's training.
TRAINED = [
    pytest.param(True, 6, id="dropout, six steps"),
    pytest.param(False, 20, id="no dropout", marks=pytest.mark.long),
]
