"""The errors of a Linearizer; image latents; empty batches; torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import linfast as lf
from tests.laws import operators_zoo as zoo
from tests.laws.test_linearizer import SMALL, allowed, flow, superposition
from tests.laws.zoo import perturb, relative
from tests.marks import long
from tests.seeds import seeded


def image(channels: int, size: int, seed: int = 0) -> lf.Flow:
    torch.manual_seed(seeded(seed))
    return perturb(lf.image_flow(channels, size, depth=2, width=4), seed=seed).double()  # type: ignore[return-value]


def vector(n: int) -> lf.Flow:
    return flow(n, torch.float64, **SMALL)


# name -> (make f, shape of x, shape of y)
SHAPED: dict[str, tuple[Callable[[], lf.Linearizer], tuple[int, ...], tuple[int, ...]]] = {
    "one channel, dense": (lambda: lf.Linearizer(image(1, 4), zoo.dense(16, 16)), (1, 4, 4), (1, 4, 4)),
    "one channel, conv": (lambda: lf.Linearizer(image(1, 4), zoo.conv(1, 3, (4, 4))), (1, 4, 4), (1, 4, 4)),
    "three channels, conv": (lambda: lf.Linearizer(image(3, 4), zoo.conv(3, 2, (4, 4))), (3, 4, 4), (3, 4, 4)),
    "image to less": (lambda: lf.Linearizer(image(1, 4), zoo.dense(8, 16), image(2, 2)), (1, 4, 4), (2, 2, 2)),
    "image to image of as many numbers": (
        lambda: lf.Linearizer(image(1, 4), zoo.dense(16, 16), image(4, 2)), (1, 4, 4), (4, 2, 2),
    ),
    "image to vector of as many numbers": (
        lambda: lf.Linearizer(image(1, 4), zoo.dense(16, 16), vector(16)), (1, 4, 4), (16,),
    ),
    "vector to image": (lambda: lf.Linearizer(vector(16), zoo.dense(16, 16), image(1, 4)), (16,), (1, 4, 4)),
    "vector to longer vector": (lambda: lf.Linearizer(vector(5), zoo.dense(9, 5), vector(9)), (5,), (9,)),
}  # fmt: skip


@pytest.mark.parametrize("what", SHAPED)
def test_latents_take_the_shape_of_each_side(what: str) -> None:
    make, shape_x, shape_y = SHAPED[what]
    f = make()
    u, v = torch.randn(2, 4, *shape_x, dtype=torch.float64)
    y = f(u)
    assert y.shape == (4, *shape_y)
    assert superposition(f, u, v) <= 1e-12
    assert f.T(y).shape == u.shape
    assert relative(f.pinv()(y), u) <= allowed(f.A, u.dtype) or f.A.n_out < f.A.n_in
    left, S, right = f.svd()
    assert (left.shape, right.shape) == ((len(S), *shape_y), (len(S), *shape_x))
    assert relative(f(right), f.space_y.scale(S, left)) <= 1e-11
    assert f(u[:0]).shape == (0, *shape_y)
    assert f.T(y[:0]).shape == (0, *shape_x)


def test_composition_of_images_and_vectors() -> None:
    g, w = image(1, 4), vector(6)
    encode = lf.Linearizer(g, zoo.dense(6, 16), w)
    decode = lf.Linearizer(w, zoo.dense(16, 6), g)
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    assert relative((decode @ encode)(x), decode(encode(x))) <= 1e-12


def test_an_empty_batch_passes_through() -> None:
    f = lf.Linearizer(vector(6), zoo.dense(6, 6))
    empty = torch.zeros(0, 6, dtype=torch.float64)
    for h in (f, f.T, f.pinv(), f**2, f @ f, f + f, f.svd().linearizer()):
        assert h(empty).shape == (0, 6)
    assert f.inverse(empty).shape == (0, 6)
    f(empty).sum().backward()


# Sharing.


def timed_g() -> lf.Flow:
    return flow(6, torch.float64, time_features=8, **SMALL)


def test_one_object_in_one_context_is_one_space() -> None:
    g, A, x = timed_g(), zoo.dense(6, 6), torch.randn(3, 6, dtype=torch.float64)
    f, h = lf.Linearizer(g.at(t=1.0), A, g.at(t=0.0)), lf.Linearizer(g.at(t=0.0), A, g.at(t=1.0))
    assert relative((h @ f)(x), h(f(x))) <= 1e-12
    assert relative(((h @ f) ** 2)(x), h(f(h(f(x))))) <= 1e-12
    assert relative((f + f)(x), (2 * f)(x)) <= 1e-12
    for clash in (lambda: f @ f, lambda: f**2, lambda: f + h, lambda: f - h, lambda: f @ lf.Linearizer(g, A)):
        with pytest.raises(ValueError, match="same"):
            clash()


def test_a_tensor_context_is_one_space_after_a_copy_too() -> None:
    g, t = timed_g(), torch.tensor(1.0, dtype=torch.float64)
    f = lf.Linearizer(g.at(t=t), zoo.dense(6, 6), g.at(t=t)).float()
    assert (f**2)(torch.randn(3, 6)).shape == (3, 6)
    with pytest.raises(ValueError, match="same"):
        lf.Linearizer(g.at(t=t), zoo.dense(6, 6), g.at(t=t + 1)) ** 2


def test_fixing_a_context_in_two_goes_is_one_space() -> None:
    g = flow(6, torch.float64, time_features=8, context_features=2, **SMALL)
    context = torch.ones(3, 2, dtype=torch.float64)
    f = lf.Linearizer(g.at(t=1.0).at(context=context), zoo.dense(6, 6), g.at(t=1.0, context=context))
    assert (f**2)(torch.randn(3, 6, dtype=torch.float64)).shape == (3, 6)


def test_equal_weights_are_not_one_space() -> None:
    f, h = (lf.Linearizer(vector(6), zoo.dense(6, 6)) for _ in range(2))
    with pytest.raises(ValueError, match=r"h @ f needs h.g_x and f.g_y to be the same object"):
        h @ f
    with pytest.raises(ValueError, match="same g_x"):
        h + f
    with pytest.raises(ValueError, match="same g_y"):
        lf.Linearizer(f.g_x, f.A, h.g_x) + f


# Errors, which are raised before any work.


class Untouchable(nn.Module):
    """A g that must not be called."""

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("g was applied before the check")

    inverse = forward


@pytest.mark.parametrize("A", [zoo.deficient(8, 8, 3), zoo.diagonal(1.0, 0.0), lf.Projection(4), zoo.dense(5, 9),
                               lf.LowRank(0.0, torch.ones(4, 1), torch.ones(4, 1))])  # fmt: skip
def test_the_inverse_of_a_singular_operator_raises_and_names_pinv(A: lf.LatentOperator) -> None:
    f = lf.Linearizer(Untouchable(), A)
    with pytest.raises(ValueError, match="pinv"):
        f.inverse(torch.zeros(2, A.n_out))
    with pytest.raises(ValueError, match="pinv"):
        f.A_inverse(torch.zeros(2, A.n_out))
    with pytest.raises(ValueError, match="pinv"):
        f**-1


@pytest.mark.parametrize(
    "other", [torch.ones(6), 3.0, "f", zoo.dense(6, 6), vector(6)], ids=lambda o: type(o).__name__
)
def test_only_linearizers_compose(other: object) -> None:
    f = lf.Linearizer(vector(6), zoo.dense(6, 6))
    with pytest.raises(TypeError, match=r"two Linearizers; got \w+; to apply f to data call f\(x\)"):
        f @ other  # type: ignore[operator]
    with pytest.raises(TypeError, match="two Linearizers"):
        f + other  # type: ignore[operator]
    with pytest.raises(TypeError, match="two Linearizers"):
        f - other  # type: ignore[operator]


def test_only_numbers_scale() -> None:
    f = lf.Linearizer(vector(6), zoo.dense(6, 6))
    for factor in (torch.ones(6), "2", f):
        with pytest.raises(TypeError, match="number or a 0-d tensor"):
            f * factor  # type: ignore[operator]


def test_a_time_dependent_operator_needs_a_time() -> None:
    f = lf.Linearizer(Untouchable(), zoo.timed(1.0))
    x = torch.zeros(4, 8)
    for ask in (
        lambda: f(x),
        lambda: f.inverse(x),
        lambda: f.svd(),
        lambda: f.pinv(),
        lambda: f**2,
        lambda: f.T(x),
    ):
        with pytest.raises(ValueError, match="depends on time"):
            ask()


def test_time_reaches_the_operator() -> None:
    f = lf.Linearizer(vector(8), zoo.timed(1.0))
    x, t = torch.randn(4, 8, dtype=torch.float64), zoo.times()
    assert relative(f(x, t=t), torch.cat([f.at(float(s))(x[i : i + 1]) for i, s in enumerate(t)])) <= 1e-12
    assert relative(f.inverse(f(x, t=t), t=t), x) <= 1e-11
    assert relative((f @ f)(x, t=0.3), f(f(x, t=0.3), t=0.3)) <= 1e-12
    assert relative(f.T(x, t=t), f.at(t).T(x)) <= 1e-12
    with pytest.raises(ValueError, match="one per sample"):
        f.at(t).svd()


def test_inputs_that_do_not_fit_say_so() -> None:
    f = lf.Linearizer(vector(6), zoo.dense(6, 6))
    with pytest.raises(ValueError, match=r"must have 6 features .* got \(4, 7\)"):
        f(torch.zeros(4, 7, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x is torch.float32 and the parameters are torch.float64"):
        f(torch.zeros(4, 6))
    with pytest.raises(ValueError, match="must be floating point"):
        f(torch.zeros(4, 6, dtype=torch.long))
    with pytest.raises(ValueError, match=r"got \(6,\)"):
        f(torch.zeros(6, dtype=torch.float64))


def test_parts_that_do_not_fit_say_so() -> None:
    with pytest.raises(ValueError, match=r"g_x has latents of shape \(6,\) and A is 7 x 7"):
        lf.Linearizer(vector(6), lf.Dense(7))
    with pytest.raises(ValueError, match=r"g_y has latents of shape \(6,\) and A is 7 x 6"):
        lf.Linearizer(vector(6), lf.Dense(7, 6))
    with pytest.raises(TypeError, match="A must be a LatentOperator"):
        lf.Linearizer(vector(6), nn.Linear(6, 6))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="g_y must be a Bijection, or have forward and inverse; got Linear"):
        lf.Linearizer(vector(6), lf.Dense(6), nn.Linear(6, 6))
    with pytest.raises(TypeError, match="g must be a Bijection"):
        lf.InducedSpace(nn.Linear(6, 6))


# torch.compile.

COMPILED: dict[str, Callable[[], lf.LatentOperator]] = {
    "conv": lambda: zoo.conv(1, 2, (2, 3)),
    "low-rank": lambda: zoo.low_rank(nn.Parameter(torch.tensor(1.3, dtype=torch.float64)), 6, 2),
    "nested": lambda: 2.0 * (zoo.dense(6, 6) @ zoo.low_rank(1.3, 6, 2)).T + zoo.diagonal(*range(1, 7)),
}


def _short(A: lf.LatentOperator) -> lf.Linearizer:
    torch.compiler.reset()
    return lf.Linearizer(flow(6, torch.float64, depth=1, hidden=(8,)), A)


@pytest.mark.parametrize("name", ["low-rank", *long("conv", "nested")])
def test_compiles_whole(name: str) -> None:
    f, x = _short(COMPILED[name]()), zoo.batch(6, torch.float64)
    y = f(x)
    assert relative(torch.compile(f, fullgraph=True, backend="aot_eager")(x), y) <= 1e-14
    inverse = torch.compile(f.inverse, fullgraph=True, backend="aot_eager")
    assert relative(inverse(y), f.inverse(y)) <= 1e-14
    pinv = torch.compile(lambda y: f.pinv()(y), fullgraph=True, backend="aot_eager")
    assert relative(pinv(y), f.pinv()(y)) <= 1e-12


@pytest.mark.long
def test_compiles_whole_with_inductor_and_a_time() -> None:
    f, x = _short(zoo.timed(1.0, n=6)), zoo.batch(6, torch.float64)
    t = torch.tensor(0.3, dtype=torch.float64)
    assert relative(torch.compile(f, fullgraph=True)(x, t=t), f(x, t=t)) <= 1e-14


def test_a_shared_g_is_registered_once_and_survives_functional_call() -> None:
    f = lf.Linearizer(lf.coupling_flow(4, 2, (8,)), lf.Dense(4))
    assert f.g_y is f.g_x
    assert len(f.state_dict()) == len(list(f.parameters()))
    x = torch.randn(3, 4)
    before = f(x)
    zeroed = {name: torch.zeros_like(value) for name, value in f.named_parameters()}
    torch.func.functional_call(f, zeroed, (x,))
    torch.testing.assert_close(f(x), before)
    assert all(isinstance(value, torch.nn.Parameter) for value in f.g_x.parameters())
    separate = lf.Linearizer(f.g_x, f.A, lf.coupling_flow(4, 2, (8,)))
    assert separate.g_y is not separate.g_x
    assert any(name.startswith("g_y.") for name in separate.state_dict())
