"""UNet gives the results of its plain form, with any strides, with and without time, and as a conditioner."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import linfast as lf
from linfast.compat.unet_weights import unet_from_reference
from linfast.flows.unet_blocks import ResidualBlock
from tests.compat.image_stand_in import SongUNet
from tests.laws.zoo import perturb, relative
from tests.ops.budget import hostile

TOPOLOGIES = {
    "paper": {"res": 16},
    "three levels": {"res": 8, "channel_mult": (1, 2, 2), "attention": (4,), "width": 8},
    "no attention but the middle": {"res": 8, "attention": (), "width": 4},
    "attention at every level": {"res": 8, "attention": (8, 4), "width": 4, "num_blocks": 1},
    "one level": {"res": 4, "channel_mult": (1,), "width": 4, "num_blocks": 3},
    "a wide first level": {"res": 4, "channel_mult": (2, 1), "width": 4, "num_blocks": 1},
}


def _plain(name: str) -> SongUNet:
    return SongUNet(2, 3, **TOPOLOGIES[name]).double().eval()


def _unet(**options: object) -> lf.UNet:
    defaults = {"resolution": 4, "width": 4, "blocks": 1, "attention_resolutions": (4,), "time_features": 8}
    return perturb(lf.UNet(2, 3, **{**defaults, **options})).double()  # type: ignore[arg-type, return-value]


def _x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (3, 2, 4, 4)), dtype=torch.float64)


@pytest.mark.parametrize("name", TOPOLOGIES)
@pytest.mark.parametrize("training", [False, True])
def test_it_is_the_network_of_the_plain_form(name: str, training: bool) -> None:
    plain = _plain(name).train(training)
    unet, side, t = unet_from_reference(plain).double().train(training), TOPOLOGIES[name]["res"], _x(2)
    results = []
    for network in (plain, unet):
        torch.manual_seed(3)  # the same dropout masks
        x = torch.ones(2, 2, side, side, dtype=torch.float64).cumsum(3).cos().requires_grad_()
        y = network(x, t)
        results.append((y, *torch.autograd.grad(y, x, torch.linspace(0, 1, y.numel()).view_as(y).double())))
    for value, truth in zip(results[1], results[0], strict=True):
        assert relative(value, truth) <= 1e-13


@pytest.mark.parametrize(("time_features", "context_features"), [(0, 4), (0, 3), (4, 3)])
def test_a_context_joins_the_embedding_of_the_time(time_features: int, context_features: int) -> None:
    plain, x, t, context = _plain("one level"), _x(3, 2, 4, 4), _x(3), _x(3, context_features)
    unet = unet_from_reference(plain)
    own = lf.UNet(
        *(2, 3, 4, 4, (1,), 3, (16,), 0.1),
        time_features=time_features,
        context_features=context_features,
    ).double()
    weights = unet.state_dict()
    weights["time.1.weight"] = _x(16, time_features + context_features)
    own.load_state_dict(weights)
    plain.map_layer0.weight = torch.nn.Parameter(weights["time.1.weight"])
    plain.map_noise.register_forward_hook(lambda _, t, e: torch.cat((e[:, :time_features], context), 1))
    found = own.eval()(x, t if time_features else None, context)
    assert relative(found, plain(x, t)) <= 1e-13


def test_every_parameter_has_the_gradient_of_the_plain_form() -> None:
    plain = _plain("three levels")
    unet, x, t, s = unet_from_reference(plain).double().eval(), _x(2, 2, 8, 8), _x(2), 0.5**0.5
    for network in (plain, unet):
        network(x, t).square().sum().backward()
    assert all(p.grad is not None for p in unet.parameters())
    block, own = plain.dec["8x8_block2"], unet.decoder[-1]
    shifts = unet.time[-1]
    pairs = [
        (unet.stem.weight, plain.enc["8x8_conv"].weight, 1),
        (unet.head.bias, plain.dec["8x8_aux_conv"].bias, 1),
        (unet.time[1].weight, plain.map_layer0.weight, 1),
        (unet.time[3].bias, plain.map_layer1.bias, 1),
        (own.norm0.weight, block.norm0.weight, 1),
        (own.conv0.weight, block.conv0.weight, 1),
        (own.norm1.bias, block.norm1.bias, 1),
        (own.conv1.weight, block.conv1.weight, s),
        (own.skip.weight, block.skip.weight, s),
        (unet.decoder[0].attention.out.weight, plain.dec["2x2_in0"].proj.weight, s),
    ]
    for mine, theirs, scale in pairs:
        assert relative(scale * mine.grad.flatten(), theirs.grad.flatten()) <= 1e-11
    assert relative(shifts.bias.grad[-8:], block.conv0.bias.grad) <= 1e-11
    assert relative(shifts.weight.grad[-8:], block.affine.weight.grad) <= 1e-11


def test_strides_of_x_do_not_matter_and_y_is_nchw_on_a_cpu() -> None:
    unet, x = _unet().eval(), _x()
    for name, laid_out in hostile(x).items():
        expected = unet(x[:1].expand(x.shape).contiguous() if name == "expanded" else x, t=0.3)
        got = unet(laid_out, t=0.3)
        assert relative(got, expected) <= 1e-13, name
        assert got.is_contiguous(), name


def _keep_in_nchw(nchw: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose the memory format of a CPU, or that of a GPU."""
    for module in ("unet", "unet_blocks"):
        monkeypatch.setattr(f"linfast.flows.{module}.in_nchw", lambda x: nchw)


