"""Laws of the Linearizer: f is linear in the induced spaces, and its algebra is that of linear maps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import linfast as lf
from tests.laws import operators_zoo as zoo
from tests.laws.operators_zoo import DTYPES, OPERATORS
from tests.laws.zoo import perturb, relative
from tests.marks import long
from tests.seeds import seeded

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
float64_first = pytest.mark.parametrize(
    "dtype", [torch.float64, *long(torch.float32)], ids=lambda dtype: str(dtype)[6:]
)
every_operator = pytest.mark.parametrize("name", OPERATORS)
SMALL = {"depth": 4, "hidden": (16,)}


def flow(n: int, dtype: torch.dtype, seed: int = 0, **options: object) -> lf.Flow:
    torch.manual_seed(seeded(seed))
    return perturb(lf.coupling_flow(n, **options), seed=seed).to(dtype)  # type: ignore[arg-type, return-value]


def over(A: lf.LatentOperator, dtype: torch.dtype) -> lf.Linearizer:
    """A between two small flows of its widths."""
    return lf.Linearizer(flow(A.n_in, dtype, **SMALL), A, flow(A.n_out, dtype, seed=1, **SMALL))


def allowed(A: lf.LatentOperator, dtype: torch.dtype) -> float:
    """The bounds of issue 2 at depth 8 (f is two flows of depth 4), times the conditioning of A."""
    return {torch.float64: 1e-12, torch.float32: 1e-5}[dtype] * max(1.0, zoo.condition(A) / 20)


def superposition(f: lf.Linearizer, u: Tensor, v: Tensor) -> float:
    """The relative distance of f(a (.) u (+) b (.) v) from a (.) f(u) (+) b (.) f(v)."""
    a, b = 0.7, -1.3
    X, Y = f.space_x, f.space_y
    return relative(f(X.add(X.scale(a, u), X.scale(b, v))), Y.add(Y.scale(a, f(u)), Y.scale(b, f(v))))


@every_dtype
@pytest.mark.parametrize("depth", [1, 8, 32])
@pytest.mark.parametrize("shared", [True, False])
def test_is_linear_in_the_induced_spaces(dtype: torch.dtype, depth: int, shared: bool) -> None:
    g_x = flow(64, dtype, depth=depth)
    g_y = None if shared else flow(64, dtype, seed=1, depth=depth)
    f = lf.Linearizer(g_x, lf.Dense(64).to(dtype), g_y)
    u, v = torch.randn(2, 64, 64, dtype=dtype)
    limit = 1e-12 if dtype == torch.float64 else 3e-5 if depth == 32 else 1e-5
    assert superposition(f, u, v) <= limit
    assert relative(f(u + v), f(u) + f(v)) > 1e-3  # and not in the ordinary spaces


@every_operator
@float64_first
def test_every_operator_makes_a_linear_map(name: str, dtype: torch.dtype) -> None:
    A = zoo.build(name, dtype)
    f = over(A, dtype)
    u, v = zoo.batch(A.n_in, dtype), zoo.batch(A.n_in, dtype, seed=8)
    assert f(u).shape == (zoo.BATCH, A.n_out)
    assert superposition(f, u, v) <= allowed(A, dtype)


@every_operator
def test_transpose_is_the_adjoint_in_the_induced_spaces(name: str) -> None:
    A = zoo.build(name)
    f, x, y = over(A, torch.float64), zoo.batch(A.n_in, torch.float64), zoo.batch(A.n_out, torch.float64, seed=8)
    left, right = f.space_y.inner(f(x), y), f.space_x.inner(x, f.T(y))
    size = zoo.matrix(A).norm().clamp(min=1.0) * f.space_x.norm(x).norm() * f.space_y.norm(y).norm()
    assert zoo.distance(left, right, size.detach()) <= 1e-12
    assert f.T.T.A(x).equal(f.A(x))


@every_operator
@float64_first
def test_pinv_meets_the_penrose_conditions_on_data(name: str, dtype: torch.dtype) -> None:
    A = zoo.build(name, dtype)
    f = over(A, dtype)
    p, limit = f.pinv(), allowed(A, dtype)
    x, y = zoo.batch(A.n_in, dtype), zoo.batch(A.n_out, dtype)
    assert relative(f(p(f(x))), f(x)) <= limit
    assert relative(p(f(p(y))), p(y)) <= limit
    for space, onto, v in ((f.space_y, lambda y: f(p(y)), y), (f.space_x, lambda x: p(f(x)), x)):
        w = v.flip(0) if not zoo.is_batched(A) else v.flip(1)
        size = space.norm(v).norm() * space.norm(w).norm()
        assert zoo.distance(space.inner(onto(v), w), space.inner(v, onto(w)), size.detach()) <= limit


@pytest.mark.parametrize("name", zoo.INVERTIBLE)
@float64_first
def test_inverse_undoes(name: str, dtype: torch.dtype) -> None:
    A = zoo.build(name, dtype)
    f, x = over(A, dtype), zoo.batch(A.n_in, dtype)
    assert relative(f.inverse(f(x)), x) <= allowed(A, dtype)
    assert relative(f(f.inverse(x)), x) <= allowed(A, dtype)
    assert relative(f.gx_inverse(f.A_inverse(f.gy(x))), f.inverse(x)) == 0.0


@every_dtype
def test_composition_is_application_in_turn(dtype: torch.dtype) -> None:
    g_x, g_y, g_z = (flow(n, dtype, seed=n, **SMALL) for n in (6, 9, 5))
    f = lf.Linearizer(g_x, zoo.dense(9, 6).to(dtype), g_y)
    h = lf.Linearizer(g_y, zoo.dense(5, 9).to(dtype), g_z)
    x = torch.randn(16, 6, dtype=dtype)
    assert relative((h @ f)(x), h(f(x))) <= allowed(h.A, dtype)
    assert relative((h @ f).T(h(f(x))), f.T(h.T(h(f(x))))) <= allowed(h.A, dtype)


@every_dtype
def test_sums_and_multiples_are_those_of_the_output_space(dtype: torch.dtype) -> None:
    g_x, g_y = flow(6, dtype, **SMALL), flow(9, dtype, seed=1, **SMALL)
    f = lf.Linearizer(g_x, zoo.dense(9, 6).to(dtype), g_y)
    h = lf.Linearizer(g_x, zoo.low_rank(0.0, 9, 2, 6).to(dtype), g_y)
    x, Y, factor = torch.randn(16, 6, dtype=dtype), f.space_y, torch.tensor(1.7, dtype=dtype)
    limit = allowed(f.A, dtype)
    assert relative((f + h)(x), Y.add(f(x), h(x))) <= limit
    assert relative((f - h)(x), Y.add(f(x), Y.neg(h(x)))) <= limit
    assert relative((-f)(x), Y.neg(f(x))) <= limit
    assert relative((2 * f)(x), Y.add(f(x), f(x))) <= limit
    assert relative((f * factor)(x), Y.scale(factor, f(x))) <= limit
    assert relative((factor * f)(x), Y.scale(factor, f(x))) <= limit
    assert relative((f / 4)(x), Y.scale(0.25, f(x))) <= limit
    assert relative((f - f)(x), Y.zero(f(x))) <= limit


def test_the_views_are_live() -> None:
    g, A = flow(6, torch.float64, **SMALL), zoo.dense(6, 6)
    f, x = lf.Linearizer(g, A), torch.randn(4, 6, dtype=torch.float64)
    views, snapshots = (f.T, f @ f, f + f, 2 * f, f - f.T), (f.pinv(), f**2, f.svd().linearizer())
    before = [view(x) for view in (*views, *snapshots)]
    perturb(A, std=0.5)
    for view, old in zip(views, before, strict=False):
        assert relative(view(x), old) > 1e-2
    for snapshot, old in zip(snapshots, before[len(views) :], strict=True):
        assert torch.equal(snapshot(x), old)


@pytest.mark.parametrize("name", zoo.SQUARE)
def test_powers_are_repeated_applications(name: str) -> None:
    A = zoo.build(name)
    f = lf.Linearizer(flow(A.n_in, torch.float64, **SMALL), A)
    x = applied = zoo.batch(A.n_in, torch.float64)
    for n in range(4):
        assert relative((f**n)(x), applied) <= 1e-11
        applied = f(applied)
    if name in zoo.INVERTIBLE:
        assert relative((f**-2)(x), f.inverse(f.inverse(x))) <= allowed(A, torch.float64)


def test_power_fifty_is_fifty_applications() -> None:
    f = lf.Linearizer(flow(64, torch.float32), lf.Dense(64))
    f.A.weight.data.mul_(0.99)
    x = applied = torch.randn(64, 64)
    for _ in range(50):
        applied = f(applied)
    assert relative((f**50)(x), applied) <= 1e-4
    assert relative((f**50)(x), f.space_x.zero(x)) > 0.1


@pytest.mark.parametrize("name", [name for name in OPERATORS if not zoo.is_batched(zoo.build(name))])
def test_svd_is_a_singular_system_of_data(name: str) -> None:
    A = zoo.build(name)
    f = over(A, torch.float64)
    left, S, right = svd = f.svd()
    eye, limit = torch.eye(len(S), dtype=torch.float64), allowed(A, torch.float64)
    for space, vectors in ((f.space_y, left), (f.space_x, right)):
        gram = space.inner(vectors.repeat_interleave(len(S), 0), vectors.repeat(len(S), 1)).reshape(eye.shape)
        assert zoo.distance(gram, eye, max(float(eye.norm()), 1.0)) <= limit
    if len(S):
        assert zoo.distance(f(right), f.space_y.scale(S, left), f(right).detach().norm()) <= limit
    x = zoo.batch(A.n_in, torch.float64)
    assert relative(svd.linearizer()(x), f(x)) <= limit


class _LacksAPart(nn.Module):
    def inverse(self, z: Tensor) -> Tensor:
        return self.part(z)  # type: ignore[no-any-return]


def test_an_svd_is_indexed_and_shown() -> None:
    tall = lf.Linearizer(lf.coupling_flow(4, 1, (4,)), lf.Dense(16, 4), lf.image_flow(1, 4, 1, 4))
    svd = tall.svd()
    assert repr(svd) == "LinearizerSVD(left=[4, 1, 4, 4], S=[4], right=[4, 4])"
    assert all(torch.equal(a, b) for a, b in zip((svd[0], svd[1], svd[-1]), svd, strict=True))
    assert (svd.left.shape, svd.right.shape) == ((4, 1, 4, 4), (4, 4))
    assert all(torch.equal(a, b) for a, b in zip(svd, (svd.left, svd.S, svd.right), strict=True))
    assert len(svd) == 3
    with pytest.raises(IndexError):
        svd[3]
    with pytest.raises(TypeError, match=r"index must be 0 \(left\), 1 \(S\) or 2 \(right\); got slice"):
        svd[0:2]  # type: ignore[index]
    for name in ("U", "V", "Vh"):
        assert not hasattr(svd, name)
        with pytest.raises(AttributeError, match="see left and right, or operator for the SVD of A"):
            getattr(svd, name)
    svd.g_y = _LacksAPart()
    with pytest.raises(AttributeError, match="'_LacksAPart' object has no attribute 'part'"):
        svd.left  # noqa: B018
    assert torch.equal(copy.copy(svd).S, svd.S)


@pytest.mark.parametrize(
    "name", ["dense-square", "dense-tall", "dense-deficient", "low-rank-zero-wide", "conv-even"]
)
@pytest.mark.parametrize("rank", [0, 1, 2, 5])
def test_truncated_svd_is_the_nearest_of_its_rank(name: str, rank: int) -> None:
    A = zoo.build(name)
    truncated = over(A, torch.float64).svd().linearizer(rank).A
    S = torch.linalg.svdvals(zoo.matrix(A))
    gap = torch.linalg.matrix_norm(zoo.matrix(A) - zoo.matrix(truncated), 2)
    truth = S[rank] if rank < len(S) else torch.zeros(())
    assert zoo.distance(gap, truth, S[0]) <= zoo.bound(A, torch.float64)
    assert int(truncated.rank()) == min(rank, int(A.rank()))


def test_truncation_needs_preferred_vectors() -> None:
    axes = torch.eye(8, dtype=torch.float64)[:, :2]
    f = over(lf.LowRank(1.0, 3 * axes, axes), torch.float64)
    assert int(f.svd().linearizer(2).A.rank()) == 2
    with pytest.raises(ValueError, match="rank 5 would keep some of the singular values that all equal 1 "):
        f.svd().linearizer(5)
    with pytest.raises(ValueError, match="rank must be at least 0; got -1"):
        f.svd().linearizer(-1)


@pytest.mark.parametrize(("scale", "limit"), [(1.0, 1e-5), (30.0, 1e-4)])
def test_projection_makes_an_idempotent_network(scale: float, limit: float) -> None:
    f = lf.Linearizer(flow(64, torch.float32), lf.Projection(64))
    data = (
        torch.linspace(-1, 1, 64)
        + 0.3 * torch.sin(torch.arange(64) * torch.rand(64, 1))
        + 0.02 * torch.randn(64, 64)
    )
    for x in (scale * torch.randn(256, 64), scale * data):
        once = f(x)
        assert relative(f(once), once) <= limit
        assert relative(once, x) > 0.1
