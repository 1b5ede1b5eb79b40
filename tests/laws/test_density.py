"""lf.Density: its log-probability is that of the change of variables, and its samples follow it."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributions as D
from torch import Tensor, nn

import linfast as lf
from linfast.base_distributions import _mapped
from linfast.sampling.workers import process_group
from tests.laws.zoo import density, perturb
from tests.processes import results_of_two

F64 = torch.float64


def _mixture() -> D.Distribution:
    parts = D.Independent(D.Normal(torch.tensor([[0.0, 1.0], [-1.0, 2.0]]), torch.ones(2, 2) / 2), 1)
    return D.MixtureSameFamily(D.Categorical(torch.tensor([0.3, 0.7])), parts)


def _logistic() -> D.Distribution:
    return D.TransformedDistribution(D.Uniform(torch.zeros(2), torch.ones(2)), [D.SigmoidTransform().inv])


BASES: dict[str, Callable[[], D.Distribution | None]] = {
    "standard": lambda: None,
    "one for all": lambda: D.StudentT(4.0, 0.5, 2.0),
    "a batch": lambda: D.Normal(torch.tensor([0.5, -1.0]), torch.tensor([1.0, 2.0])),
    "independent": lambda: D.Independent(D.Laplace(torch.zeros(2), torch.ones(2)), 1),
    "normal": lambda: D.MultivariateNormal(torch.ones(2), torch.tensor([[2.0, 0.5], [0.5, 1.0]])),
    "mixture": _mixture,
    "logistic": _logistic,
}
every_base = pytest.mark.parametrize("name", BASES)


def _truth(p: lf.Density, base: D.Distribution | None, x: Tensor) -> Tensor:
    """log p(x) from the Jacobian of autograd and the distribution as it was given."""
    of_noise = base or D.Normal(torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64))
    values = []
    for row in x:
        jacobian = torch.autograd.functional.jacobian(lambda v: p.flow(v[None])[0], row)
        values.append(of_noise.log_prob(p.flow(row[None])[0]).sum() + torch.linalg.slogdet(jacobian).logabsdet)
    return torch.stack(values).detach()


@every_base
def test_log_prob_is_that_of_the_change_of_variables(name: str) -> None:
    base = BASES[name]()
    p, x = density(base), torch.randn(6, 2, dtype=F64)
    torch.testing.assert_close(p.log_prob(x).detach(), _truth(p, base, x), rtol=1e-6, atol=1e-6)
    assert torch.equal(p(x), p.log_prob(x))
    single = copy.deepcopy(p).float()
    assert single(x.float()).dtype is torch.float32
    torch.testing.assert_close(single(x.float()).double(), p(x), rtol=1e-4, atol=1e-4)


@every_base
def test_the_density_of_samples_is_returned_with_them(name: str) -> None:
    p = density(BASES[name]())
    x, log_prob = p.sample_and_log_prob(7)
    assert x.shape == (7, 2)
    assert x.dtype is F64
    torch.testing.assert_close(log_prob, p(x), rtol=1e-9, atol=1e-9)


def test_the_density_integrates_to_one_and_samples_follow_it() -> None:
    torch.manual_seed(0)  # a density that the grid covers
    p = density()
    side = torch.linspace(-16, 16, 801, dtype=F64)
    x = torch.cartesian_prod(side, side)
    with torch.no_grad():
        mass = p(x).exp() * float(side[1] - side[0]) ** 2
    assert abs(float(mass.sum()) - 1) < 1e-3
    torch.manual_seed(0)
    # Bounded, so that few samples far away do not decide; 5 standard errors, and 1e-3 of the grid.
    drawn, grid = p.sample(200_000).tanh(), x.tanh()
    expected = mass @ grid
    torch.testing.assert_close(drawn.mean(0), expected, rtol=0, atol=0.0125)
    torch.testing.assert_close(drawn.T @ drawn / len(drawn), grid.T @ (grid * mass[:, None]), rtol=0, atol=0.0125)


def test_gradients_of_samples() -> None:
    p = density()
    assert not p.sample(3).requires_grad
    torch.manual_seed(1)
    z = torch.randn(5, 2, dtype=F64)
    expected = torch.autograd.grad(p.flow.inverse(z).square().sum(), tuple(p.parameters()), allow_unused=True)
    torch.manual_seed(1)
    found = torch.autograd.grad(p.rsample(5).square().sum(), tuple(p.parameters()), allow_unused=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True) if a is not None and b is not None)
    assert any(value is not None and value.abs().max() > 0 for value in found)


def test_a_context_counts_for_one_sample_or_for_all() -> None:
    p, x, context = density(context_features=3), torch.randn(4, 2, dtype=F64), torch.randn(4, 3, dtype=F64)
    rows = torch.cat([p(x[i : i + 1], context[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(p(x, context), rows, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(p(x, context[1]), p(x, context[1:2].expand(4, 3)), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(p(x, context[1]), p(x, context[2]))
    for given in (context[1], context[1:2], context[1:2].expand(4, 3)):
        torch.manual_seed(0)
        drawn = p.sample(4, given)
        torch.manual_seed(0)
        torch.testing.assert_close(drawn, p.flow.inverse(torch.randn(4, 2, dtype=F64), context=context[1:2]))
    context.requires_grad_()
    p.rsample(4, context).sum().backward()
    assert context.grad is not None
    assert context.grad.abs().min() > 0


def test_labels_become_contexts_by_the_embedding() -> None:
    table = nn.Embedding(5, 3)
    p = perturb(lf.Density(lf.coupling_flow(2, 2, (8,), context_features=3), embedding=table), 0.3)
    x, labels = torch.randn(4, 2), torch.tensor([0, 3, 3, 1])
    torch.testing.assert_close(p(x, labels), p.flow.forward_and_log_det(x, context=table(labels))[1] - (
        0.5 * p.flow(x, context=table(labels)).square() + 0.5 * math.log(2 * math.pi)
    ).sum(1))  # fmt: skip
    drawn = []
    for label in (3, torch.tensor(3), torch.tensor([3]), torch.full((6,), 3)):
        torch.manual_seed(0)
        drawn.append(p.sample(6, label))
    assert all(torch.allclose(drawn[0], other, atol=1e-6) for other in drawn[1:])
    p(x, labels).sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad[3].abs().max() > 0
    with pytest.raises(ValueError, match="context must be given"):
        p(x)


def test_wrong_contexts_are_named() -> None:
    p, x = density(context_features=3), torch.randn(4, 2, dtype=F64)
    with pytest.raises(ValueError, match=r"one row for all samples or n = 4 rows; got \(2, 3\)"):
        p.sample(4, torch.randn(2, 3, dtype=F64))
    with pytest.raises(ValueError, match="context=None"):
        p(x)
    with pytest.raises(TypeError, match="context must be a tensor; got 3"):
        p(x, 3)
    with pytest.raises(ValueError, match=r"got torch.int64 \(4,\): for labels give Density an embedding"):
        p(x, torch.tensor([0, 1, 2, 0]))
    labelled = lf.Density(lf.coupling_flow(2, 2, (8,), context_features=3), embedding=nn.Embedding(5, 3))
    for wrong in (7, torch.tensor(9), [1, 2], torch.ones(4)):
        with pytest.raises(ValueError, match=r"context .* is refused by the embedding"):
            labelled(x.float(), wrong)
    with pytest.raises(ValueError, match="one row for all samples or 4 rows, as x has"):
        labelled(x.float(), torch.tensor([1, 2]))
    assert labelled.sample(3, np.int64(2)).shape == (3, 2)
    with pytest.raises(ValueError, match="context_features=0"):
        density()(x, torch.randn(4, 3, dtype=F64))


class _Fails(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, context: Tensor) -> Tensor:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB; see max_split_size_mb"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 800 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(n, compute_type)`"),
        RuntimeError("the server is gone"),
        NotImplementedError("not for this size"),
        KeyError("size"),
    ],
)
def test_errors_inside_an_embedding_that_are_not_of_its_input_are_its_own(error: Exception) -> None:
    p = lf.Density(lf.coupling_flow(2, 2, (8,), context_features=3), embedding=_Fails(error))
    with pytest.raises(type(error)) as raised:
        p(torch.randn(4, 2), torch.randn(4, 5))
    assert raised.value is error


@pytest.mark.parametrize(
    "context", [torch.randn(4, 6), torch.randn(4, 5).double(), torch.randn(4, 5, device="meta")]
)
def test_an_input_that_the_embedding_refuses_is_named(context: Tensor) -> None:
    p = lf.Density(lf.coupling_flow(2, 2, (8,), context_features=3), embedding=nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"context \(4, .\) is refused by the embedding"):
        p(torch.randn(4, 2), context)


def test_images_with_a_context_and_any_shape() -> None:
    p = perturb(lf.Density(lf.Flow([lf.Squeeze(1), lf.ActNorm(4)]), shape=(4, 2, 3)))
    assert p.sample(5).shape == (5, 1, 4, 6)
    image = lf.Density(lf.image_flow(3, 4, 2, 8))
    x, log_prob = image.sample_and_log_prob(2)
    assert x.shape == (2, 3, 4, 4)
    torch.testing.assert_close(log_prob, D.Normal(0.0, 1.0).log_prob(image.flow(x)).sum((1, 2, 3)) + (
        image.flow.forward_and_log_det(x)[1]
    ))  # fmt: skip
    with pytest.raises(ValueError, match="the shape of z is not known: pass it to Density"):
        lf.Density(lf.Flow([])).sample(1)


@every_base
def test_files_pickles_and_copies_keep_the_density(name: str, tmp_path: Path) -> None:
    p, x = density(BASES[name]()).standardize(3 + 2 * torch.randn(50, 2, dtype=F64)), torch.randn(3, 2, dtype=F64)
    if name == "logistic":
        with pytest.raises(
            TypeError, match="cannot save a base of class TransformedDistribution: give Density a module"
        ):
            lf.save(p, tmp_path / "p.safetensors")
    else:
        lf.save(p, tmp_path / "p.safetensors")
        assert torch.equal(lf.load(tmp_path / "p.safetensors")(x), p(x))
        assert torch.equal(pickle.loads(pickle.dumps(p))(x), p(x))
    assert torch.equal(copy.deepcopy(p)(x), p(x))


def test_labels_are_saved_with_their_embedding(tmp_path: Path) -> None:
    p = lf.Density(lf.coupling_flow(2, 2, (8,), context_features=3), embedding=nn.Embedding(5, 3))
    x, labels = torch.randn(4, 2), torch.tensor([0, 3, 3, 1])
    lf.save(perturb(p), tmp_path / "p.safetensors")
    assert torch.equal(lf.load(tmp_path / "p.safetensors")(x, labels), p(x, labels))


class _Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2))

    def forward(self) -> D.Distribution:
        return D.Independent(D.Normal(self.loc, torch.ones_like(self.loc)), 1)


class _Returning(nn.Module):
    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self) -> object:
        return self.value


def test_a_module_is_a_base_that_is_trained() -> None:
    p = density(_Learned())
    p(torch.randn(3, 2, dtype=F64)).sum().backward()
    assert p.base is not None
    assert p.base.loc.grad.abs().min() > 0  # type: ignore[union-attr, operator]
    assert p.sample(4).shape == (4, 2)


def test_bases_that_do_not_fit_are_refused() -> None:
    flow = lf.coupling_flow(2)
    with pytest.raises(ValueError, match=r"base is over values of shape \(3,\), and one z has shape \(2,\)"):
        lf.Density(flow, D.Normal(torch.zeros(3), torch.ones(3)))
    with pytest.raises(ValueError, match="require a gradient"):
        lf.Density(flow, D.Normal(torch.zeros(2, requires_grad=True), torch.ones(2)))
    with pytest.raises(ValueError, match="base must be a distribution of real numbers; got a Categorical"):
        lf.Density(flow, D.Categorical(torch.ones(3)))
    with pytest.raises(ValueError, match=r"shape must begin with the 2 features of z; got \(3,\)"):
        lf.Density(flow, shape=(3,))
    with pytest.raises(TypeError, match="base must be"):
        lf.Density(flow, "normal")  # type: ignore[arg-type]
    wrong = _Learned()
    wrong.loc = nn.Parameter(torch.zeros(3))
    for call in (lambda p: p(torch.randn(4, 2)), lambda p: p.sample(4)):
        with pytest.raises(ValueError, match=r"base is over values of shape \(3,\), and one z has shape \(2,\)"):
            call(lf.Density(flow, wrong))
        with pytest.raises(TypeError, match=r"base must return a torch\.distributions distribution; got a Tensor"):
            call(lf.Density(flow, _Returning(torch.zeros(2))))


@pytest.mark.parametrize("independent", [False, True])
def test_outside_its_support_a_base_has_no_density(independent: bool) -> None:
    """zuko turns torch's own check off for the whole process; where it is on, it raises."""
    base: D.Distribution = D.Exponential(torch.ones(2), validate_args=False)
    base = D.Independent(base, 1, validate_args=False) if independent else base
    p, x = lf.Density(lf.Flow([lf.Permute(2)]), base), torch.tensor([[-1.0, 2.0], [3.0, 2.0], [1.0, -2.0]])
    torch.testing.assert_close(p(x), torch.tensor([-math.inf, -5.0, -math.inf]))
    uniform = lf.Density(lf.Flow([lf.Permute(2)]), D.Uniform(torch.zeros(2), 4 * torch.ones(2)))
    torch.testing.assert_close(uniform(x), torch.tensor([-math.inf, -2 * math.log(4.0), -math.inf]))
    with pytest.raises(ValueError, match="support"):
        lf.Density(lf.Flow([lf.Permute(2)]), D.Exponential(torch.ones(2), validate_args=True))(x)
    with pytest.raises(TypeError, match="flow must be a Bijection"):
        lf.Density(nn.Linear(2, 2))  # type: ignore[arg-type]


