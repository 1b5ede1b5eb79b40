"""The idempotent network's loss: its terms by their formulas, its gradients, and what holds during training."""

from __future__ import annotations

import pytest
import torch
from linfast.examples import Trainer, TrainSettings
from linfast.examples.ign import latent_gaussian, principal_projection

import linfast as lf
from linfast.training import idempotent_loss
from tests.laws.zoo import perturb

from .toys import idempotent


def _model(n: int = 6, rank: int = 4) -> lf.Linearizer:
    return lf.Linearizer(perturb(lf.coupling_flow(n, 2, (16,), transform="additive")), lf.Projection(n, rank))


def test_terms_are_their_formulas() -> None:
    f, x, e = _model(), torch.randn(5, 6), torch.randn(5, 6)
    loss = idempotent_loss(f, x, rank=0.3, isometry=0.2, denoising=0.7, noise=0.4, e=e)
    stretch = (f.gx(x) - f.gx(torch.zeros(1, 6))).square().sum(1) - x.square().sum(1)
    torch.testing.assert_close(loss.reconstruction, (f(x) - x).square().mean())
    torch.testing.assert_close(loss.rank, torch.tensor(0.3 * 4 / 6))
    torch.testing.assert_close(loss.isometry, 0.2 * stretch.abs().mean() / 6)
    torch.testing.assert_close(loss.denoising, 0.7 * (f(x + 0.4 * e) - x).square().mean())
    torch.testing.assert_close(loss.total, sum(loss[:4]))


def test_denoising_is_off_by_default_and_another_distance_is_used() -> None:
    f, x = _model(), torch.randn(5, 6)
    assert float(idempotent_loss(f, x).denoising) == 0
    loss = idempotent_loss(f, x, denoising=2.0, distance=lambda output, target: (output * 0 + 7).mean())
    assert float(loss.reconstruction.detach()) == 7
    assert float(loss.denoising.detach()) == 14


def test_logits_get_the_sigmoids_gradient() -> None:
    f = _model()
    idempotent_loss(f, torch.zeros(2, 6), rank=0.3, isometry=0.0).rank.backward()
    soft = f.A.logits.detach().sigmoid()
    torch.testing.assert_close(f.A.logits.grad, 0.3 / 6 * soft * (1 - soft))


def test_it_needs_a_projection() -> None:
    with pytest.raises(TypeError, match="must be a Projection; got Dense"):
        idempotent_loss(lf.Linearizer(lf.coupling_flow(4, 2, (8,)), lf.Dense(4)), torch.zeros(2, 4))


def test_trained_is_idempotent_off_the_data_too() -> None:
    objective = idempotent(rank=0.3)
    f = Trainer(objective, TrainSettings(steps=60, batch=32, learning_rate=1e-2)).run(progress=False)
    for x in (objective.data, objective.data + torch.randn(50, 6), 30 * torch.randn(50, 6)):
        once = f(x).detach()
        assert float((f(once).detach() - once).norm() / once.norm()) <= 1e-5


def test_training_keeps_the_coordinates_worth_their_rank() -> None:
    objective = idempotent(rank=0.02, settle=0.6)
    objective.data = torch.randn(200, 6) * torch.tensor([1.0, 0.01, 1.0, 0.01, 1.0, 0.01])
    with torch.no_grad():
        objective.model.A.logits.fill_(0.05)
    f = Trainer(objective, TrainSettings(steps=80, batch=32, learning_rate=1e-2)).run(progress=False)
    assert f.A.mask().tolist() == [1, 0, 1, 0, 1, 0]


def test_projection_settles() -> None:
    objective = idempotent(rank=10.0, settle=0.5)
    trainer = Trainer(objective, TrainSettings(steps=10, batch=8))
    seen = []
    for _ in range(10):
        trainer._one_step(objective)
        trainer.step += 1
        seen.append(float(objective.model.A.logits.grad.abs().sum()))
    assert min(seen[:5]) > 0
    assert max(seen[5:]) == 0


def test_principal_projection_is_the_best_of_its_rank() -> None:
    x = torch.randn(100, 5) * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1]) + 4
    pca = principal_projection(x, 2)
    S = torch.linalg.svdvals((x - x.mean(0)).double())
    torch.testing.assert_close((pca(x) - x).double().square().sum(), S[2:].square().sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(pca(pca(x)), pca(x))


def test_latent_gaussian_has_the_latents_moments() -> None:
    f, x = _model(), torch.randn(300, 6) * 2 + 1
    sample = latent_gaussian(f, x)
    z, expected = f.gx(sample(20_000, seed=0)), f.A(f.gx(x))
    torch.testing.assert_close(z.mean(0), expected.mean(0), atol=0.1, rtol=0)
    torch.testing.assert_close(z.T.cov(), expected.T.cov(), atol=0.3, rtol=0.05)
    assert torch.equal(sample(3, seed=1), sample(3, seed=1))
