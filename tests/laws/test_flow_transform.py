"""A flow as a transform of torch.distributions, and as a sequence of its layers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributions as D
from torch import nn

import linfast as lf
from tests.laws.zoo import density, perturb

F64 = torch.float64


def test_a_flow_is_a_transform() -> None:
    p = density()
    noise = D.Independent(D.Normal(torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64)), 1)
    q = D.TransformedDistribution(noise, [lf.FlowTransform(p.flow).inv])
    x = torch.randn(3, 4, 2, dtype=F64)
    torch.testing.assert_close(q.log_prob(x).flatten(), p(x.flatten(0, 1)), rtol=1e-10, atol=1e-10)
    assert q.event_shape == (2,)
    assert q.sample().shape == (2,)
    drawn = q.rsample((5, 2))
    assert drawn.requires_grad
    torch.testing.assert_close(q.log_prob(drawn), p(drawn.flatten(0, 1)).reshape(5, 2), rtol=1e-9, atol=1e-9)
    forward = D.TransformedDistribution(q, [lf.FlowTransform(p.flow)])
    torch.testing.assert_close(forward.log_prob(x), noise.log_prob(x), rtol=1e-9, atol=1e-9)


def test_a_transform_keeps_nothing_unless_told_to() -> None:
    """Gradients reach the density of a sample, and a change of the weights counts at once."""
    flow = density().flow
    noise = D.Independent(D.Normal(torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64)), 1)
    q = D.TransformedDistribution(noise, [lf.FlowTransform(flow).inv])
    x = q.sample((5,))
    before = q.log_prob(x)
    assert before.requires_grad
    perturb(flow, 0.3, seed=1)
    assert not torch.allclose(q.log_prob(x), before)
    assert lf.FlowTransform(flow).with_cache(1)._cache_size == 1
    images = lf.FlowTransform(lf.Inverse(lf.image_flow(2, 4, 2, 8)))
    assert images.domain.event_dim == 3
    assert images(torch.randn(5, 2, 4, 4)).shape == (5, 2, 4, 4)
    with pytest.raises(ValueError, match="flow must keep the shape of x: 2 features become 8"):
        lf.FlowTransform(lf.Squeeze(2))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))])
@pytest.mark.parametrize("cache_size", [0, 1])
def test_distributions_of_a_flow_are_copied(copied: Callable[[Any], Any], cache_size: int) -> None:
    flow, x = density().flow, torch.randn(4, 2, dtype=F64)
    noise = D.Independent(D.Normal(torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64)), 1)
    transform = lf.FlowTransform(flow, cache_size)
    for inverse in (transform.inv, transform.inv.inv.inv):
        q = D.TransformedDistribution(noise, [inverse])
        other = copied(q)
        assert torch.equal(other.log_prob(x), q.log_prob(x))
        assert other.rsample((3,)).shape == (3, 2)
        other.transforms[0].inv.flow.bijections[0].conditioner = nn.Linear(1, 2).double()
        assert not torch.equal(other.log_prob(x), q.log_prob(x))
    assert transform.inv is transform.inv is not None
    assert transform.inv.inv is transform


def test_a_flow_is_a_sequence_of_its_layers() -> None:
    flow = lf.coupling_flow(4, 3, (8,), mix="lu")
    layers = list(flow)
    assert len(flow) == len(layers) == 6
    assert flow[0] is layers[0]
    assert flow[-1] is layers[-1]
    x = torch.randn(5, 4)
    assert torch.allclose(flow[3:](flow[:3](x)), flow(x), atol=1e-6)
    assert list(flow[1:3]) == layers[1:3]
    assert flow[1:3].shape == (4,)
    assert flow[:0](x) is x
    assert flow[:2].training
    assert not flow.eval()[:2].training
    assert bool(lf.Flow([]))
    with pytest.raises(IndexError):
        flow[6]
    longer = lf.Flow([lf.ActNorm(4), *flow], shape=(4,))
    assert len(longer) == 7
    image = lf.image_flow(1, 4, 2, 8)
    assert image[1:].shape is None
    assert image[1:](image[0](torch.randn(2, 1, 4, 4))).shape == (2, 1, 4, 4)
