"""Under bf16 autocast, and in bf16 modules, derived weights are still computed in fp32."""

from __future__ import annotations

import pytest
import torch

import linfast as lf
from tests.laws import operators_zoo as zoo
from tests.laws.zoo import perturb, relative

MIXES = {
    "lu": lambda: lf.Mix(9),
    "free": lambda: lf.Mix(9, "free"),
    "householder": lambda: lf.Householder(9),
}
ALGEBRA = {
    "inverse": lambda A: A.inverse(),
    "pinv": lambda A: A.pinv(),
    "power": lambda A: A**3,
    "svd": lambda A: A.svd(),
    "eigenvalues": lambda A: A.eig().values.abs().sort().values,
    "matrix": lambda A: A.to_dense(),
    "matrix of a product": lambda A: (A @ A).to_dense(),
    "norm": lambda A: A.norm("fro"),
    "of a product": lambda A: (A @ A + A).inverse(),
}


@pytest.mark.parametrize("what", ALGEBRA)
def test_operator_algebra_is_not_rounded(what: str) -> None:
    A = zoo.low_rank(1.5, 12, 2).float()
    expected = ALGEBRA[what](A)
    with torch.autocast("cpu", torch.bfloat16):
        found = ALGEBRA[what](A)
    assert relative(_numbers(found), _numbers(expected)) <= 1e-6


def _numbers(result) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result.to_dense()


def test_a_time_dependent_operator_has_an_inverse() -> None:
    A, z = zoo.timed(1.0, n=12).float(), zoo.batch(12, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        A_t = A.at(0.3)
        inverse = A_t.inverse()
    assert A_t.U.dtype == torch.float32
    assert relative(inverse(A_t(z)), z) <= 1e-5


@pytest.mark.parametrize("name", MIXES)
def test_a_mix_and_its_inverse_stay_inverse(name: str) -> None:
    g = perturb(MIXES[name]())
    with torch.autocast("cpu", torch.bfloat16):
        W, W_inverse = g._weight(False), g._weight(True)
    assert relative(W @ W_inverse, torch.eye(9)) <= 1e-5


@pytest.mark.parametrize("name", MIXES)
def test_a_mix_in_bf16_inverts(name: str) -> None:
    g, x = perturb(MIXES[name]()).bfloat16(), torch.randn(5, 9).bfloat16()
    z, log_det = g.forward_and_log_det(x)
    assert z.dtype == torch.bfloat16
    assert log_det.dtype == torch.float32
    assert relative(g.inverse(z).float(), x.float()) <= 0.02


def test_a_hundred_steps_do_not_add_up_in_bf16() -> None:
    g = perturb(lf.coupling_flow(6, 4, (8,), mix="lu", time_features=4))
    f = lf.Linearizer(g.at(t=1.0), lf.TimeLowRank(6, 2, alpha=1.0), g.at(t=0.0))
    noise = torch.randn(16, 6)
    expected = lf.sample(f, noise, one_step=False)
    with torch.autocast("cpu", torch.bfloat16):
        found = lf.sample(f, noise, one_step=False)
    assert relative(found.float(), expected) <= 0.05
