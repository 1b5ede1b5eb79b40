"""accelerate and restore: models of other libraries at random sizes against their own results in float64."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import linfast as lf
from linfast.dispatch import plain_torch

from .drawing import DTYPES, cotangent, drawn, generator, moved, moved_model, perturbed, recipe, seeds
from .judge import Judge, Truth, moves_by

__all__ = ["RECIPES", "check"]

_KINDS = (
    "normflows", "normflows masked", "nflows affine", "nflows additive", "nflows mlp", "glasflow", "zuko",
            "zuko nice",
    "FrEIA GLOWCouplingBlock", "FrEIA RNVPCouplingBlock", "FrEIA AffineCouplingOneSided", "FrEIA NICECouplingBlock",
    "FrEIA AllInOneBlock", "memcnn affine", "memcnn naive", "memcnn additive",
)  # fmt: skip
RECIPES = recipe(
    kind=st.sampled_from(_KINDS), features=st.integers(2, 20), depth=st.integers(1, 3), hidden=st.integers(1, 20),
    layers=st.integers(0, 3), option=st.integers(0, 11), context=st.sampled_from([0, 0, 3]), mask=seeds,
            batch=st.sampled_from([1, 2, 5]),
    dtype=st.sampled_from(["float32", "float64"]), memory=st.sampled_from(["store", "invert"]), train=st.booleans(),
    std=st.sampled_from([0.02, 0.1]), seed=seeds,
)  # fmt: skip
Run = Callable[[nn.Module, Tensor, Tensor | None], list[Tensor]]


def _library(name: str) -> Any:
    with contextlib.redirect_stderr(io.StringIO()):
        return importlib.import_module(name)


def _net(r: dict[str, Any]) -> Callable[[int, int], nn.Module]:
    activation = (nn.ReLU, nn.SiLU, nn.Tanh, nn.GELU)[r["mask"] % 4]

    def net(n_in: int, n_out: int) -> nn.Module:
        widths = [n_in, *[r["hidden"]] * r["layers"]]
        hidden = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), activation())]
        return nn.Sequential(*hidden, nn.Linear(widths[-1], n_out))

    return net


def _mask(r: dict[str, Any], i: int, low: int = 0) -> list[int]:
    """A mask of ``low`` and 1, which contains both."""
    ones = torch.rand(r["features"], generator=generator(r["mask"] + i)) > 0.5
    ones[i % r["features"]], ones[(i + 1) % r["features"]] = True, False
    return [1 if one else low for one in ones.tolist()]


def build(r: dict[str, Any]) -> tuple[nn.Module, Run]:
    """The model in float64 and the calls to compare."""
    torch.manual_seed(r["seed"])
    library, _, name = r["kind"].partition(" ")
    model, run = globals()[f"_{library.lower()}"](r, name)
    return perturbed(model, r["seed"], r["std"]), run


def _normflows(r: dict[str, Any], name: str) -> tuple[nn.Module, Run]:
    nf, n, net = _library("normflows"), r["features"], _net(r)
    flows = []
    for i in range(r["depth"]):
        if name == "masked":
            mask = torch.tensor(_mask(r, i)).float()
            flows.append(nf.flows.MaskedAffineFlow(mask, net(n, n), net(n, n) if r["option"] % 3 else None))
        else:
            first, second = (n + 1) // 2, n // 2
            split = ("channel", "channel_inv")[r["option"] % 2]
            kept, moved = (first, second) if split == "channel" else (second, first)
            scale, scale_map = r["option"] % 4 > 0, ("exp", "sigmoid", "sigmoid_inv")[r["option"] % 3]
            mlp = nf.nets.MLP([kept, r["hidden"], moved * (2 if scale else 1)], init_zeros=False)
            flows += [nf.flows.AffineCouplingBlock(mlp, scale, scale_map, split), nf.flows.Permute(n)]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(n), flows)

    def run(model: Any, x: Tensor, c: Tensor | None) -> list[Tensor]:
        return [*model.forward_and_log_det(x), *model.inverse_and_log_det(x), model.log_prob(x)]

    return model, run


def _nflows(r: dict[str, Any], name: str) -> tuple[nn.Module, Run]:
    transforms, nets = _library("nflows.transforms"), _library("nflows.nn.nets")
    context = r["context"] if name != "mlp" else 0

    def net(n_in: int, n_out: int) -> nn.Module:
        if name == "mlp":
            return _PassesOn(nets.MLP([n_in], [n_out], [r["hidden"]] * (r["layers"] or 1), activation=torch.tanh))
        return nets.ResidualNet(
            n_in, n_out, hidden_features=r["hidden"], context_features=context or None, num_blocks=1
        )

    kind = transforms.AdditiveCouplingTransform if name == "additive" else transforms.AffineCouplingTransform
    model = transforms.CompositeTransform([kind(_mask(r, i, -1), net) for i in range(r["depth"])])

    def run(model: Any, x: Tensor, c: Tensor | None) -> list[Tensor]:
        c = c if context else None
        return [*model(x, c), *model.inverse(x, c)]

    return model, run


class _PassesOn(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        return self.inner(x)


def _glasflow(r: dict[str, Any], name: str) -> tuple[nn.Module, Run]:
    options = (
        {"volume_preserving": True}
        if r["option"] == 0
        else {"scale_activation": (None, "log2", "nflows")[r["option"] % 3]}
    )
    model = _library("glasflow").RealNVP(
        r["features"], r["depth"], n_conditional_inputs=r["context"] or None, n_neurons=r["hidden"],
        linear_transform=("permutation", "lu")[r["option"] % 2], **{k: v for k, v in options.items() if v},
    ).eval()  # fmt: skip

    def run(model: Any, x: Tensor, c: Tensor | None) -> list[Tensor]:
        return [*model.forward(x, conditional=c), *model.inverse(x, conditional=c)]

    return model, run


def _zuko(r: dict[str, Any], name: str) -> tuple[nn.Module, Run]:
    kind = getattr(_library("zuko").flows, "NICE" if name else "RealNVP")
    model = kind(
        r["features"], r["context"], transforms=r["depth"], hidden_features=[r["hidden"]] * r["layers"],
        randmask=r["option"] % 2 == 0,
    )  # fmt: skip

    def run(model: Any, x: Tensor, c: Tensor | None) -> list[Tensor]:
        transform = model(c).transform
        return [*transform.call_and_ladj(x), *transform.inv.call_and_ladj(x), model(c).log_prob(x)]

    return model, run


def _freia(r: dict[str, Any], name: str) -> tuple[nn.Module, Run]:
    frames, modules = _library("FrEIA.framework"), _library("FrEIA.modules")
    model = frames.SequenceINN(r["features"])
    condition = {"cond": 0, "cond_shape": (r["context"],)} if r["context"] else {}
    options = {}
    if name in ("GLOWCouplingBlock", "RNVPCouplingBlock", "AffineCouplingOneSided"):
        options = {
            "clamp_activation": ("ATAN", "SIGMOID", "TANH")[r["option"] % 3],
            "clamp": (2.0, 1.0)[r["option"] % 2],
        }
    if name == "AllInOneBlock":
        options = {"gin_block": r["option"] % 3 == 0, "reverse_permutation": r["option"] % 2 == 0}
    for _ in range(r["depth"]):
        model.append(getattr(modules, name), subnet_constructor=_net(r), **condition, **options)

    def run(model: Any, x: Tensor, c: Tensor | None) -> list[Tensor]:
        c = None if c is None else [c]
        values = (*model(x, c=c), *model(x, c=c, rev=True))
        return [v if isinstance(v, Tensor) else x.new_tensor(v) for v in values]

    return model, run


def _memcnn(r: dict[str, Any], name: str) -> tuple[nn.Module, Run]:
    memcnn, net, half = _library("memcnn"), _net(r), (r["features"] + 1) // 2
    options = {"affine": {"adapter": memcnn.AffineAdapterSigmoid}, "naive": {"adapter": memcnn.AffineAdapterNaive}}
    kind = memcnn.AdditiveCoupling if name == "additive" else memcnn.AffineCoupling
    width = half * (2 if name == "affine" else 1)
    model = nn.Sequential(
        *(kind(net(half, width), net(half, width), **options.get(name, {})) for _ in range(r["depth"]))
    )

    def run(model: Any, x: Tensor, c: Tensor | None) -> list[Tensor]:
        y = back = x if x.shape[1] % 2 == 0 else torch.cat((x, x[:, :1]), 1)
        for layer in model:
            y = layer(y)
        for layer in reversed(model):
            back = layer.inverse(back)
        return [y, back]

    return model, run


def _asked(run: Run, model: nn.Module, x: Tensor, c: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    """The results of the calls, and the gradients of a weighted sum of them."""
    x = x.detach().clone().requires_grad_()
    c = None if c is None else c.detach().clone().requires_grad_()
    values = run(model, x, c)
    total = sum((v * cotangent(v)).sum() for v in values)
    wanted = [x, *([] if c is None else [c]), *(p for p in model.parameters() if p.requires_grad)]
    found = torch.autograd.grad(total, wanted, allow_unused=True)  # type: ignore[arg-type]
    return [v.detach() for v in values], [
        torch.zeros_like(w) if f is None else f for f, w in zip(found, wanted, strict=True)
    ]


def check(judge: Judge, r: dict[str, Any]) -> None:
    dtype = DTYPES[r["dtype"]]
    wide, run = build(r)
    model = copy.deepcopy(wide).to(dtype).train(r["train"] and r["kind"] != "glasflow")
    wide = copy.deepcopy(model).double()
    x = drawn(r["seed"], r["batch"], r["features"]).to(dtype)
    c = drawn(r["seed"] + 1, r["batch"], r["context"]).to(dtype) if r["context"] else None
    eps, random = torch.finfo(dtype).eps, generator(7)

    def written_out(size: float) -> tuple[list[Tensor], list[Tensor]]:
        c_wide = None if c is None else moved(c.double(), size, random)
        return _asked(run, moved_model(wide, size, random), moved(x.double(), size, random), c_wide)

    with plain_torch():
        values = [written_out(0.0), *(written_out(moves_by(eps)) for _ in range(2))]
    outputs, gradients = (Truth.of(v[0], v[1:]) for v in zip(*values, strict=True))
    before = _asked(run, model, x, c)
    lf.accelerate(model, memory=r["memory"])
    kind, memory = r["kind"], r["memory"]
    got = _asked(run, model, x, c)
    # each called method is a call of an accelerated model
    judge.near(f"accelerated {kind}", got[0], outputs, lambda: _asked(run, model, x, c)[0])
    judge.near(
        f"gradients, accelerated {kind}, memory={memory}", got[1], gradients, lambda: _asked(run, model, x, c)[1]
    )
    copied = copy.deepcopy(model)
    judge.same(f"a copy of an accelerated {kind}", _asked(run, copied, x, c)[0], got[0])
    lf.restore(model)
    after = _asked(run, model, x, c)
    judge.same(f"restored {kind}", after[0] + after[1], before[0] + before[1])
