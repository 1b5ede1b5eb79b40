"""Every op under torch.compile(fullgraph=True) where no gradient is asked for: serving, not training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import linfast as lf
from linfast import ops
from linfast.scale_maps import ScaleMap
from tests.ops.budget import DEVICE

CALLS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "affine_coupling": (lambda x, p: ops.affine_coupling(x, p, ScaleMap(), log_det=True)[0], [(3, 4), (3, 4)]),
    "channel_mix": (lambda x, w: ops.channel_mix(x, w), [(2, 3, 2, 2), (3, 3)]),
    "low_rank": (lambda x, u, v: ops.low_rank(x, u, v, 0.5), [(2, 4), (2, 4, 2), (2, 4, 2)]),
    "latent_matmul": (
        lambda z, a: ops.latent_matmul(z, a, torch.tensor([0, 1, 0], device=z.device)),
        [(3, 4), (2, 4, 4)],
    ),
    "depthwise_conv": (ops.depthwise_conv, [(2, 3, 4, 4), (3, 3, 3)]),
    "group_norm_silu": (lambda x, w: ops.group_norm_silu(x, 2, w), [(2, 4, 3, 3), (4,)]),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("grad", [False, True])
def test_it_compiles_whole_without_gradients(name: str, grad: bool) -> None:
    call, shapes = CALLS[name]
    inputs = [torch.randn(shape).to(DEVICE).requires_grad_(not grad) for shape in shapes]
    torch.compiler.reset()
    with lf.backend("triton"), torch.set_grad_enabled(grad):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs), call(*inputs))