@pytest.mark.parametrize("nchw", [True, False])
def test_activations_stay_in_one_layout(nchw: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    unet, seen = lf.UNet(2, 2, 4, width=8, blocks=1), []
    for module in unet.modules():
        if isinstance(module, (ResidualBlock, torch.nn.Conv2d)):
            module.register_forward_hook(lambda module, given, y: seen.append((*given, y)))
    if not nchw:
        _keep_in_nchw(False, monkeypatch)
    unet(torch.randn(2, 2, 4, 4))
    given = [value for values in seen for value in values if isinstance(value, Tensor) and value.ndim == 4]
    inner = [value for value in given if value.shape[1] >= 8]
    assert len(inner) > 20
    layout = torch.contiguous_format if nchw else torch.channels_last
    assert all(value.is_contiguous(memory_format=layout) for value in inner)


def test_weights_are_laid_out_for_their_device(tmp_path) -> None:
    unet = lf.UNet(1, 2, 4, width=8, blocks=1)
    lf.save(unet, tmp_path / "unet.safetensors")
    for network in (unet, lf.load(tmp_path / "unet.safetensors"), unet.to(memory_format=torch.channels_last)):
        kernels = [p for p in network.parameters() if p.ndim == 4]
        assert all(kernel.is_contiguous() for kernel in kernels)
    for network in (unet.to("meta"), torch.nn.Sequential(lf.UNet(1, 2, 4)).to("meta")):
        kernels = [p for p in network.parameters() if p.ndim == 4]
        assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_both_layouts_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unet, side = unet_from_reference(_plain(name)).double().train(), TOPOLOGIES[name]["res"]
    x, t, results = _x(2, 2, side, side).requires_grad_(), _x(2), []
    for nchw in (True, False):
        _keep_in_nchw(nchw, monkeypatch)
        torch.manual_seed(3)
        y = unet(x, t)
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, *unet.parameters()))])
    assert not results[1][0].is_contiguous()
    for value, truth in zip(results[1], results[0], strict=True):
        assert relative(value, truth) <= 1e-11


def test_ways_to_give_a_time() -> None:
    unet, x = _unet().eval(), _x()
    expected = unet(x, t=0.3)
    for t in (torch.tensor(0.3, dtype=torch.float64), torch.full((3,), 0.3, dtype=torch.float64)):
        assert relative(unet(x, t=t), expected) <= 1e-13
    times = torch.tensor([0.3, 0.9, 0.0], dtype=torch.float64)
    together = unet(x, t=times)
    for i, t in enumerate(times):
        assert relative(unet(x[i : i + 1], t=t[None]), together[i : i + 1]) <= 1e-13
        assert relative(unet(x[i : i + 1], t=float(t)), together[i : i + 1]) <= 1e-13
    assert relative(together[1], expected[1]) > 1e-4
    assert unet(x[:0], t=times[:0]).shape == (0, 3, 4, 4)
    assert unet(x[:0], t=1.0).shape == (0, 3, 4, 4)


def test_without_time_it_has_biases_instead() -> None:
    unet = _unet(time_features=0).eval()
    assert unet.encoder[0].conv0.bias is not None
    assert _unet().encoder[0].conv0.bias is None
    x = _x()
    before = unet(x)
    with torch.no_grad():
        unet.encoder[0].conv0.bias[0].add_(1.0)
    assert relative(unet(x), before) > 1e-4


def test_a_new_unet_gives_zero_and_keeps_other_sizes() -> None:
    unet = lf.UNet(2, 3, 4, width=4).eval()
    assert unet(torch.randn(2, 2, 6, 8)).shape == (2, 3, 6, 8)
    assert not unet(torch.randn(2, 2, 6, 8)).any()


def test_dropout_is_random_in_training_only_and_replays() -> None:
    for nchw in (False, True):
        unet, x = _unet(dropout=0.5, nchw_dropout=nchw), _x()
        torch.manual_seed(1)
        first = unet(x, t=0.0)
        assert relative(unet(x, t=0.0), first) > 1e-3
        torch.manual_seed(1)
        assert torch.equal(unet(x, t=0.0), first)
        unet.eval()
        assert torch.equal(unet(x, t=0.0), unet(x, t=0.0))


