"""Wrong inputs to flows raise a clear error that names the argument, before any work."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import linfast as lf


def _coupling(features: int = 4) -> lf.AffineCoupling:
    return lf.AffineCoupling(lf.MLP(2, 4, (8,)), features)


def _unet_flow(channels: int, resolution: int | tuple[int, int], **options: object) -> lf.Flow:
    return lf.image_flow(channels, resolution, conditioner="unet", unet_options=options)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: _coupling()(torch.randn(3, 5)), ValueError, r"x must have 4 features.*\(3, 5\)"),
        (lambda: _coupling().inverse(torch.randn(3, 5)), ValueError, r"z must have 4 features"),
        (lambda: _coupling()(torch.randn(4)), ValueError, r"x must be \[B, C"),
        (lambda: _coupling()(torch.randn(3, 4).double()), ValueError, "float64.*float32"),
        (lambda: _coupling()(torch.ones(3, 4, dtype=torch.long)), ValueError, "floating point.*int64"),
        (lambda: _coupling()(torch.randn(3, 4, device="meta")), ValueError, "meta.*cpu"),
        (lambda: _coupling()([1.0]), TypeError, r"x must be a tensor; got \[1.0\]"),
        (lambda: _coupling()(torch.randn(3, 4), t=0.5), ValueError, "without time_features"),
        (lambda: _coupling(1), ValueError, "features must be at least 2; got 1"),
        (lambda: lf.AffineCoupling(nn.Linear(2, 3), 4)(torch.randn(3, 4)), ValueError, r"\(3, 4\).*\(3, 3\)"),
        (lambda: lf.AffineCoupling(nn.Linear(2, 4), 4, "both"), ValueError, "moves.*'both'"),
        (lambda: lf.AffineCoupling(nn.Linear(2, 4), 4, order="x"), ValueError, "order.*'x'"),
        (lambda: lf.AffineCoupling(nn.Linear(2, 4), 4, layout="x"), ValueError, "layout.*'x'"),
        (lambda: lf.ScaleMap("cube"), ValueError, "kind.*'cube'"),
        (lambda: lf.ScaleMap("tanh", bound=0.0), ValueError, "bound must be a number above 0; got 0.0"),
        (lambda: lf.Flow([lf.Mix(4), lf.Mix(5)]), ValueError, r"bijections\[1\].*5.*4"),
        (lambda: lf.Flow([nn.Linear(4, 4)]), TypeError, r"bijections\[0\].*Linear"),
        (lambda: lf.Squeeze(1)(torch.randn(1, 1, 3, 4)), ValueError, r"even.*\(1, 1, 3, 4\)"),
        (lambda: lf.Permute(3, torch.tensor([0, 1, 1])), ValueError, "0 to 2 once"),
        (lambda: lf.Mix(3, "qr"), ValueError, "kind.*'qr'"),
        (lambda: lf.Householder(3, 0), ValueError, "count"),
        (lambda: lf.MLP(3, 4, activation="swish"), ValueError, "activation.*'swish'"),
        (lambda: lf.coupling_flow(1), ValueError, "features"),
        (lambda: lf.coupling_flow(4, hidden=8), TypeError, "hidden must be a sequence"),
        (
            lambda: lf.AffineCoupling(nn.Linear(2, 4), 4, scale_map=5),
            TypeError,
            "scale_map must be a ScaleMap or its kind; got 5",
        ),
        (lambda: lf.DepthwiseConv(1, 3, 4), TypeError, "size must be a sequence of 2 whole numbers.*got 4"),
        (lambda: lf.DepthwiseConv(1, 0, (4, 4)), ValueError, "kernel_size"),
        (lambda: lf.TimeLowRank(4, 2).factors_at(0.5), TypeError, "t must be a tensor; got 0.5"),
        (lambda: lf.coupling_flow(4, depth=0), ValueError, "depth"),
        (lambda: lf.coupling_flow(4, transform="x"), ValueError, "transform must be one of .*'x'"),
        (lambda: lf.coupling_flow(4, coupling="x"), ValueError, "coupling must be one of .*'x'"),
        (lambda: lf.coupling_flow(4, transform="spline", coupling="affine"), ValueError, "coupling is the older"),
        (lambda: lf.coupling_flow(4, transform="spline", bins=1), ValueError, "bins"),
        (lambda: lf.autoregressive_flow(4, transform="spline", tail_bound=0), ValueError, "tail_bound"),
        (lambda: lf.SplineCoupling(nn.Linear(2, 4), 4)(torch.randn(3, 4)), ValueError, r"must return \(3, 46\)"),
        (lambda: lf.SplineCoupling(nn.Linear(2, 4), 4, min_width=0.2), ValueError, "min_width"),
        (lambda: lf.MaskedAutoregressive(lf.MaskedMLP(3), bins=8), ValueError, "per_feature=23 for bins=8"),
        (lambda: lf.coupling_flow(4, mix="x"), ValueError, "mix.*'x'"),
        (lambda: lf.image_flow(1, 5), ValueError, "resolution must be even"),
        (
            lambda: lf.image_flow(2, 4, conditioner="mlp"),
            ValueError,
            "conditioner must be one of conv, unet; got 'mlp'",
        ),
        (lambda: _unet_flow(1, 6), ValueError, r"a UNet sees \(3, 3\) pixels: they must be multiples of 2"),
        (lambda: _unet_flow(2, (4, 6), channel_mult=(1, 1, 1)), ValueError, r"\(4, 6\) .* multiples of 4"),
        (lambda: _unet_flow(2, 4, width=4), ValueError, r"unet_options may be channel_mult.*got \['width'\]"),
        (lambda: lf.image_flow(2, 4, unet_options={}), ValueError, "need conditioner='unet'"),
        (lambda: lf.image_flow(2, 4, activation="relu", conditioner="unet"), ValueError, "'silu'; got 'relu'"),
        (lambda: lf.ActNorm(3)(torch.randn(1, 3)), ValueError, "two values"),
        (lambda: lf.ActNorm(3)(torch.full((4, 3), float("nan"))), ValueError, "non-finite"),
        (lambda: lf.coupling_flow(4, time_features=8)(torch.randn(2, 4)), ValueError, "needs t="),
        (
            lambda: lf.coupling_flow(4, time_features=8)(torch.randn(2, 4), t=torch.ones(3)),
            ValueError,
            r"t must be.*\(3,\)",
        ),
        (
            lambda: lf.coupling_flow(4, context_features=3)(torch.randn(2, 4), context=torch.ones(2, 4)),
            ValueError,
            r"context must be \[2, 3\]",
        ),
    ],
)
def test_clear_errors(call, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


_CONTEXT = torch.ones(1, 3)


@pytest.mark.parametrize("name", ["log_prob", "rsample", "sample", "sample_and_log_prob"])
@pytest.mark.parametrize(
    "flow",
    [
        lf.coupling_flow(2, 1, (4,)),
        lf.coupling_flow(2, 1, (4,), context_features=3).at(context=_CONTEXT),
        lf.Inverse(lf.coupling_flow(2, 1, (4,))),
    ],
)
def test_a_density_is_named_to_who_asks_a_flow_for_one(flow: lf.Bijection, name: str) -> None:
    assert not hasattr(flow, name)
    kind = type(flow).__name__
    with pytest.raises(AttributeError, match=rf"a {kind} has no base distribution; use lf.Density\(flow\).{name}$"):
        getattr(flow, name)
    with pytest.raises(AttributeError, match=f"^'{kind}' object has no attribute 'other'$"):
        flow.other  # noqa: B018
    assert all(getattr(flow, part) is module for part, module in flow.named_children())
    assert all(getattr(flow, part) is tensor for part, tensor in flow.named_buffers(recurse=False))
    flow.weight = parameter = nn.Parameter(torch.ones(1))
    assert flow.weight is parameter
    del flow.weight
    with pytest.raises(AttributeError, match="no attribute 'bijections'"):
        lf.Flow.__new__(lf.Flow).bijections  # noqa: B018
