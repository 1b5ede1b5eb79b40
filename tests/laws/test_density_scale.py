"""lf.Density and the scale of the data: standardize, and the warning where data are far from unit scale."""

from __future__ import annotations

import copy
import gc
import math
import warnings

import pytest
import torch

import linfast as lf
from tests.laws.zoo import density, perturb

F64 = torch.float64


def test_a_standardised_density_is_the_same_in_other_units() -> None:
    """With equal weights, the density of a x + b is that of x, less log|a| per feature."""
    x = torch.randn(300, 2, dtype=F64) @ torch.tensor([[1.0, 0.4], [0.0, 0.7]], dtype=F64)
    scale, shift = torch.tensor([1000.0, 0.001], dtype=F64), torch.tensor([5000.0, -3.0], dtype=F64)
    plain = density()
    other = copy.deepcopy(plain).standardize(scale * x + shift)
    plain.standardize(x)
    torch.testing.assert_close(other(scale * x + shift), plain(x) - scale.log().sum(), rtol=1e-9, atol=1e-8)
    torch.manual_seed(0)
    drawn = plain.sample(5)
    torch.manual_seed(0)
    torch.testing.assert_close(other.sample(5), scale * drawn + shift, rtol=1e-9, atol=1e-9)
    z = plain.flow[0](x)
    torch.testing.assert_close(z.mean(0), torch.zeros(2, dtype=F64), rtol=0, atol=1e-12)
    torch.testing.assert_close(z.std(0), torch.ones(2, dtype=F64))
    assert not any(value.requires_grad for value in plain.flow[0].parameters())


def test_images_are_standardised_per_channel() -> None:
    x = torch.randn(20, 2, 4, 4) * torch.tensor([3.0, 50.0]).view(2, 1, 1) + 7
    z = lf.Density(lf.image_flow(2, 4, 2, 8)).standardize(x).flow[0](x)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(2), rtol=1e-5, atol=0)


def test_standardize_says_what_it_cannot_do() -> None:
    p = lf.Density(lf.coupling_flow(2, 2, (8,)))
    with pytest.raises(ValueError, match=r"constant in features \[1\]"):
        p.standardize(torch.stack((torch.randn(9), torch.full((9,), 0.1)), 1))
    with pytest.raises(ValueError, match="x must have 2 features"):
        p.standardize(torch.randn(9, 3))
    with pytest.raises(ValueError, match="non-finite"):
        p.standardize(torch.full((9, 2), math.inf))
    p.standardize(torch.randn(9, 2))
    with pytest.raises(RuntimeError, match="begins with an ActNorm already"):
        p.standardize(torch.randn(9, 2))


