"""export: programs of torch's own operations, which give the model's numbers for any batch size, also as ONNX."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linfast as lf
from tests.laws.zoo import perturb


def _linearizer() -> lf.Linearizer:
    return lf.Linearizer(lf.coupling_flow(4, 2, (8,), mix="lu"), lf.Dense(4))


def _image_linearizer() -> lf.Linearizer:
    return lf.Linearizer(lf.image_flow(1, 4, 1, 4), lf.Dense(16))


def _timed() -> lf.Linearizer:
    g = lf.coupling_flow(4, 1, (8,), time_features=4)
    return lf.Linearizer(g.at(t=1.0), lf.TimeLowRank(4, 1, alpha=1.0), g.at(t=0.0))


def _density() -> lf.Density:
    flow = lf.autoregressive_flow(4, 1, (8,), context_features=3)
    return lf.Density(flow, embedding=nn.Embedding(5, 3)).standardize(3 + 5 * torch.randn(64, 4))


def _spline() -> lf.Flow:
    return lf.coupling_flow(4, 1, (8,), transform="spline", mix="lu")


# Model, method, sample shape, and the method's further inputs of B rows.
CASES: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...], Callable[[int], dict[str, Any]]]] = {
    "Linearizer": (_linearizer, "forward", (4,), lambda rows: {}),
    "image Linearizer": (_image_linearizer, "inverse", (1, 4, 4), lambda rows: {}),
    "Linearizer in time": (_timed, "forward", (4,), lambda rows: {"t": torch.linspace(0, 1, rows).double()}),
    "flow": (_spline, "forward_and_log_det", (4,), lambda rows: {}),
    "inverse flow": (_spline, "inverse", (4,), lambda rows: {}),
    "Density": (_density, "log_prob", (4,), lambda rows: {"context": torch.arange(rows) % 5}),
}


def _targets(program: torch.export.ExportedProgram) -> str:
    return " ".join(str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("name", CASES)
def test_a_program_gives_the_models_numbers_for_any_batch(name: str) -> None:
    make, method, shape, further = CASES[name]
    model = perturb(make()).double().eval()
    file = io.BytesIO()
    program = lf.export(model, torch.randn(3, *shape).double(), method, **further(3))
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert not [word for word in ("linfast", "linalg") if word in _targets(loaded)]
    for rows in (0, 1, 2, 7):
        x = torch.randn(rows, *shape).double()
        torch.testing.assert_close(
            loaded.module()(x, **further(rows)), getattr(model, method)(x, **further(rows)), rtol=1e-12, atol=1e-12
        )


class _Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(4)


def test_random_numbers_are_drawn_at_every_call() -> None:
    program, x = lf.export(_Noisy(), torch.ones(3, 4)), torch.zeros(2, 4)
    assert not torch.equal(program.module()(x), program.module()(x))


def test_a_standardized_density_exports_in_train_mode() -> None:
    """The program neither sets the ActNorm's parameters from the example nor fixes the example's batch size."""
    density = perturb(lf.Density(lf.coupling_flow(4, 1, (8,))).standardize(3 + 5 * torch.randn(64, 4)))
    x = 3 + 5 * torch.randn(7, 4)
    program = lf.export(density, torch.randn(3, 4), "log_prob")
    torch.testing.assert_close(program.module()(x), density(x))


def test_a_context_of_one_dimension_is_one_for_all_samples() -> None:
    """Also where it has as many values as the example has rows."""
    density = perturb(lf.Density(lf.coupling_flow(4, 1, (8,), context_features=3)))
    program = lf.export(density, torch.randn(3, 4), "log_prob", context=torch.randn(3))
    x, context = torch.randn(7, 4), torch.randn(3)
    torch.testing.assert_close(program.module()(x, context=context), density(x, context))


def test_an_actnorm_that_waits_for_its_first_batch_is_refused() -> None:
    flow = lf.Flow([lf.ActNorm(4), lf.AffineCoupling(lf.MLP(2, 4, (8,)), 4)])
    with pytest.raises(ValueError, match="model has an ActNorm that waits for its first batch"):
        lf.export(flow, torch.randn(3, 4))
    assert not flow[0].initialized
    lf.export(flow.eval(), torch.randn(3, 4))


@pytest.mark.parametrize("method", ["forward", "inverse"])
def test_a_later_change_of_a_weight_does_not_reach_the_program(method: str) -> None:
    f, y = perturb(_linearizer()), torch.randn(2, 4)
    expected = getattr(f, method)(y)
    program = lf.export(f, torch.randn(3, 4), method)
    with torch.no_grad():
        f.A.weight.mul_(2.0)
    torch.testing.assert_close(program.module()(y), expected)


def test_the_model_is_left_as_it_was() -> None:
    f = perturb(_linearizer())
    before = {key: value.clone() for key, value in f.state_dict().items()}
    lf.export(f, torch.randn(3, 4))
    assert f.training
    assert all(p.requires_grad for p in f.parameters())
    assert f.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in f.state_dict().items())


def test_an_autoregressive_inverse_keeps_its_op() -> None:
    flow = perturb(lf.autoregressive_flow(4, 2, (8,)))
    program = lf.export(flow, torch.randn(3, 4), "inverse")
    assert "linfast.masked_autoregressive" in _targets(program)
    z = torch.randn(5, 4)
    torch.testing.assert_close(program.module()(z), flow.inverse(z))


def test_wrong_calls() -> None:
    f = _linearizer()
    with pytest.raises(ValueError, match=r"x must have at least two rows.*\(1, 4\)"):
        lf.export(f, torch.randn(1, 4))
    with pytest.raises(ValueError, match="method must be one of forward, inverse; got 'log_prob'"):
        lf.export(f, torch.randn(3, 4), "log_prob")


@pytest.mark.parametrize("make", [_image_linearizer, _spline])
def test_onnx_gives_the_models_numbers(make: Callable[[], nn.Module], tmp_path) -> None:
    """onnxruntime adds in another order than torch."""
    import onnxruntime

    model = perturb(make()).eval()
    shape = (1, 4, 4) if make is _image_linearizer else (4,)
    program = torch.onnx.export(lf.export(model, torch.randn(3, *shape)), dynamo=True, verbose=False)
    program.save(tmp_path / "f.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "f.onnx", providers=["CPUExecutionProvider"])
    for rows in (1, 2, 7):
        x = torch.randn(rows, *shape)
        (got,) = session.run(None, {"x": x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(got), model(x), rtol=1e-4, atol=1e-5)