class _LearnedMixture(_Learned):
    def forward(self) -> D.Distribution:
        parts = D.Independent(D.Normal(self.loc + torch.ones(3, 2), torch.ones(3, 2)), 1)
        return D.MixtureSameFamily(D.Categorical(torch.ones(3)), parts)


def test_no_gradient_of_a_learned_base_is_lost() -> None:
    p = lf.Density(lf.coupling_flow(2), _LearnedMixture())
    assert p.sample(3).shape == (3, 2)
    with pytest.raises(NotImplementedError, match="MixtureSameFamily has no rsample"):
        p.rsample(3)


# How it runs


@pytest.mark.parametrize("compiled", [False, True])
def test_compiled_and_under_autocast(compiled: bool) -> None:
    p = perturb(lf.Density(lf.coupling_flow(4, 2, (8,), context_features=3), D.Laplace(0.0, 1.0)), 0.3)
    x, context = torch.randn(6, 4), torch.randn(1, 3)
    run = torch.compile(p, fullgraph=True, backend="aot_eager") if compiled else p
    torch.testing.assert_close(run(x, context), p(x, context))
    with torch.autocast("cpu", torch.bfloat16):
        found = run(x, context)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, p(x, context), rtol=0.05, atol=0.1)


def test_a_base_is_computed_in_single_precision_or_wider() -> None:
    torch.manual_seed(0)
    base = D.LowRankMultivariateNormal(torch.zeros(8), torch.randn(8, 3), torch.full((8,), 0.01))
    p, x = lf.Density(lf.Flow([lf.Permute(8)]), base), torch.randn(20, 8)
    expected = base.log_prob(p.flow(x))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(p(x), expected)
        drawn, log_prob = p.sample_and_log_prob(5)
        torch.testing.assert_close(p(drawn), log_prob)
    half = lf.Density(perturb(lf.coupling_flow(8, 2, (8,))), base).bfloat16()
    torch.testing.assert_close(
        half(x.bfloat16()), base.log_prob(half.flow(x.bfloat16()).float()), rtol=0.05, atol=1.0
    )
    assert half.sample(3).dtype is torch.bfloat16
    double = lf.Density(lf.coupling_flow(8, 2, (8,)).double(), base)
    torch.testing.assert_close(double(x.double()).float(), base.log_prob(x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["logistic", "independent"])
def test_a_copy_shares_nothing_with_the_density(name: str) -> None:
    p, x = density(BASES[name]()), torch.randn(3, 2, dtype=F64)
    other, before = copy.deepcopy(p), p(x)
    assert other.base is not None
    _mapped(other.base().base_dist, lambda tensor: tensor.add_(1))  # type: ignore[operator]
    assert torch.equal(p(x), before)


def test_freeze_keeps_a_density() -> None:
    p, x = density().standardize(torch.randn(50, 2, dtype=F64)), torch.randn(3, 2, dtype=F64)
    with torch.no_grad(), lf.freeze(p):
        assert torch.equal(p(x), p(x))
        torch.testing.assert_close(p(x), p.log_prob(x.clone()))
        assert p.sample(4).shape == (4, 2)


def test_gradients_per_sample_and_empty_batches() -> None:
    p, x = density(), torch.randn(20, 2, dtype=F64)
    weights = dict(p.named_parameters())

    def loss(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(p, weights, (row[None],))[0]

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    total = torch.autograd.grad(p(x).sum(), tuple(weights.values()))
    raw = density()  # its scale is not known, and no batched x can be read
    torch.testing.assert_close(torch.func.vmap(raw)(x.reshape(1, 20, 2))[0], raw(x))
    for value, expected in zip(found.values(), total, strict=True):
        torch.testing.assert_close(value.sum(0), expected)
    assert p(x[:0]).shape == (0,)
    assert p.sample(0).shape == (0, 2)
    assert p.to("meta")(x.to("meta")).shape == (20,)


def _square_of_a_gradient() -> float:
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(perturb(lf.Density(lf.coupling_flow(2, 2, (8,)))))
    x = torch.randn(8, 2).chunk(2)[torch.distributed.get_rank()]
    (-model(x).mean()).backward()
    return float(sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None))


def _one_of_two() -> float:
    with process_group(torch.device("cpu")):
        return _square_of_a_gradient()  # DDP must end before its process group


def test_two_processes_have_the_gradient_of_one() -> None:
    found = results_of_two(_one_of_two)
    torch.manual_seed(0)
    p = perturb(lf.Density(lf.coupling_flow(2, 2, (8,))))
    (-p(torch.randn(8, 2)).mean()).backward()  # type: ignore[operator]
    expected = float(sum(q.grad.square().sum() for q in p.parameters() if q.grad is not None))
    assert found == pytest.approx([expected] * 2, rel=1e-5)
