"""The report counts the learned layers of known libraries for which linfast has no formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import linfast as lf
from linfast.accelerate.adapter import ADAPTERS

from .zoo import FEATURES, KINDS, net, require


def _nflows(library="nflows"):
    transforms, nets = require(f"{library}.transforms"), require(f"{library}.nn.nets")

    def resnet(n_in, n_out):
        return nets.ResidualNet(n_in, n_out, hidden_features=8)

    mask, spline = torch.arange(FEATURES) % 2, transforms.PiecewiseQuadraticCouplingTransform
    shared = spline(mask, resnet)
    return transforms.CompositeTransform(
        [
            shared,
            transforms.InverseTransform(spline(mask, resnet, tails="linear", apply_unconditional_transform=True)),
            transforms.CompositeCDFTransform(transforms.Sigmoid(), transforms.PiecewiseLinearCDF([FEATURES])),
            transforms.Sigmoid(learn_temperature=True),
            transforms.BatchNorm(FEATURES),
            transforms.ActNorm(FEATURES),
            transforms.LULinear(FEATURES),
            transforms.ReversePermutation(FEATURES),
            transforms.AffineCouplingTransform(mask, resnet),
            shared,
        ]
    )


def _glasflow():
    require("glasflow")
    return _nflows("glasflow.nflows")


def _of_nflows(library):
    return {f"{library} PiecewiseQuadraticCouplingTransform": 2, f"{library} PiecewiseLinearCDF": 1}


def _normflows():
    nf = require("normflows")
    flows = nf.flows
    return nf.NormalizingFlow(
        nf.distributions.DiagGaussian(FEATURES),
        [
            *(flows.Planar((FEATURES,)) for _ in range(8)),
            flows.Reverse(flows.Radial((FEATURES,))),
            flows.Residual(nf.nets.LipschitzMLP([FEATURES, 8, FEATURES])),
            flows.CoupledRationalQuadraticSpline(FEATURES, 1, 8),
            flows.AffineCouplingBlock(net(FEATURES // 2, FEATURES)),
            flows.ActNorm(FEATURES),
            flows.LULinearPermute(FEATURES),
            flows.Permute(FEATURES),
        ],
    )


def _normflows_autoregressive():
    """Two classes that only run a masked autoregressive transform, which has an adapter."""
    flows = require("normflows").flows
    kinds = flows.AutoregressiveRationalQuadraticSpline, flows.CircularAutoregressiveRationalQuadraticSpline
    return nn.ModuleList([kinds[0](FEATURES, 1, 8), kinds[1](FEATURES, 1, 8, [0])])


def _normflows_image():
    nf = require("normflows")
    parts = [nf.flows.Split("channel"), nf.flows.AffineCoupling(net(2, 4)), nf.flows.Merge("channel")]
    return nn.ModuleList([nf.flows.GlowBlock(4, 8), nf.flows.Composite(parts)])


def _freia():
    frames, modules = require("FrEIA.framework"), require("FrEIA.modules")
    inn = frames.SequenceINN(FEATURES)
    for name in ("GINCouplingBlock", "GLOWCouplingBlock"):
        inn.append(getattr(modules, name), subnet_constructor=net)
    passed_by = "ActNorm", "PermuteRandom", "OrthogonalTransform", "InvertibleSigmoid"
    for name in ("IResNetLayer", *passed_by, "IResNetLayer"):
        inn.append(getattr(modules, name))
    return inn


def _freia_splines():
    """FrEIA's releases have no splines yet; the class stands in for the one of its repository."""

    def init(self, dims_in):
        base.__init__(self, dims_in)
        self.net = net(2, 4)

    base = require("FrEIA.modules").InvertibleModule
    names = {"__init__": init, "__module__": "FrEIA.modules.splines.rational_quadratic"}
    spline = type("RationalQuadraticSpline", (base,), names)
    return nn.Sequential(spline([(4,)]), spline([(4,)]))


def _zuko(name):
    return lambda: getattr(require("zuko").flows, name)(FEATURES, 2, transforms=3)


MODELS = {
    "nflows": (_nflows, _of_nflows("nflows")),
    "glasflow": (_glasflow, _of_nflows("glasflow")),
    "normflows": (
        _normflows,
        {
            "normflows Planar": 8,
            "normflows Radial": 1,
            "normflows Residual": 1,
        },
    ),
    "normflows image": (_normflows_image, {"normflows AffineCoupling": 1}),
    "FrEIA": (_freia, {"FrEIA IResNetLayer": 2}),
    "FrEIA splines": (_freia_splines, {"FrEIA RationalQuadraticSpline": 2}),
    "zuko NSF": (_zuko("NSF"), {}),
    "normflows autoregressive": (_normflows_autoregressive, {}),
    "zuko GF": (_zuko("GF"), {"zuko ElementWiseTransform": 3}),
    "zuko NICE": (_zuko("NICE"), {}),
    "memcnn": (KINDS["memcnn sigmoid"].build, {}),
}


@pytest.mark.parametrize("memory", ["store", "invert"])
@pytest.mark.parametrize("name", MODELS)
def test_layers_without_a_formula_are_counted(name, memory):
    build, expected = MODELS[name]
    model = build()
    for _ in range(2):  # a second call starts from the originals
        report = lf.accelerate(model, memory=memory)
        assert dict(report.unknown) == expected
        assert "no module of a known library" not in str(report)
        kinds = ", ".join(f"{count} {kind}" for kind, count in report.unknown)
        assert str(report).endswith(f"no formula for them: {kinds}" if expected else "recognised modules swapped")


def test_known_and_unknown_kinds_share_a_report():
    report = lf.accelerate(_normflows(), precision="high")
    lines = str(report).splitlines()
    assert [row.was for row in report.swapped] == [
        "normflows PiecewiseRationalQuadraticCoupling",
        "normflows AffineCouplingBlock",
    ]
    assert lines[-3] == "2 of 2 recognised modules swapped"
    assert lines[-2].startswith("precision 'high' reaches")
    assert "no formula for them: 8 normflows Planar, 1 normflows Radial" in lines[-1]


def test_a_report_without_rows_has_no_table():
    flow = require("normflows").flows.Planar((FEATURES,))
    text = "left alone, because linfast has no formula for them: 1 normflows Planar"
    assert str(lf.accelerate(flow)) == str(lf.accelerate(flow, precision="high")) == text


def test_classes_that_the_library_does_not_define_are_not_counted():
    flows = require("normflows").flows

    class Own(flows.Flow):
        def __init__(self):
            super().__init__()
            self.inner = flows.Planar((FEATURES,))

    class Derived(flows.AffineCouplingBlock):
        pass

    report = lf.accelerate(nn.Sequential(Own(), Derived(net(FEATURES // 2, FEATURES))))
    assert report.unknown == (("normflows Planar", 1),)
    assert [row.was for row in report.left] == ["Derived"]


def test_a_kind_with_an_adapter_has_a_row(monkeypatch):
    flow, where = require("normflows").flows.Planar((FEATURES,)), "normflows.flows.planar"
    coupling = ADAPTERS["normflows.flows.affine.coupling", "AffineCouplingBlock"]
    monkeypatch.setitem(ADAPTERS, (where, "Planar"), replace(coupling, where=where, name="Planar"))
    report = lf.accelerate(flow)
    assert [row.was for row in report.left] == ["normflows Planar"]
    assert not report.unknown
