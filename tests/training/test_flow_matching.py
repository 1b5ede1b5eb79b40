"""The one-step loss: its four terms by their formulas, and that it can be minimised."""

from __future__ import annotations

import copy

import pytest
import torch

import linfast as lf
from linfast.training import IdempotentLoss, OneStepFlowMatching, one_step_loss
from tests.laws.zoo import perturb

from .toys import one_step


def _model(n: int = 6) -> lf.Linearizer:
    g = perturb(lf.coupling_flow(n, 2, (16,), time_features=8))
    return lf.Linearizer(g.at(t=1.0), lf.TimeLowRank(n, 3), g.at(t=0.0))


def test_terms_are_their_formulas() -> None:
    f, x_1, x_0 = _model(), torch.randn(5, 6), torch.randn(5, 6)
    torch.manual_seed(3)
    loss = one_step_loss(f, x_1, x_0, latent_noise=0.2)
    torch.manual_seed(3)
    t = torch.rand(5)
    z_1, z_0 = f.gx(x_1), f.gy(x_0)
    predicted = f.A((1 - t[:, None]) * z_0 + t[:, None] * z_1, t=t)
    noised_1 = z_1 + 0.2 * torch.randn_like(z_1)
    noised_0 = z_0 + 0.2 * torch.randn_like(z_0)
    torch.testing.assert_close(loss.latent, (predicted - z_1).square().mean())
    torch.testing.assert_close(loss.data, (f.gx_inverse(noised_1) - x_1).square().mean())
    torch.testing.assert_close(loss.noise, (f.gy_inverse(noised_0) - x_0).square().mean())
    torch.testing.assert_close(loss.prediction, (f.gx_inverse(predicted) - x_1).square().mean())
    torch.testing.assert_close(loss.total, loss.latent + loss.data + loss.noise + loss.prediction)
    assert float(loss.likelihood) == 0


def test_likelihood_is_that_of_a_standard_normal() -> None:
    f, x = _model(), torch.randn(5, 6)
    loss = one_step_loss(f, x, likelihood=0.3)
    z, log_det = f.g_x.forward_and_log_det(x)
    constant = 3 * torch.log(torch.tensor(2 * torch.pi))
    log_p = torch.distributions.Normal(0, 1).log_prob(z).sum(1) + log_det
    torch.testing.assert_close(loss.likelihood, 0.3 * (-log_p - constant).mean() / 6)
    assert float((loss.total - loss.likelihood - sum(loss[:4])).detach().abs()) < 1e-6


def test_another_distance_is_used_for_data_and_prediction() -> None:
    f, x = _model(), torch.randn(5, 6)
    calls = []

    def distance(decoded: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        calls.append(target is x)
        return decoded.sum() * 0 + 7

    loss = one_step_loss(f, x, distance=distance)
    assert calls == [True, True]
    assert float(loss.data.detach()) == float(loss.prediction.detach()) == 7


def test_training_lowers_it() -> None:
    f = _model()
    x = torch.randn(64, 1) * torch.ones(6) + 0.1 * torch.randn(64, 6)
    optimizer = torch.optim.Adam(f.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = one_step_loss(f, x, latent_noise=0.05).total
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_images_are_weighted_per_sample() -> None:
    g = perturb(lf.image_flow(1, 4, 2, 8))
    f = lf.Linearizer(g, lf.TimeLowRank(16, 2))
    assert one_step_loss(f, torch.randn(3, 1, 4, 4)).total.ndim == 0


def test_objective_draws_everything_from_its_generator() -> None:
    objective = one_step()
    drawn = [objective.draw(torch.Generator().manual_seed(seed), 8) for seed in (0, 0, 1)]
    for name, value in drawn[0].items():
        assert value.shape[0] == 8
        assert torch.equal(value, drawn[1][name])
        assert not torch.equal(value, drawn[2][name])
    first, second = (objective(draw) for draw in drawn[:2])
    assert first == second
    difference = (drawn[0]["x_1"][:, None] - objective.data).abs().amax(-1).amin(-1)
    assert 0 < float(difference.max()) <= 0.05
    assert 0 <= float(drawn[0]["t"].min()) <= float(drawn[0]["t"].max()) < 1


def test_objective_has_the_papers_terms_and_ours_only_when_asked() -> None:
    objective = one_step()
    drawn = objective.draw(torch.Generator().manual_seed(0), 8)
    assert list(objective(drawn)) == ["latent", "data", "noise", "prediction", "likelihood"]
    objective.options["likelihood"] = 0.0
    assert list(objective(drawn)) == ["latent", "data", "noise", "prediction"]


def _conditioned(n: int = 6, classes: int = 3) -> lf.Linearizer:
    g_x = perturb(lf.coupling_flow(n, 2, (16,), context_features=classes))
    return lf.Linearizer(g_x, lf.TimeLowRank(n, 3), perturb(lf.coupling_flow(n, 2, (16,))))


@pytest.mark.parametrize("rows", [1, 5])
def test_context_is_that_of_the_data_side(rows: int) -> None:
    f, x_1, context = _conditioned(), torch.randn(5, 6), torch.randn(rows, 3)
    given = {"x_0": torch.randn(5, 6), "t": torch.rand(5), "e_1": torch.randn(5, 6), "e_0": torch.randn(5, 6)}
    loss = one_step_loss(f, x_1, **given, likelihood=0.3, context=context)
    fixed = lf.Linearizer(f.g_x.at(context=context.expand(5, 3)), f.A, f.g_y)
    z_1, z_0, t = fixed.gx(x_1), f.gy(given["x_0"]), given["t"][:, None]
    predicted = f.A((1 - t) * z_0 + t * z_1, t=given["t"])
    torch.testing.assert_close(loss.latent, (predicted - z_1).square().mean())
    torch.testing.assert_close(loss.data, (fixed.gx_inverse(z_1 + 0.3 * given["e_1"]) - x_1).square().mean())
    torch.testing.assert_close(loss.prediction, (fixed.gx_inverse(predicted) - x_1).square().mean())
    z, log_det = fixed.g_x.forward_and_log_det(x_1)
    torch.testing.assert_close(loss.likelihood, 0.3 * (0.5 * z.square().sum(1) - log_det).mean() / 6)


def test_objective_draws_each_rows_context() -> None:
    data, context = torch.randn(50, 6), torch.randn(50, 3)
    drawn = OneStepFlowMatching(_conditioned(), data, context=context).draw(torch.Generator(), 8)
    rows = (drawn["x_1"][:, None] == data).all(-1).long().argmax(1)
    assert torch.equal(drawn["context"], context[rows])
    assert len(rows.unique()) > 1
    with pytest.raises(ValueError, match=r"context must be \[50, C\] for the data; got \(49, 3\)"):
        OneStepFlowMatching(_conditioned(), data, context=context[1:])


def test_a_loss_of_terms_names_its_total() -> None:
    terms = one_step_loss(_model(), torch.randn(5, 6)), IdempotentLoss(*torch.ones(4))
    for loss in terms:
        kind = type(loss).__name__
        assert not hasattr(loss, "backward")
        for name in ("backward", "item"):
            with pytest.raises(
                AttributeError, match=f"{kind}.*it holds the terms of a loss; use its total.{name}$"
            ):
                getattr(loss, name)
        with pytest.raises(AttributeError, match=f"'{kind}' object has no attribute 'other'$"):
            loss.other  # noqa: B018
        assert torch.equal(copy.copy(loss).total, loss.total)
