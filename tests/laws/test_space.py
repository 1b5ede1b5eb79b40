"""Laws of InducedSpace: the axioms of a Hilbert space, on vectors and on images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import linfast as lf
from tests.laws.operators_zoo import DTYPES
from tests.laws.zoo import perturb, relative
from tests.seeds import seeded

SPACES = {
    "default": (lambda: lf.coupling_flow(64), (64,)),
    "odd": (lambda: lf.coupling_flow(7, depth=3, hidden=(16,)), (7,)),
    "image": (lambda: lf.image_flow(1, 4, depth=2, width=8), (1, 4, 4)),
}
COUNT = 16
every_space = pytest.mark.parametrize("name", SPACES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5}  # bounds on linearity, from issue 2


def build(name: str, dtype: torch.dtype, count: int = 3) -> tuple[lf.InducedSpace, Tensor]:
    """The space, and ``count`` batches of vectors."""
    make, shape = SPACES[name]
    torch.manual_seed(seeded(0))
    V = lf.InducedSpace(perturb(make()).to(dtype))
    return V, torch.randn(count, COUNT, *shape, dtype=dtype)


@every_space
@every_dtype
def test_addition_is_that_of_an_abelian_group(name: str, dtype: torch.dtype) -> None:
    V, (u, v, w) = build(name, dtype)
    limit = LIMIT[dtype]
    assert torch.equal(V.add(u, v), V.add(v, u))
    assert relative(V.add(V.add(u, v), w), V.add(u, V.add(v, w))) <= limit
    assert relative(V.add(u, V.zero(u)), u) <= limit
    assert float((V.add(u, V.neg(u)) - V.zero(u)).detach().norm()) <= limit * float(u.norm())
    assert relative(V.neg(V.neg(u)), u) <= limit
    assert relative(V.add(u, v), u + v) > 1e-4


@every_space
@every_dtype
def test_scaling_distributes(name: str, dtype: torch.dtype) -> None:
    V, (u, v, _) = build(name, dtype)
    limit, a, b = LIMIT[dtype], 1.7, -0.6
    assert relative(V.scale(a, V.add(u, v)), V.add(V.scale(a, u), V.scale(a, v))) <= limit
    assert relative(V.scale(a + b, u), V.add(V.scale(a, u), V.scale(b, u))) <= limit
    assert relative(V.scale(a, V.scale(b, u)), V.scale(a * b, u)) <= limit
    assert relative(V.scale(1.0, u), u) <= limit
    assert relative(V.scale(-1, u), V.neg(u)) <= limit
    assert torch.equal(V.scale(0.0, u), V.zero(u))


@every_space
def test_a_factor_is_a_number_a_tensor_or_one_per_row(name: str) -> None:
    V, (u, v, _) = build(name, torch.float32)
    factors = torch.linspace(-1, 2, COUNT, dtype=torch.float64)
    a_row, row_by_row = V.scale(factors, u), [V.scale(float(a), u[i : i + 1]) for i, a in enumerate(factors)]
    assert a_row.dtype == torch.float32
    assert relative(a_row, torch.cat(row_by_row)) <= LIMIT[torch.float32]
    assert torch.equal(V.scale(torch.tensor(2.0), u), V.scale(2.0, u))
    between = torch.cat([V.interpolate(u[i : i + 1], v[i : i + 1], float(t)) for i, t in enumerate(factors)])
    assert relative(V.interpolate(u, v, factors), between) <= LIMIT[torch.float32]
    with pytest.raises(ValueError, match=rf"a must be a number, 0-d or \[{COUNT}\], one per row; got \(3,\)"):
        V.scale(torch.ones(3), u)


@every_space
@every_dtype
def test_combinations_interpolation_and_mean(name: str, dtype: torch.dtype) -> None:
    V, (u, v, _) = build(name, dtype)
    limit, weights = LIMIT[dtype], torch.randn(2, 3)
    combined = V.combine(weights, u[:3])
    for m in range(2):
        parts = [V.scale(float(a), u[k : k + 1]) for k, a in enumerate(weights[m])]
        assert relative(combined[m : m + 1], V.add(V.add(parts[0], parts[1]), parts[2])) <= limit
        assert relative(V.combine(weights[m], u[:3]), combined[m : m + 1]) <= limit
    assert relative(V.interpolate(u, v, 0.0), u) <= limit
    assert relative(V.interpolate(u, v, 1.0), v) <= limit
    assert relative(V.interpolate(u, v, 0.25), V.add(V.scale(0.75, u), V.scale(0.25, v))) <= limit
    assert relative(V.mean(u), V.combine(torch.full((COUNT,), 1 / COUNT, dtype=dtype), u)) <= limit
    assert relative(V.mean(u[:1]), u[:1]) <= limit


@every_space
def test_a_batch_of_one_is_broadcast(name: str) -> None:
    V, (u, v, _) = build(name, torch.float64)
    one = u[:1]
    repeated = one.expand_as(v).contiguous()
    assert relative(V.add(one, v), V.add(repeated, v)) <= 1e-14
    t = torch.linspace(0, 1, COUNT)
    assert relative(V.interpolate(one, v, t), V.interpolate(repeated, v, t)) <= 1e-14
    path = V.interpolate(one, v[:1].expand(COUNT, *v.shape[1:]), t)
    assert relative(path[:1], one) <= 1e-12
    assert relative(path[-1:], v[:1]) <= 1e-12


@every_space
@every_dtype
def test_inner_norm_and_distance_agree(name: str, dtype: torch.dtype) -> None:
    V, (u, v, w) = build(name, dtype)
    limit = LIMIT[dtype]
    assert V.inner(u, v).shape == V.norm(u).shape == V.distance(u, v).shape == (COUNT,)
    assert relative(V.inner(u, u), V.norm(u).square()) <= limit
    assert relative(V.distance(u, v), V.norm(V.add(u, V.neg(v)))) <= limit
    assert relative(V.norm(V.scale(-3.0, u)), 3 * V.norm(u)) <= limit
    assert torch.equal(V.inner(u, v), V.inner(v, u))
    size = float(V.norm(w).detach().norm() * (V.norm(u) + V.norm(v)).detach().norm())
    assert float((V.inner(V.add(u, v), w) - V.inner(u, w) - V.inner(v, w)).detach().norm()) <= limit * size
    assert bool((V.inner(u, v).abs() <= V.norm(u) * V.norm(v) * (1 + limit)).all())
    assert bool((V.norm(V.add(u, v)) <= (V.norm(u) + V.norm(v)) * (1 + limit)).all())
    assert float(V.norm(V.zero(u)).detach().max()) <= limit
    assert float(V.distance(u, u).detach().max()) == 0.0


@every_space
@every_dtype
def test_project_is_orthogonal(name: str, dtype: torch.dtype) -> None:
    V, (v, basis, _) = build(name, dtype)
    limit, basis = LIMIT[dtype], basis[:3]
    nearest = V.project(v, basis)
    assert relative(V.project(nearest, basis), nearest) <= limit
    assert relative(V.project(basis, basis), basis) <= limit
    residual = V.add(v, V.neg(nearest))
    for b in basis:
        b = b.expand_as(v)
        assert float(V.inner(residual, b).detach().norm()) <= limit * float((V.norm(v) * V.norm(b)).detach().norm())
    other = V.combine(torch.randn(COUNT, 3, dtype=dtype), basis)
    assert bool((V.distance(v, nearest) <= V.distance(v, other)).all())


@every_space
@every_dtype
def test_project_on_a_dependent_basis(name: str, dtype: torch.dtype) -> None:
    V, (v, basis, _) = build(name, dtype)
    basis = basis[:2]
    dependent = torch.cat((basis, V.combine(torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=dtype), basis)))
    assert relative(V.project(v, dependent), V.project(v, basis)) <= 3 * LIMIT[dtype]
    assert torch.equal(V.project(v, basis[:0]), V.zero(v))
    everything = V.project(v, torch.randn(100, *v.shape[1:], dtype=dtype))
    assert relative(everything, v) <= LIMIT[dtype]


def test_context_belongs_to_the_space() -> None:
    g = perturb(lf.coupling_flow(6, depth=2, hidden=(16,), time_features=8)).double()
    u, v = torch.randn(2, 4, 6, dtype=torch.float64)
    assert torch.equal(lf.InducedSpace(g, t=0.3).add(u, v), lf.InducedSpace(g.at(t=0.3)).add(u, v))
    assert relative(lf.InducedSpace(g, t=0.3).add(u, v), lf.InducedSpace(g, t=0.9).add(u, v)) > 1e-6


@every_space
def test_empty_batches(name: str) -> None:
    V, (u, v, _) = build(name, torch.float64)
    empty = u[:0]
    for result in (V.add(empty, empty), V.scale(2.0, empty), V.neg(empty), V.zero(empty), V.project(empty, v)):
        assert result.shape == empty.shape
    assert V.inner(empty, empty).shape == V.norm(empty).shape == (0,)
    assert torch.equal(V.combine(torch.zeros(2, 0), empty), V.zero(u[:2]))
    with pytest.raises(ValueError, match="mean of no vectors"):
        V.mean(empty)
    with pytest.raises(ValueError, match=r"\[K\] or \[M, K\] for vectors .*; got \(2, 3\)"):
        V.combine(torch.zeros(2, 3), u)
