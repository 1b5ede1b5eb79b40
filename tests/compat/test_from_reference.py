"""from_reference: the research repository's image models, built by a stand-in, give the same results in linfast."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import linfast as lf
from linfast.flows import Flow
from tests.compat import image_stand_in as reference
from tests.kept import kept_bytes
from tests.laws.zoo import relative
from tests.marks import long

SMALL = {"width": 4, "num_blocks": 1, "attention": (4,)}


def _model(channels: int, side: int, layers: int = 1, **options: object) -> reference.OneStepLinearizer:
    g = reference.InverseUnet(layers, channels, side, **options)
    A = reference.TimeDependentLoRALinearLayer(channels * side**2, 3, 16)
    f = reference.OneStepLinearizer(g, A)
    f.gx(torch.randn(4, channels, side, side))  # initialises the ActNorms
    return f.eval()


def _results(f: nn.Module, x: Tensor, t: Tensor) -> dict[str, Tensor]:
    return {
        "f": f(x, t=t),
        "gx": f.gx(x),
        "gy": f.gy(x),
        "gx_inverse": f.gx_inverse(x),
        "gy_inverse": f.gy_inverse(x),
        "A": f.A(x, t=t),
    }


@pytest.mark.parametrize(("channels", "side", "layers"), [(1, 32, 2), (3, 32, 1), *long((3, 64, 2))])
def test_mnist_and_celeba_configurations_in_fp32(channels: int, side: int, layers: int) -> None:
    f = _model(channels, side, layers)
    x, t = torch.randn(1, channels, side, side), torch.rand(1)
    with torch.no_grad():
        got = _results(lf.from_reference(f), x, t)
        truth = _results(f.double(), x.double(), t.double())
    for name, value in truth.items():
        roundings = 512 if name in ("f", "A") else 64  # a random A may remove most of its input
        assert relative(got[name], value) <= roundings * 2**-24, name


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("actnorm", [False, True])
def test_every_method_in_fp64(channels: int, actnorm: bool) -> None:
    f = _model(channels, 8, **SMALL, actnorm=actnorm).double()
    x, t = torch.randn(2, channels, 8, 8).double(), torch.rand(2).double()
    h = lf.from_reference(f)
    got = _results(h, x, t)
    for name, value in _results(f, x, t).items():
        assert relative(got[name], value) <= 1e-12, name
    assert relative(h.gx_inverse(h.gx(x)), x) <= 1e-10


def test_gradients_and_training_with_the_same_seed() -> None:
    f = _model(1, 8, **SMALL).double().train()
    h, x, t = lf.from_reference(f), torch.randn(2, 1, 8, 8).double(), torch.rand(2).double()
    assert h.training
    found = []
    for model in (f, h):
        torch.manual_seed(5)
        given = x.clone().requires_grad_()
        loss = (model(given, t=t) - 1).square().mean() + model.gx(given).square().mean()
        loss.backward()
        found.append((loss, given.grad))
    for value, truth in zip(found[1], found[0], strict=True):
        assert relative(value, truth) <= 1e-10
    block, layers = f.net_gx.g.blocks[1], h.g_x.bijection.bijections[5:9]
    pairs = [
        (layers[0].log_scale, block.actnorm.log_scale),
        (layers[1].conditioner.stem.weight, block.F.cond.net.enc["4x4_conv"].weight),
        (layers[2].conditioner.head.weight, block.G.cond.net.dec["4x4_aux_conv"].weight),
        (layers[3].weight, block.mix.W),
        (h.A.u_net.layers[1].weight, f.linear_network.lin2[3].weight),
    ]
    for mine, theirs in pairs:
        assert relative(mine.grad.flatten(), theirs.grad.flatten()) <= 1e-9


def test_training_by_inversion_with_the_same_seed() -> None:
    f, x, found, kept = _model(1, 8, **SMALL).double().train(), torch.randn(2, 1, 8, 8).double(), [], []
    for memory in ("store", "invert"):
        h = lf.from_reference(f, memory=memory)
        assert h.g_x.bijection.memory == h.g_y.bijection.memory == memory
        torch.manual_seed(5)
        given = x.clone().requires_grad_()
        kept.append(kept_bytes(lambda h=h, x=given: h.gx(x)))
        torch.manual_seed(5)
        h.gx(given).square().mean().backward()
        found.append(torch.cat([t.grad.flatten() for t in (given, *h.g_x.parameters())]))
    assert relative(found[1], found[0]) <= 1e-10
    assert kept[1] < kept[0] / 4
    with pytest.raises(ValueError, match="memory must be one of store, invert, auto; got 'no'"):
        lf.from_reference(f, memory="no")


def test_the_model_is_unchanged_and_shares_nothing() -> None:
    f = _model(1, 8, **SMALL)
    before = copy.deepcopy(f.state_dict())
    h = lf.from_reference(f)
    with torch.no_grad():
        for parameter in h.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[key]) for key, value in f.state_dict().items())
    assert not h.training


def test_loaded_actnorms_are_not_initialised_again() -> None:
    f = _model(1, 8, **SMALL)
    loaded = reference.OneStepLinearizer(
        reference.InverseUnet(1, 1, 8, **SMALL), reference.TimeDependentLoRALinearLayer(64, 3, 16)
    ).eval()
    loaded.load_state_dict(f.state_dict())
    x = 3 + torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        assert relative(lf.from_reference(loaded).gx(x), f.gx(x)) <= 1e-5
        assert relative(loaded.gx(x), f.gx(x)) > 0.1  # the original is

    new = lf.from_reference(reference.OneStepLinearizer(reference.InverseUnet(1, 1, 8, **SMALL), f.linear_network))
    assert not new.g_x.bijection.bijections[1].initialized
    z = new.train().gx(x)
    assert bool(new.g_x.bijection.bijections[1].initialized)
    assert torch.isfinite(z).all()


def test_separate_g_and_a_shared_one() -> None:
    gx, gy = (reference.InverseUnet(1, 1, 8, **SMALL) for _ in range(2))
    f = reference.OneStepLinearizer(gx, reference.TimeDependentLoRALinearLayer(64, 3, 16), gy).eval()
    x = torch.randn(4, 1, 8, 8)
    f.gx(x), f.gy(x)
    h = lf.from_reference(f)
    assert h.g_x.bijection is not h.g_y.bijection
    with torch.no_grad():
        assert relative(h.gy(x), f.gy(x)) <= 1e-5
    shared = lf.from_reference(_model(1, 8, **SMALL))
    assert shared.g_x.bijection is shared.g_y.bijection
    assert (shared.g_x.context, shared.g_y.context) == ({"t": 1.0}, {"t": 0.0})


def test_style_model() -> None:
    f = reference.OneStepLinearizer(reference.InverseUnet(1, 3, 8, **SMALL), reference.LinearKernel()).double()
    f.gx(torch.randn(4, 3, 8, 8).double())
    f.eval()
    x, t = torch.randn(2, 3, 8, 8).double(), torch.tensor([0.0, 2.0]).double()
    h = lf.from_reference(f)
    got = _results(h, x, t)
    for name, value in _results(f, x, t).items():
        assert relative(got[name], value) <= 1e-12, name
    assert isinstance(h.at(2.0).A, lf.DepthwiseConv)
    assert relative(h(x, t=2.0)[1], h(x, t=t)[1]) <= 1e-12


def test_the_result_is_saved_samples_and_is_one_flat_flow(tmp_path) -> None:
    h = lf.from_reference(_model(1, 8, **SMALL))
    lf.save(h, tmp_path / "f.safetensors")
    x, t = torch.randn(2, 1, 8, 8), torch.rand(2)
    assert torch.equal(lf.load(tmp_path / "f.safetensors").eval()(x, t=t), h(x, t=t))
    assert isinstance(h.g_x.bijection, Flow)  # consecutive layers of it fold where kernels run
    names = [type(layer).__name__ for layer in h.g_x.bijection.bijections]
    block = ["ActNorm", "AffineCoupling", "AffineCoupling", "Mix"]
    assert names == ["Squeeze", *block, *block, "Inverse"]
    many = lf.sample(h, x, steps=10, one_step=False)
    assert relative(lf.sample(h, x, steps=10), many) <= 1e-3


def _net(f: nn.Module) -> nn.Module:
    return f.net_gx.g.blocks[0].F.cond.net


def _set(path: str, value: object):
    def change(f: nn.Module) -> None:
        owner, _, name = path.rpartition(".")
        setattr(_net(f).get_submodule(owner), name, value)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("map_label", nn.Linear(2, 2)), "class labels"),
        (_set("map_augment", nn.Linear(2, 2)), "augmentation labels"),
        (_set("map_noise.endpoint", False), "positional with its end point"),
        (_set("map_noise.max_positions", 1000), "positional with its end point"),
        (_set("enc.4x4_block0.adaptive_scale", True), "adaptive scale"),
        (_set("enc.4x4_block0.num_heads", 2), "several attention heads"),
        (_set("dec.4x4_block0.skip_scale", 1.0), r"skip scale that is not sqrt\(1/2\)"),
        (_set("enc.2x2_down.conv0.resample_filter", torch.ones(1, 1, 4, 4)), r"filter that is not \[1, 1\]"),
        (lambda f: _net(f).enc.update({"2x2_aux_skip": nn.Identity()}), "skip or residual encoders"),
        (_set("enc.4x4_block0.norm1.eps", 1e-5), "other groups or another epsilon in a norm"),
        (_set("dec.4x4_aux_norm.eps", 1e-5), "another epsilon in its last norm"),
        (_set("dec.4x4_block0.num_heads", 1), "blocks are not those of a UNet"),
    ],
)
def test_options_without_a_counterpart_are_named(change, message: str) -> None:
    f = _model(1, 8, **SMALL)
    change(f)
    with pytest.raises(ValueError, match=message):
        lf.from_reference(f)


def test_other_parts_are_named() -> None:
    f = _model(1, 8, **SMALL)
    with pytest.raises(TypeError, match="net_gx, net_gy and linear_network; net_gx is missing"):
        lf.from_reference(nn.Identity())
    with pytest.raises(TypeError, match=r"linear_network must be .* got Linear"):
        lf.from_reference(reference.OneStepLinearizer(f.net_gx, nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="net_gx must be an InverseUnet; got Identity"):
        lf.from_reference(reference.OneStepLinearizer(nn.Identity(), f.linear_network))
    with pytest.raises(TypeError, match="net_gy must be an InverseUnet; got Identity"):
        lf.from_reference(reference.OneStepLinearizer(f.net_gx, f.linear_network, nn.Identity()))
    f.net_gx.g.blocks[1].G.cond.net = nn.Identity()
    with pytest.raises(TypeError, match="must wrap a SongUNet; got Identity"):
        lf.from_reference(f)