def _flow() -> lf.Flow:
    def unet() -> lf.UNet:
        return lf.UNet(2, 4, 4, 4, blocks=1, attention_resolutions=(4,), dropout=0.1, time_features=8)

    layers = [lf.AffineCoupling(unet(), 4), lf.AffineCoupling(unet(), 4, "second"), lf.Mix(4)]
    return perturb(lf.Flow(layers, shape=(4, 4, 4)), 0.2).double().eval()  # type: ignore[return-value]


def test_as_a_conditioner_the_flow_inverts_and_knows_its_log_det() -> None:
    g, x = _flow(), _x(2, 4, 4, 4)
    z, log_det = g.forward_and_log_det(x, t=0.4)
    assert relative(z, x) > 1e-2
    assert relative(g.inverse(z, t=0.4), x) <= 1e-12
    jacobian = torch.func.jacrev(lambda v: g(v.view(1, 4, 4, 4), t=0.4).flatten())(x[0].flatten())
    assert abs(torch.linalg.slogdet(jacobian).logabsdet - log_det[0]) <= 1e-10


def test_image_flow_builds_unets() -> None:
    options = {"channel_mult": (1, 2), "blocks": 1, "attention_resolutions": (8,), "dropout": 0.3}
    g = lf.image_flow(3, 16, 3, 8, conditioner="unet", unet_options=options, time_features=8)
    unets = [layer.conditioner for layer in g.bijections if isinstance(layer, lf.AffineCoupling)]
    assert len(unets) == 3
    for unet in unets:
        assert isinstance(unet, lf.UNet)
        assert (unet.channels_in, unet.channels_out, unet.resolution, unet.width) == (6, 12, 8, 8)  # squeezed
        assert {name: getattr(unet, name) for name in options} == options
        assert unet.time_features == 8
    even = lf.image_flow(2, (4, 8), 1, conditioner="unet").bijections[0].conditioner
    assert (even.channels_in, even.channels_out, even.resolution, even.width) == (1, 2, 4, 16)
    assert (even.dropout, even.time_features, even.blocks) == (0.1, 0, 2)


def test_first_and_second_derivatives() -> None:
    unet, x = _unet(time_features=0, dropout=0.0), _x(1, 2, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(unet, (x,))
    assert torch.autograd.gradgradcheck(unet, (x,))


@pytest.mark.parametrize("context", [None, _x(1, 2), _x(3, 2)], ids=["time", "one context", "contexts"])
def test_it_compiles_whole(context: Tensor | None) -> None:
    unet, x = _unet(channel_mult=(1,), context_features=0 if context is None else 2).eval(), _x()
    torch.compiler.reset()
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    assert relative(compiled(x, 0.3, context), unet(x, 0.3, context)) <= 1e-13


def test_it_is_saved_and_loaded(tmp_path) -> None:
    g, x = _flow(), _x(2, 4, 4, 4)
    lf.save(g, tmp_path / "g.safetensors")
    h = lf.load(tmp_path / "g.safetensors").eval()
    assert torch.equal(h(x, t=0.4), g(x, t=0.4))
    for name in ("channel_mult", "attention_resolutions", "dropout", "nchw_dropout", "resolution"):
        assert getattr(h.bijections[0].conditioner, name) == getattr(g.bijections[0].conditioner, name)


def test_autocast_stays_near_fp32() -> None:
    unet, x = _unet().float().eval(), _x().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(unet(x, t=0.3), unet.double()(x.double(), t=0.3)) <= 0.05


def test_bad_input_is_named() -> None:
    unet, x = _unet(), _x()
    with pytest.raises(
        ValueError, match=r"x must be \[B, 2, H, W\] with H and W multiples of 2; got \(3, 2, 4, 3\)"
    ):
        unet(x[..., :3], t=0.0)
    with pytest.raises(ValueError, match=r"got \(3, 1, 4, 4\)"):
        unet(x[:, :1], t=0.0)
    with pytest.raises(ValueError, match=r"got \(2, 4, 4\)"):
        unet(x[0], t=0.0)
    with pytest.raises(ValueError, match="UNet needs t="):
        unet(x)
    with pytest.raises(ValueError, match="UNet was built without time_features"):
        _unet(time_features=0)(x, t=0.0)
    with pytest.raises(ValueError, match=r"t must be a number, 0-d or \[3\]"):
        unet(x, t=torch.zeros(2))
    with pytest.raises(ValueError, match="18 channels do not fall into 4 groups: make the width a multiple of 4"):
        lf.UNet(2, 3, 4, width=18)
    with pytest.raises(ValueError, match="2 channels do not fall into 0 groups"):
        lf.UNet(2, 3, 4, width=2)
    with pytest.raises(ValueError, match=r"dropout must be .* below 1; got 1.0"):
        lf.UNet(2, 3, 4, dropout=1.0)
    with pytest.raises(ValueError, match="channel_mult must hold a level"):
        lf.UNet(2, 3, 4, channel_mult=())
