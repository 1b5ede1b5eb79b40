"""Flows and Linearizers run as one launch where they are coupling stacks, with the reference's results."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import linfast as lf
from linfast.flows.match import match
from linfast.match import LinearizerLaunch, match_linearizer
from tests.laws.zoo import perturb
from tests.marks import long
from tests.ops.budget import DEVICE, assert_within_budget

D, B = 7, 40  # rows: a tile of 32 and a part of another


def _flow(depth: int = 2, **options: object) -> lf.Flow:
    # Weights near 1: in the interpreter fp16 stands in for bf16, and is inaccurate for small numbers.
    flow = perturb(lf.coupling_flow(D, depth, **{"hidden": (16, 16), **options}), 0.15)  # type: ignore[arg-type]
    if options.get("actnorm"):
        flow(2 + 3 * torch.randn(64, D), **({"t": 0.3} if "time_features" in options else {}))
    return flow.to(DEVICE)


FLOWS = {
    "plain": {"depth": 3},
    "one layer": {"depth": 1},
    "unequal widths": {"hidden": (16, 24)},
    "linear conditioner": {"hidden": ()},
    "scale first": {"order": "scale_first", "scale_map": "tanh", "activation": "tanh"},
    "actnorm": {"actnorm": True},
    "actnorm, lu": {"actnorm": True, "mix": "lu"},
    "free": {"mix": "free"},
    "householder": {"mix": "householder"},
    "permute": {"mix": "permute"},
    "time": {"time_features": 8},
}
EVERY_PART = ("plain", "unequal widths", "scale first", "actnorm, lu", "time")


def _within_budget(model: nn.Module, call: Callable[[nn.Module, Tensor], Sequence[Tensor]], x: Tensor) -> None:
    models = {x.dtype: model, torch.float64: copy.deepcopy(model).double()}
    assert_within_budget(lambda x: call(models[x.dtype], x), [x])


def _gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    joined = [g.flatten() for g in found if g is not None]
    return [torch.cat(joined)]


@pytest.mark.parametrize("name", [*EVERY_PART, *long(*(name for name in FLOWS if name not in EVERY_PART))])
def test_flow_runs_as_one_stack(name: str) -> None:
    options, x = FLOWS[name], torch.randn(B, D, device=DEVICE)
    flow, context = _flow(**options), {"t": 0.3} if "time_features" in options else {}  # type: ignore[arg-type]
    with lf.backend("triton"):
        assert match(flow.bijections, x, context, False, False).why is None  # type: ignore[arg-type]

    def both_ways(g: lf.Flow, x: Tensor) -> list[Tensor]:
        z, log_det = g.forward_and_log_det(x, **context)
        back, back_log_det = g.inverse_and_log_det(z, **context)
        return [z, log_det, back_log_det, *_gradients(g, z.sin().sum() + log_det.sum() + back.square().sum())]

    _within_budget(flow, both_ways, x)  # type: ignore[arg-type]


def test_a_frozen_flow_has_the_weights_of_each_time() -> None:
    """A time is folded into the weights that a freeze keeps."""
    g, x = _flow(time_features=8), torch.randn(B, D, device=DEVICE)
    f = lf.Linearizer(g.at(t=0.3), lf.Dense(D).to(DEVICE), g.at(t=0.7))

    def outputs(f: lf.Linearizer, x: Tensor) -> list[Tensor]:
        g = f.g_x.bijection
        with torch.no_grad(), lf.freeze(f):
            ys = [call(x, t=t) for call in (g, g.inverse) for t in (0.3, 0.7)]
            return [*ys, f.g_y(x), f.g_x(x), f(x), f.g_y.inverse(x), f.g_x.inverse(x)]

    _within_budget(f, outputs, x)  # type: ignore[arg-type]


def _linearizers() -> dict[str, tuple[lf.Linearizer, float | None]]:
    g, h, timed = _flow(mix="lu"), _flow(2), _flow(2, time_features=8)
    return {
        "dense": (lf.Linearizer(g, lf.Dense(D)), None),
        "two networks": (lf.Linearizer(g, lf.Diagonal(D), h), None),
        "shared, no maps": (lf.Linearizer(h, lf.LowRank(0.5, torch.randn(D, 2), torch.randn(D, 2))), None),
        "projection": (lf.Linearizer(h, lf.Projection(D)), None),
        "algebra": (((f := lf.Linearizer(g, lf.Dense(D))) @ f).T, None),
        "times": (lf.Linearizer(timed.at(t=1.0), lf.TimeLowRank(D, 2, hidden=16), timed.at(t=0.0)), 0.4),
    }


@pytest.mark.parametrize("name", ["dense", "two networks", "shared, no maps", "projection", "algebra", "times"])
def test_linearizer_runs_as_one_launch(name: str) -> None:
    f, t = _linearizers()[name]
    f, x = f.to(DEVICE), torch.randn(B, D, device=DEVICE)
    with lf.backend("triton"):
        assert isinstance(match_linearizer(f, x, t, {}), LinearizerLaunch)

    def call(f: nn.Module, x: Tensor) -> list[Tensor]:
        y = f(x, t=t)
        return [y, *_gradients(f, y.sin().sum())]

    _within_budget(f, call, x)


def _subclassed(flow: lf.Flow) -> None:
    class Own(lf.AffineCoupling):
        pass

    flow.bijections[1].__class__ = Own


def _hooked(flow: lf.Flow) -> None:
    flow.bijections[0].conditioner.layers[1].register_forward_hook(lambda *_: None)  # type: ignore[union-attr, index]


def _parametrized(flow: lf.Flow) -> None:
    nn.utils.parametrizations.weight_norm(flow.bijections[0].conditioner.layers[0])  # type: ignore[union-attr, index]


@pytest.mark.parametrize("change", [_subclassed, _hooked, _parametrized])
def test_layers_with_custom_code_run_it(change: Callable[[lf.Flow], None]) -> None:
    flow, x = _flow(), torch.randn(B, D, device=DEVICE)
    change(flow)
    with lf.backend("triton"):
        assert match(flow.bijections, x, {}, False, False).why is not None  # type: ignore[arg-type]
        y = flow(x)
    assert torch.allclose(y, flow(x), atol=1e-5)


def test_hook_of_a_conditioner_runs() -> None:
    flow, seen = _flow(), []
    flow.bijections[1].conditioner.register_forward_hook(lambda *_: seen.append(1))  # type: ignore[union-attr]
    with lf.backend("triton"):
        flow(torch.randn(3, D, device=DEVICE))
    assert seen == [1]


def test_per_sample_time_runs_layer_by_layer() -> None:
    flow, x, t = _flow(time_features=8), torch.randn(B, D, device=DEVICE), torch.rand(B, device=DEVICE)
    with lf.backend("triton"):
        assert "separate input per sample" in str(match(flow.bijections, x, {"t": t}, False, False).why)  # type: ignore[arg-type]
        y = flow(x, t=t)
    assert torch.allclose(y, flow(x, t=t), atol=1e-5)


@pytest.mark.parametrize(("n", "n_out"), [(2, 4), (4, 2), (3, 5)])
def test_an_operator_that_is_not_square_runs_part_by_part(n: int, n_out: int) -> None:
    A = lf.Dense.of(torch.nn.Parameter(torch.randn(n_out, n)))
    f = perturb(lf.Linearizer(lf.coupling_flow(n, 2, (8,)), A, lf.coupling_flow(n_out, 2, (8,))))
    x = torch.randn(3, n)
    with lf.backend("triton"):
        y = f(x)
        with torch.no_grad(), lf.freeze(f):
            frozen = f(x)
    with lf.backend("reference"):
        expected = f(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(frozen, expected)


def test_operator_a_sample_runs_part_by_part() -> None:
    f, t = lf.Linearizer(_flow(1), lf.TimeLowRank(D, 2, hidden=16).to(DEVICE)), torch.rand(3, device=DEVICE)
    x = torch.randn(3, D, device=DEVICE)
    with lf.backend("triton"):
        assert match_linearizer(f, x, t, {}) == "A: one operator per sample"
        y = f(x, t=t)
    assert torch.allclose(y, f(x, t=t), atol=1e-5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: torch.randn(3, D + 1, device=DEVICE), "must have 7 features"),
        (lambda: torch.randn(3, D, device=DEVICE).half(), "float16"),
    ],
)
def test_bad_input_is_answered_as_without_kernels(bad: Callable[[], Tensor], message: str) -> None:
    f = lf.Linearizer(_flow(), lf.Dense(D).to(DEVICE))
    with lf.backend("triton"), pytest.raises(ValueError, match=message):
        f(bad())


def test_frozen_weights_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from linfast.flows import match

    flow, x, packs = _flow(), torch.randn(3, D, device=DEVICE), []
    pack = match.pack_stack
    monkeypatch.setattr(match, "pack_stack", lambda *a, **k: packs.append(1) or pack(*a, **k))
    with lf.backend("triton"), torch.no_grad(), lf.freeze(flow):
        first, second = flow(x), flow(x)
        flow.inverse(x)
        flow.forward_and_log_det(x)
    assert torch.equal(first, second)
    assert len(packs) == 2
    with lf.backend("triton"), lf.freeze(flow):
        flow(x).sum().backward()
    assert flow.bijections[0].conditioner.layers[0].weight.grad is not None  # type: ignore[union-attr, index]


@pytest.mark.parametrize("every", [2, *long(10)])
def test_training_with_every_way_to_write_a_weight_follows_the_reference(every: int) -> None:
    """AdamW(fused=True), writes through .data and load_state_dict: packed weights are never out of date."""

    def losses(backend: str) -> list[float]:
        torch.manual_seed(0)
        f = lf.Linearizer(_flow(hidden=(16,)), lf.Dense(D).to(DEVICE))
        optimizer = torch.optim.AdamW(f.parameters(), lr=3e-2 / every, fused=True)
        kept, found = None, []
        for step in range(5 * every):
            x = torch.randn(16, D, device=DEVICE)
            with lf.backend(backend):
                loss = (f(x) - x.flip(1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step == every:
                kept = copy.deepcopy(f.state_dict())
            if step == 2 * every:
                f.g_x.bijections[0].conditioner.layers[0].weight.data.mul_(0.5)  # type: ignore[union-attr, index]
            if step == 3 * every:
                f.load_state_dict(kept)
            found.append(loss.item())
        return found

    kernel, plain = torch.tensor(losses("triton")), torch.tensor(losses("reference"))
    assert plain[-1] < plain[0]
    assert ((kernel - plain).abs() <= 1e-5 * plain).all()


def test_plan_says_what_runs() -> None:
    x = torch.randn(B, D, device=DEVICE)
    f = lf.Linearizer(_flow(), lf.Dense(D).to(DEVICE))
    with lf.backend("triton"):
        (whole,) = lf.plan(f, x).choices
        assert (whole.part, whole.runs, whole.precision) == ("f", "linearizer_stack", "exact")
        assert "64 rows" in whole.tile
        (whole,) = lf.plan(f, x[:3]).choices
        assert "16 rows" in whole.tile
        parts = {
            choice.part: choice.runs
            for choice in lf.plan(_flow(mix="lu", context_features=3), x, context=x[:, :3]).choices
        }
        assert parts["g.0 + g.1"] == "torch products, coupling_mix"
    with lf.backend("reference"):
        assert {choice.runs for choice in lf.plan(f, x).choices} == {"torch"}
        assert "the backend is 'reference'" in str(lf.plan(f, x))
    with pytest.raises(TypeError, match="model must be a Linearizer or a Bijection; got Dense"):
        lf.plan(lf.Dense(3), x)


def test_explain_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    g = _flow()
    lf.explain(g, torch.randn(3, D, device=DEVICE, dtype=torch.float64))
    assert "x is torch.float64" in capsys.readouterr().out