def test_data_far_from_unit_scale_give_one_warning_in_training() -> None:
    p = lf.Density(lf.coupling_flow(2, 2, (8,)))
    far = 5000 + 1000 * torch.randn(50, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p.eval()(far)
        p.train()(far[:2])  # too few to tell
        lf.Density(lf.coupling_flow(2, 2, (8,)))(torch.randn(50, 2))
    with pytest.warns(UserWarning, match=r"feature 0: mean [45]\d+, deviation \d+.*call p.standardize"):
        p(far)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p(far)
        lf.Density(lf.coupling_flow(2, 2, (8,))).standardize(far)(far)
        raises = lf.Density(lf.coupling_flow(2, 2, (8,)))
        with pytest.raises(UserWarning, match=r"call p\.standardize"):
            raises(far)
        raises(far)  # a warning that is an error is raised once, too
    with pytest.warns(UserWarning, match="feature 1: mean .*, deviation 0.00"):
        lf.Density(lf.coupling_flow(2, 2, (8,)))(torch.randn(50, 2) * torch.tensor([1.0, 1e-3]))


def test_what_standardize_keeps() -> None:
    p = lf.Density(lf.coupling_flow(2, 2, (8,), memory="invert")).eval()
    weights = [*p.parameters()]
    p.standardize(torch.randn(9, 2))
    assert isinstance(p.flow, lf.Flow)
    assert p.flow.memory == "invert"
    assert not p.flow.training
    assert not p.flow[0].training
    assert all(mine is theirs for mine, theirs in zip([*p.flow[1:].parameters()], weights, strict=True))


class _Logit(lf.Bijection):
    """z = log(x / (1 - x)): the layer of docs/guides/flows.md."""

    features = 2

    def _transform(self, x, context, inverse, log_det):  # type: ignore[no-untyped-def]
        y = torch.sigmoid(x) if inverse else torch.log(x) - torch.log1p(-x)
        inside = y if inverse else x
        total = -(torch.log(inside) + torch.log1p(-inside)).sum(1)
        return y, (-total if inverse else total) if log_det else None


class _NeedsContext(_Logit):
    def _transform(self, x, context, inverse, log_det):  # type: ignore[no-untyped-def]
        return super()._transform(x + context["context"], {}, inverse, log_det)


def test_a_layer_that_takes_an_interval_is_not_given_standardised_data() -> None:
    x = torch.rand(50, 2)
    for flow in (_Logit(), lf.Flow([_Logit(), *lf.coupling_flow(2, 2, (8,))]), lf.Flow([lf.Permute(2), _Logit()])):
        p = lf.Density(flow)
        with pytest.raises(
            ValueError, match=r"_Logit gives NaN .* Leave out standardize, and put lf.ActNorm after"
        ):
            p.standardize(x)
        assert p.flow is flow
        assert p(x).isfinite().all()
    norm = lf.ActNorm(2)
    lf.Density(lf.Flow([lf.Inverse(_Logit()), norm])).standardize(x)  # its own values are in order
    assert not norm.initialized
    lf.Density(lf.Flow([_NeedsContext()])).standardize(x)
    advised = lf.Density(lf.Flow([_Logit(), lf.ActNorm(2), *lf.coupling_flow(2, 2, (8,))]))
    assert advised(x).isfinite().all()


@pytest.mark.parametrize("given", [lf.coupling_flow(2, 2, (8,)), lf.AffineCoupling(lf.MLP(1, 2, (8,)), 2)])
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_brings_the_layer_of_standardize(given: lf.Bijection, assign: bool) -> None:
    saved = lf.Density(copy.deepcopy(given)).standardize(5 + 3 * torch.randn(50, 2))
    perturb(saved.flow[1:])  # type: ignore[index]
    wrapped = torch.nn.ModuleDict({"p": lf.Density(copy.deepcopy(given)).eval()})
    weights = [*wrapped.parameters()]
    wrapped.load_state_dict({f"p.{name}": value for name, value in saved.state_dict().items()}, assign=assign)
    p, x = wrapped["p"], torch.randn(4, 2)
    assert torch.equal(p(x), saved(x))
    assert not p.flow.training
    assert [v.requires_grad for v in p.parameters()] == [v.requires_grad for v in saved.parameters()]
    assert assign or all(mine is theirs for mine, theirs in zip([*p.parameters()][2:], weights, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p.train()(1e4 + torch.randn(50, 2))
        p.load_state_dict(saved.state_dict())  # once more
    assert len(p.flow) == len(saved.flow)  # type: ignore[arg-type]


def test_another_state_changes_no_layers() -> None:
    p = lf.Density(lf.coupling_flow(2, 2, (8,)))
    deeper = lf.Density(lf.coupling_flow(2, 3, (8,))).standardize(torch.randn(9, 2))
    wider = lf.Density(lf.coupling_flow(4, 2, (8,))).standardize(torch.randn(9, 4))
    more_hidden = lf.Density(lf.coupling_flow(2, 2, (16,))).standardize(torch.randn(9, 2))
    for other in (deeper, wider, more_hidden, lf.Density(lf.coupling_flow(2, 2, (8,), actnorm=True))):
        flow = p.flow
        with pytest.raises(RuntimeError, match="Error"):
            p.load_state_dict(other.state_dict())
        assert p.flow is flow


def test_a_shallow_copy_takes_a_state_without_the_original() -> None:
    x = torch.randn(9, 2)
    saved = lf.Density(lf.coupling_flow(2, 2, (8,))).standardize(5 + 3 * x)
    copied = copy.copy(lf.Density(lf.coupling_flow(2, 2, (8,))))
    gc.collect()
    copied.load_state_dict(saved.state_dict())
    assert torch.equal(copied(x), saved(x))


def test_a_flow_with_its_own_actnorm_gives_no_warning() -> None:
    far = 5000 + 1000 * torch.randn(50, 1, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lf.Density(lf.image_flow(1, 8, 2, 8, actnorm=True))(far)
        compiled = torch.compile(lf.Density(lf.coupling_flow(2, 2, (8,))), fullgraph=True, backend="eager")
        warnings.filterwarnings("default", category=DeprecationWarning)
        compiled(far.flatten(1)[:, :2])
