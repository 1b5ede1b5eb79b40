"""In plain torch a flow's MLP couplings run in one loop, which gives the results of the layers one by one."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linfast as lf
from linfast.flows.match import match
from linfast.flows.segments import Couplings
from linfast.scale_maps import SCALE_MAP_KINDS
from tests.laws.zoo import perturb, relative

D, B = 7, 9


def _flow(depth: int = 3, **options: Any) -> lf.Flow:
    return perturb(lf.coupling_flow(D, depth, **{"hidden": (8, 6), "mix": None, **options}), 0.3)  # type: ignore[return-value]


def _interleaved() -> lf.Flow:
    sizes = {"first": (3, 8), "second": (4, 6)}
    return perturb(  # type: ignore[return-value]
        lf.Flow([lf.AffineCoupling(lf.MLP(*sizes[m], (8,)), D, m, layout="interleaved") for m in sizes])
    )


FLOWS: dict[str, Callable[[], tuple[lf.Flow, dict[str, Any]]]] = {
    **{kind: lambda kind=kind: (_flow(scale_map=kind), {}) for kind in SCALE_MAP_KINDS},
    **{name: lambda name=name: (_flow(activation=name), {}) for name in ("relu", "tanh", "gelu")},
    "scale first": lambda: (_flow(order="scale_first"), {}),
    "linear": lambda: (_flow(hidden=()), {}),
    "one coupling": lambda: (_flow(1), {}),
    "interleaved": lambda: (_interleaved(), {}),
    "context": lambda: (_flow(context_features=2), {"context": torch.randn(B, 2)}),
    "time": lambda: (_flow(time_features=4), {"t": 0.3}),
    "tensor time": lambda: (_flow(time_features=4), {"t": torch.tensor(0.3)}),
    "mixes between": lambda: (_flow(mix="lu"), {}),
}


def _one_by_one(g: lf.Flow, x: Tensor, context: dict[str, Any], inverse: bool) -> tuple[Tensor, Tensor]:
    total: Tensor | float = 0.0
    for layer in reversed(g.bijections) if inverse else g.bijections:
        x, part = (layer.inverse_and_log_det if inverse else layer.forward_and_log_det)(x, **context)  # type: ignore[operator]
        total = total + part
    return x, total  # type: ignore[return-value]


def _alike(ours: Tensor, theirs: Tensor) -> bool:
    """Equal up to the order of sums and the last bits of vectorised functions: a few roundings of the dtype."""
    return bool(relative(ours.double(), theirs.double()) < 4 * torch.finfo(ours.dtype).eps)


def _loops(g: lf.Flow, x: Tensor, context: dict[str, Any]) -> int:
    """The number of couplings that run in loops."""
    launch = match(g.bijections, x, context, False, False)
    return sum(len(segment.layers) for segment in launch.segments if isinstance(segment, Couplings))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("name", FLOWS)
def test_the_loop_gives_what_the_layers_give(name: str, inverse: bool) -> None:
    g, context = FLOWS[name]()
    g = g.double()
    context = {k: v.double() if isinstance(v, Tensor) else v for k, v in context.items()}
    x = torch.randn(B, D, dtype=torch.float64, requires_grad=True)
    wanted = [x, *g.parameters()]
    with lf.backend("reference"):
        assert _loops(g, x, context) == sum(isinstance(layer, lf.AffineCoupling) for layer in g.bijections)
        pairs = (
            (g.inverse_and_log_det if inverse else g.forward_and_log_det)(x, **context),
            _one_by_one(g, x, context, inverse),
        )
        values = [
            [y, total, *torch.autograd.grad(y.pow(3).sum() + total.square().sum(), wanted)] for y, total in pairs
        ]
    for ours, theirs in zip(*values, strict=True):
        assert relative(ours, theirs) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_loop_rounds_as_the_layers_do(dtype: torch.dtype, autocast: bool) -> None:
    g = _flow().to(dtype)
    x = torch.randn(B, D).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), lf.backend("reference"):
        ours, theirs = g.forward_and_log_det(x), _one_by_one(g, x, {}, False)
    assert ours[0].dtype == theirs[0].dtype
    assert _alike(ours[0], theirs[0])
    assert _alike(ours[1], theirs[1])


def _hooked(g: lf.Flow) -> None:
    g.bijections[1].conditioner.layers[0].register_forward_hook(lambda *given: 2 * given[2])  # type: ignore[union-attr, index]


def _subclass(g: lf.Flow) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    g.bijections[1].conditioner.layers[0].__class__ = Doubled  # type: ignore[union-attr, index]


def _patched(g: lf.Flow) -> None:
    mlp: Any = g.bijections[1].conditioner
    before = mlp.forward
    mlp.forward = lambda x, **context: 2 * before(x, **context)


@pytest.mark.parametrize("change", [_hooked, _subclass, _patched])
def test_layers_with_code_of_their_own_run_it(change: Callable[[lf.Flow], None]) -> None:
    g, x = _flow(), torch.randn(B, D)
    before = copy.deepcopy(g)
    g(x)  # the recognised couplings no longer hold
    change(g)
    with lf.backend("reference"):
        assert _loops(g, x, {}) == 2
        assert _alike(g(x), _one_by_one(g, x, {}, False)[0])
        assert not torch.allclose(g(x), before(x))


def test_what_is_replaced_between_calls_is_what_runs() -> None:
    g, x = _flow(), torch.randn(B, D)
    layer: Any = g.bijections[0]
    with lf.backend("reference"):
        for change in (
            lambda: setattr(layer.conditioner.layers[0], "weight", nn.Parameter(torch.randn(8, 3))),
            lambda: layer.conditioner.layers[1].bias.data.add_(1.0),
            lambda: setattr(layer, "scale_map", lf.ScaleMap("tanh")),
            lambda: setattr(layer.conditioner, "activation", "relu"),
            lambda: setattr(layer, "order", "scale_first"),
            lambda: setattr(layer, "conditioner", perturb(lf.MLP(3, 8, (5,)), 0.3)),
        ):
            before = g(x)
            change()
            assert _alike(g(x), _one_by_one(g, x, {}, False)[0])
            assert relative(g(x), before) > 1e-3


def test_layers_that_are_put_in_taken_out_or_exchanged_are_seen() -> None:
    g, x = _flow(4), torch.randn(B, D)
    with lf.backend("reference"):
        for change in (
            lambda: g.bijections.append(perturb(lf.AffineCoupling(lf.MLP(3, 8, (8,)), D), 0.3)),
            lambda: g.bijections.insert(1, lf.Permute(D)),
            lambda: g.bijections.__delitem__(0),
            lambda: g.bijections.__setitem__(0, perturb(lf.AffineCoupling(lf.MLP(3, 8, (5,)), D), 0.3)),
            lambda: g.bijections[0].conditioner.layers.insert(1, nn.Linear(5, 5)),  # type: ignore[union-attr, operator]
        ):
            before = g(x)
            change()
            assert _alike(g(x), _one_by_one(g, x, {}, False)[0])
            assert relative(g(x), before) > 1e-3


def test_two_kinds_of_input_in_turn() -> None:
    g, h = _flow(), _flow(context_features=2)
    with lf.backend("reference"):
        for _ in range(2):
            for dtype in (torch.float32, torch.float64):
                g, x = g.to(dtype), torch.randn(B, D, dtype=dtype)
                assert _alike(g(x), _one_by_one(g, x, {}, False)[0])
            with pytest.raises(ValueError, match=r"context must be \[9, 2\]"):
                h(torch.randn(B, D), context=torch.randn(B, 3))
            x, context = torch.randn(B, D), {"context": torch.randn(B, 2)}
            assert _alike(h(x, **context), _one_by_one(h, x, context, False)[0])


def test_recognised_couplings_are_freed_with_the_flow() -> None:
    g = _flow()
    with lf.backend("reference"):
        g(torch.randn(B, D))
    weight, layers = (weakref.ref(t) for t in (g.bijections[0].conditioner.layers[0].weight, g.bijections))  # type: ignore[union-attr, index]
    del g
    gc.collect()
    assert weight() is None
    assert layers() is None


def test_a_frozen_linearizer_runs_its_parts_for_each_kind_of_call() -> None:
    g = _flow(time_features=4)
    f = lf.Linearizer(g.at(t=1.0), lf.TimeLowRank(D, rank=2), g.at(t=0.0)).double()
    with torch.no_grad(), lf.backend("reference"):
        for parameter in f.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        calls = [
            (torch.randn(n, D, dtype=torch.float64), t) for n in (1, 5, 0) for t in (0.25, 0.75, torch.rand(n))
        ]
        expected = [f(x, t=t) for x, t in calls]
        with lf.freeze(f):
            for _ in range(2):
                for (x, t), y in zip(calls, expected, strict=True):
                    torch.testing.assert_close(f(x, t=t), y, rtol=1e-12, atol=1e-12)
            with pytest.raises(ValueError, match="must have 7 features"):
                f(torch.randn(2, D + 1, dtype=torch.float64), t=0.25)
            with pytest.raises(ValueError, match=r"is torch\.float32 and the parameters are torch\.float64"):
                f(torch.randn(2, D), t=0.25)
            with torch.enable_grad():
                x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
                f(x, t=0.25).sum().backward()
                assert x.grad is not None
                assert g.bijections[0].conditioner.layers[0].weight.grad is not None  # type: ignore[union-attr, index]


def test_a_linear_layer_with_plain_attributes_runs_with_them() -> None:
    g, x = _flow(), torch.randn(B, D)
    linear: Any = g.bijections[0].conditioner.layers[0]  # type: ignore[union-attr, index]
    bias = linear.bias.detach() + 1
    del linear.bias
    linear.bias = bias
    with lf.backend("reference"):
        assert _alike(g(x), _one_by_one(g, x, {}, False)[0])


def test_what_does_not_fit_is_refused_by_the_layers() -> None:
    g, x = _flow(context_features=2), torch.randn(B, D)
    with pytest.raises(ValueError, match=r"context must be \[9, 2\]"):
        g(x, context=torch.randn(B, 3))
    with pytest.raises(ValueError, match="context_features=2"):
        g(x)
    for wrong in ([1.0], 3):
        with pytest.raises(TypeError, match="context must be a tensor"):
            g(x, context=wrong)
    g = _flow()
    g.bijections[1].conditioner.layers[1].double()  # type: ignore[union-attr, index]
    with pytest.raises(RuntimeError, match="dtype"):
        g(x)
    g = _flow()
    g.bijections[1].conditioner = lf.MLP(4, 4)
    with pytest.raises(ValueError, match="conditioner must return"):
        g(x)
