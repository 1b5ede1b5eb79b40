"""Image flows in a context: it reaches every sample by formula, kernel, trace, transform and file."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import linfast as lf
from linfast.precision import full_precision
from tests.laws.zoo import perturb, relative
from tests.ops.budget import DEVICE

B, C, SHAPE = 4, 3, (2, 2, 2)
UNET = {"blocks": 1, "channel_mult": (1,), "dropout": 0.0}
CONDITIONERS: dict[str, dict[str, Any]] = {"conv": {}, "unet": {"conditioner": "unet", "unet_options": UNET}}
every = pytest.mark.parametrize("kind", CONDITIONERS)


def _flow(kind: str, transform: str = "affine", depth: int = 2, **options: Any) -> lf.Flow:
    made = lf.image_flow(2, 2, depth, 4, transform=transform, context_features=C, **CONDITIONERS[kind], **options)
    return perturb(made, 0.2).double()  # type: ignore[return-value]


def _given() -> tuple[Tensor, Tensor]:
    return torch.randn(B, *SHAPE).double(), torch.randn(B, C).double()


@pytest.mark.parametrize("time_features", [0, 4])
def test_a_convolutional_network_adds_a_linear_map_of_time_and_context(time_features: int) -> None:
    net = perturb(lf.ConvNet(2, 3, 5, time_features=time_features, context_features=C), 0.3).double()
    (x, context), t = _given(), torch.linspace(0, 1, B).double()
    angles = torch.stack((t, t / 10000), 1)
    embedded = torch.cat((angles.sin(), angles.cos()), 1)[:, :time_features]
    given = torch.cat((embedded, context), 1)
    first, second, last = net.layers
    h = first(x) + (given @ net.time_shift.weight.mT + net.time_shift.bias)[..., None, None]
    expected = last(nn.functional.silu(second(nn.functional.silu(h))))
    assert relative(net(x, t if time_features else None, context), expected) <= 1e-13


@every
@pytest.mark.parametrize("transform", ["affine", "additive", "spline"])
@pytest.mark.parametrize("time", [None, "number", "rows"])
def test_each_sample_is_mapped_in_its_own_context(kind: str, transform: str, time: str | None) -> None:
    g, (x, context) = _flow(kind, transform, time_features=4 if time else 0), _given()
    t = {None: None, "number": 0.3, "rows": torch.linspace(0, 1, B).double()}[time]

    def alone(i: int) -> dict[str, Any]:
        own = {"context": context[i : i + 1]}
        return own if t is None else {**own, "t": t[i : i + 1] if isinstance(t, Tensor) else t}

    given: dict[str, Any] = {"context": context} if t is None else {"context": context, "t": t}
    for method in (g.forward_and_log_det, g.inverse_and_log_det):
        together = method(x, **given)
        for i in range(B):
            for value, truth in zip(method(x[i : i + 1], **alone(i)), together, strict=True):
                assert relative(value, truth[i : i + 1]) <= 1e-12
        assert relative(method(x, **{**given, "context": context.flip(0)})[0], together[0]) > 1e-4
    assert relative(g.inverse(g(x, **given), **given), x) <= 1e-12


@every
def test_what_all_samples_share_is_computed_for_one_row(kind: str) -> None:
    g, x = _flow(kind, time_features=4), _given()[0]
    seen: list[int] = []
    for module in g.modules():
        if isinstance(module, (lf.ConvNet, lf.UNet)):
            shift = module.time if isinstance(module, lf.UNet) else module.time_shift
            shift.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    row, times = torch.randn(1, C).double(), torch.linspace(0, 1, B).double()
    shared, own = row.expand(B, -1), row.repeat(B, 1)
    for context, t, rows in [(row, 0.3, 1), (shared, 0.3, 1), (row, times, B), (own, 0.3, B)]:
        seen.clear()
        g(x, context=context, t=t)
        assert seen == [rows] * 2


@every
def test_transforms_of_torch_func(kind: str) -> None:
    g, (x, context) = _flow(kind), _given()
    one = lambda x, c: g(x[None], context=c[None])[0]  # noqa: E731
    truth = g(x, context=context)
    assert relative(torch.func.vmap(one)(x, context), truth) <= 1e-12
    assert relative(torch.func.vmap(one, in_dims=(None, 0))(x[0], context)[0], truth[0]) <= 1e-12
    jacobians = torch.func.vmap(torch.func.jacrev(one, argnums=1))(x, context)
    tangent = torch.randn(B, C).double()
    _, found = torch.func.jvp(lambda c: g(x, context=c), (context,), (tangent,))
    assert relative((jacobians @ tangent[:, None, None, :, None])[..., 0], found) <= 1e-12
    assert float(found.norm()) > 1e-3


@every
@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_of_one_row_is_right_for_a_row_per_sample(kind: str, batch: int) -> None:
    g, (x, context) = _flow(kind, time_features=4).requires_grad_(False), _given()
    run: Callable[..., Tensor] = lambda x, c: g(x, t=0.3, context=c)  # noqa: E731
    traced = torch.jit.trace(run, (x[:batch], context[:1]), check_trace=False)
    assert relative(traced(x, context), run(x, context)) <= 1e-12


@every
@pytest.mark.parametrize("rows", [1, B])
def test_kernels_give_the_values_and_gradients_of_float64(kind: str, rows: int) -> None:
    g, (x, context) = _flow(kind, depth=1), _given()
    leaves = [x.requires_grad_(), context[:rows].requires_grad_()]
    y, log_det = g.forward_and_log_det(leaves[0], context=leaves[1])
    expected = torch.autograd.grad(y.sin().sum() + log_det.sum(), [*leaves, *g.parameters()])
    narrow = copy.deepcopy(g).float().to(DEVICE)
    leaves = [t.detach().float().to(DEVICE).requires_grad_() for t in leaves]
    with lf.backend("triton"), full_precision():
        out, total = narrow.forward_and_log_det(leaves[0], context=leaves[1])
        found = torch.autograd.grad(out.sin().sum() + total.sum(), [*leaves, *narrow.parameters()])
    for value, truth in zip((out, total, *found), (y, log_det, *expected), strict=True):
        assert relative(value.cpu(), truth) <= 1e-4


@every
def test_autocast_keeps_the_log_det_in_fp32(kind: str) -> None:
    g, (x, context) = _flow(kind, "spline").float(), _given()
    truth = copy.deepcopy(g).double()(x, context=context)
    with torch.autocast("cpu", torch.bfloat16):
        z, log_det = g.forward_and_log_det(x.float(), context=context.float())
        back = g.inverse(z, context=context.float())
    assert log_det.dtype == torch.float32
    assert relative(z, truth) <= 0.05
    assert relative(back, x) <= 0.05


@every
def test_a_linearizer_of_images_and_its_samplers_take_a_label(kind: str) -> None:
    g, x = _flow(kind, time_features=4), _given()[0]
    labels = torch.eye(C).double()
    A = perturb(lf.TimeLowRank(8, 2)).double()
    f = [lf.Linearizer(g.at(t=1.0, context=c[None]), A, g.at(t=0.0, context=c[None])) for c in labels[:2]]
    found = [lf.sample(h, x, steps=4) for h in f]
    for h, y in zip(f, found, strict=True):
        assert relative(lf.sample(h, x, steps=4, one_step=False), y) <= 1e-10
    assert relative(found[0], found[1]) > 1e-4
    both = lf.Linearizer(g.at(t=0.5), lf.Dense(8).double())
    mixed = both(x, context=labels[[0, 1, 0, 1]])
    for i in range(2):
        assert relative(both(x, context=labels[i : i + 1])[i::2], mixed[i::2]) <= 1e-12


@every
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"has context_features=3; got context=None"),
        ({"context": torch.ones(B, C)}, r"context is torch\.float32 and the parameters are torch\.float64"),
        ({"context": [1.0, 2.0, 3.0]}, r"context must be a tensor; got \[1\.0, 2\.0, 3\.0\]"),
        ({"context": torch.ones(2, C).double()}, r"context must be \[4, 3\] or \[1, 3\] .*; got \(2, 3\)"),
        ({"context": torch.ones(B, C).double(), "t": 0.5}, r"was built without time_features; got t=0\.5"),
    ],
    ids=["missing", "float32", "a list", "rows", "a time"],
)
def test_a_wrong_context_is_named(kind: str, given: dict[str, Any], message: str) -> None:
    g, x = _flow(kind), _given()[0]
    named = "UNet" if kind == "unet" else "ConvNet"
    with pytest.raises((TypeError, ValueError), match=message) as error:
        g(x, **given)
    assert named in str(error.value) or "context must be [" in str(error.value)
    without = lf.image_flow(2, 2, 2, 4, **CONDITIONERS[kind])
    with pytest.raises(ValueError, match=rf"{named} has context_features=0; got context=a tensor \(4, 3\)"):
        without(x.float(), context=torch.ones(B, C))


@every
def test_models_without_a_context_keep_their_weights_names_and_files(kind: str, tmp_path) -> None:
    g = perturb(lf.image_flow(2, 2, 2, 4, time_features=4, **CONDITIONERS[kind])).eval()
    names = g.state_dict().keys()
    of_time = [f"time.{i}" for i in (1, 3, 5)] if kind == "unet" else ["time_shift"]
    found = {name.removeprefix("bijections.0.conditioner.") for name in names if "conditioner.time" in name}
    assert found >= {f"{layer}.{of}" for layer in of_time for of in ("weight", "bias")}
    path, old = tmp_path / "new.safetensors", tmp_path / "old.safetensors"
    lf.save(g, path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    before = {key: value.replace(', "context_features": 0', "") for key, value in metadata.items()}
    assert before != metadata
    assert all(json.loads(value) for value in before.values())
    save_file(tensors, old, before)
    x = torch.randn(B, *SHAPE)
    assert torch.equal(lf.load(old)(x, t=0.3), g(x, t=0.3))
