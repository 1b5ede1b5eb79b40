"""Every op that linfast exports, with all optional inputs and outputs and with none of them.

A new op, or a new optional input or output of an op, needs a case here: ``test_every_op`` checks that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from linfast.kernels.spline_spec import Spline
from torch import Tensor

from linfast import ops
from linfast.ops.rq_spline import spline_transform
from linfast.scale_maps import ScaleMap
from tests.ops.budget import DEVICE, Outputs
from tests.ops.made import Extras, Made, random_extras, random_made, tensors_of
from tests.ops.made import rebuilt as rebuilt_made
from tests.ops.stacks import leaves, random_layers, random_map, rebuilt


class Case(NamedTuple):
    """A call of an op, and how to make its tensors, all of which require gradients."""

    op: str
    call: Callable[..., Outputs]
    inputs: Callable[[], list[Tensor]]


def _drawn(*shapes: tuple[int, ...]) -> Callable[[], list[Tensor]]:
    return lambda: [torch.randn(shape, device=DEVICE) for shape in shapes]


def _tensor(call: Callable[..., Tensor]) -> Callable[..., Outputs]:
    return lambda *tensors: (call(*tensors),)


def _coupled(inverse: bool, log_det: bool) -> Case:
    def call(x: Tensor, params: Tensor) -> Outputs:
        return ops.affine_coupling(x, params, ScaleMap(), inverse=inverse, log_det=log_det)

    return Case("affine_coupling", call, _drawn((2, 4, 3, 2), (2, 4, 3, 2)))


def _coupled_and_mixed(bias: bool, log_det: bool) -> Case:
    def call(x: Tensor, params: Tensor, weight: Tensor, *rest: Tensor) -> Outputs:
        return ops.coupling_mix(x, params, ScaleMap(), weight, *rest, log_det=log_det)

    shapes = [(2, 4, 3, 2), (2, 4, 3, 2), (4, 4), (4,)]
    return Case("coupling_mix", call, _drawn(*shapes[: 4 if bias else 3]))


def _convolved(x: Tensor, weight: Tensor, *given: Tensor) -> Outputs:
    """Two convolutions, the second with the statistics that the first computes, or one without any options."""
    if not given:
        return (ops.conv2d_fused(x, weight, activation=False, precision="exact")[0],)
    bias, norm_weight, norm_bias, residual, second = given
    y, sums = ops.conv2d_fused(
        x, weight, bias, groups=2, norm_weight=norm_weight, norm_bias=norm_bias, residual=residual, alpha=0.7,
        next_groups=3, precision="exact",
    )  # fmt: skip
    return (ops.conv2d_fused(y, second, groups=3, statistics=sums, precision="exact")[0],)


def _normed(*names: str) -> Case:
    shapes = {"weight": (4,), "bias": (4,), "scale": (2, 4), "shift": (2, 4)}

    def call(x: Tensor, *given: Tensor) -> Outputs:
        return (ops.group_norm_silu(x, 2, **dict(zip(names, given, strict=True))),)

    return Case("group_norm_silu", call, _drawn((2, 4, 3, 2), *(shapes[name] for name in names)))


def _activated(
    *names: str, activation: str | None = "elu", of_batch: bool = False, given: bool = False, rows: int = 6
) -> Case:
    """Statistics that are given are constants: a kernel has no gradients for them."""

    def call(x: Tensor, *parameters: Tensor) -> Outputs:
        statistics = {"mean": x.new_ones(5), "var": x.new_full((5,), 2.0)} if given else {}
        named = dict(zip(names, parameters, strict=True))
        found = ops.norm_activate(x, activation, **named, **statistics, of_batch=of_batch)[:2]
        return tuple(t for t in found if t is not None)

    shapes = {"skip": (6, 5), "gate": (rows, 5)}
    return Case("norm_activate", call, _drawn((6, 5), *(shapes.get(name, (5,)) for name in names)))


def _picked(n: int, bias: bool) -> Case:
    def call(z: Tensor, A: Tensor, *rest: Tensor) -> Outputs:
        index = torch.tensor([1, 0, 1], device=z.device)
        return (ops.latent_matmul(z, A, index, alpha=0.5, bias=rest[0] if rest else None),)

    return Case("latent_matmul", call, _drawn((3, n), (2, n, n), *[(n,)] * bias))


class _Network(NamedTuple):
    """A coupling stack of random layers whose tensors are passed at every call."""

    D: int
    maps: str = "none"
    bias: bool = True
    moves: str = "first"
    depth: int = 2

    def made(self) -> tuple[list[ops.CouplingLayer], ops.AffineMap | None]:
        with torch.random.fork_rng(devices=[]):
            layers = random_layers(self.D, (8,), self.depth, maps=self.maps, bias=self.bias, moves=self.moves)
            return layers, random_map(self.D, self.maps)

    def tensors(self) -> list[Tensor]:
        return leaves(*self.made())

    def options(self) -> dict[str, Any]:
        return {"activation": "silu", "scale_map": ScaleMap(bound=0.5), "moves": self.moves}


def _stack(network: _Network, inverse: bool, log_det: bool) -> Case:
    template, template_head = network.made()

    def call(x: Tensor, *tensors: Tensor) -> Outputs:
        layers, head = rebuilt(template, tensors, template_head)
        return ops.coupling_stack(
            x, layers, head=head, inverse=inverse, log_det=log_det, precision="exact", **network.options()
        )

    return Case("coupling_stack", call, lambda: [torch.randn(3, network.D, device=DEVICE), *network.tensors()])


def _one_layer(bias: bool, log_det: bool) -> Case:
    network = _Network(5, bias=bias, depth=1)
    template, _ = network.made()

    def call(x: Tensor, *tensors: Tensor) -> Outputs:
        layer = rebuilt(template, tensors)[0][0]
        options = {**network.options(), "log_det": log_det, "precision": "exact"}
        return ops.mlp_coupling(x, layer.weights, layer.biases, **options)

    return Case("mlp_coupling", call, lambda: [torch.randn(3, 5, device=DEVICE), *network.tensors()])


def _linearizer(network: _Network, diagonal: bool) -> Case:
    template, template_head = network.made()
    n = len(leaves(template, template_head))

    def call(x: Tensor, A: Tensor, *tensors: Tensor) -> Outputs:
        sides = [rebuilt(template, part, template_head) for part in (tensors[:n], tensors[n:])]
        g_x, g_y = (ops.CouplingStack(layers, head=head, **network.options()) for layers, head in sides)
        return (ops.linearizer_stack(x, g_x, A, g_y, precision="exact"),)

    def inputs() -> list[Tensor]:
        D = network.D
        A = 1 + 0.2 * torch.rand(D) if diagonal else torch.randn(D, D) / D**0.5
        return [torch.randn(3, D, device=DEVICE), A.to(DEVICE), *network.tensors(), *network.tensors()]

    return Case("linearizer_stack", call, inputs)


def _masked(per_feature: int, bias: bool, extras: bool, inverse: bool, log_det: bool) -> Case:
    def made() -> tuple[Made, Extras | None]:
        with torch.random.fork_rng(devices=[]):
            network = random_made(4, (9,) if extras else (9, 8), per_feature, residual=extras, bias=bias)
            return network, random_extras(network[0], 3) if extras else None

    template, given = made()
    scale_map = ScaleMap("sigmoid") if per_feature == 2 else None
    spline = Spline(bins=(per_feature + 1) // 3) if per_feature > 2 else None

    def call(x: Tensor, *tensors: Tensor) -> Outputs:
        (masks, weights, biases), pairs = rebuilt_made(template, tensors, given)
        return ops.masked_autoregressive(
            x, masks, weights, biases, activation="elu", scale_map=scale_map, extras=pairs, inverse=inverse,
            log_det=log_det, precision="exact", spline=spline,
        )  # fmt: skip

    return Case("masked_autoregressive", call, lambda: [torch.randn(3, 4, device=DEVICE), *tensors_of(*made())])


def _splined(rows: int, tails: str, inverse: bool, log_det: bool, planes: bool = False) -> Case:
    """``planes``: the parameters are one tensor, as ``SplineCoupling`` gives them."""
    extra = {"linear": -1, "circular": 0, "bounded": 1}[tails]
    options: dict[str, Any] = {"tails": tails, "interval": (-2.0, 2.5), "inverse": inverse, "log_det": log_det}

    def call(x: Tensor, *raw: Tensor) -> Outputs:
        return ops.rq_spline(x, *raw, **options)

    def of_one(x: Tensor, params: Tensor) -> Outputs:
        return spline_transform(x, params, Spline(4), inverse, log_det)

    if planes:
        return Case("rq_spline", of_one, _drawn((3, 2), (rows, 2, 11)))
    return Case("rq_spline", call, _drawn((3, 2), (rows, 2, 4), (rows, 2, 4), (rows, 2, 4 + extra)))


CASES = {
    "affine_coupling": _coupled(inverse=False, log_det=True),
    "affine_coupling, no log_det": _coupled(inverse=True, log_det=False),
    "channel_mix": Case("channel_mix", _tensor(ops.channel_mix), _drawn((2, 4, 3, 2), (5, 4), (5,))),
    "channel_mix, no bias": Case("channel_mix", _tensor(ops.channel_mix), _drawn((2, 4, 3, 2), (5, 4))),
    "conv2d_fused": Case(
        "conv2d_fused", _convolved, _drawn((2, 4, 2, 3), (6, 4, 3, 3), (6,), (4,), (4,), (2, 6, 2, 3), (2, 6, 3, 3))
    ),
    "conv2d_fused, nothing more": Case("conv2d_fused", _convolved, _drawn((2, 4, 2, 3), (6, 4, 3, 3))),
    "coupling_mix": _coupled_and_mixed(bias=True, log_det=True),
    "coupling_mix, no log_det": _coupled_and_mixed(bias=True, log_det=False),
    "coupling_mix, neither": _coupled_and_mixed(bias=False, log_det=False),
    "coupling_stack": _stack(_Network(5, "dense"), inverse=False, log_det=True),
    "coupling_stack, no log_det": _stack(_Network(5, "dense"), inverse=True, log_det=False),
    "coupling_stack, diagonal": _stack(_Network(4, "diagonal"), inverse=False, log_det=False),
    "coupling_stack, bare": _stack(_Network(4, bias=False, moves="second"), inverse=False, log_det=False),
    "depthwise_conv": Case("depthwise_conv", _tensor(ops.depthwise_conv), _drawn((2, 3, 5, 4), (2, 3, 3, 3))),
    "depthwise_conv, shared": Case("depthwise_conv", _tensor(ops.depthwise_conv), _drawn((2, 3, 5, 4), (3, 3, 3))),
    "group_norm_silu": _normed("weight", "bias", "scale", "shift"),
    "group_norm_silu, bias": _normed("bias"),
    "group_norm_silu, bare": _normed(),
    "latent_matmul": _picked(4, bias=True),
    "latent_matmul, no bias": _picked(4, bias=False),
    "linearizer_stack": _linearizer(_Network(4, "dense", depth=1), diagonal=False),
    "linearizer_stack, diagonal": _linearizer(_Network(5, bias=False, depth=1), diagonal=True),
    "low_rank": Case(
        "low_rank", _tensor(lambda x, U, V: ops.low_rank(x, U, V, 0.5)), _drawn((2, 6), (2, 6, 3), (2, 6, 3))
    ),
    "low_rank, no alpha": Case("low_rank", _tensor(ops.low_rank), _drawn((2, 6), (2, 5, 3), (6, 3))),
    "masked_autoregressive": _masked(2, bias=True, extras=False, inverse=False, log_det=True),
    "masked_autoregressive, inverse, extras": _masked(2, bias=True, extras=True, inverse=True, log_det=True),
    "masked_autoregressive, additive": _masked(1, bias=False, extras=False, inverse=True, log_det=False),
    "masked_autoregressive, spline": _masked(11, bias=True, extras=True, inverse=True, log_det=True),
    "norm_activate": _activated("bias", "weight", "shift", of_batch=True),
    "norm_activate, given": _activated("bias", "weight", "shift", given=True),
    "norm_activate, bare": _activated(),
    "norm_activate, gate and skip": _activated("bias", "skip", "gate", "weight", "shift", of_batch=True),
    "norm_activate, end of a block": _activated("bias", "skip", "gate", activation=None, rows=1),
    "norm_activate, skip": _activated("skip", activation=None),
    "mlp_coupling": _one_layer(bias=True, log_det=True),
    "mlp_coupling, neither": _one_layer(bias=False, log_det=False),
    "rq_spline": _splined(3, "linear", inverse=False, log_det=True),
    "rq_spline, no log_det": _splined(3, "circular", inverse=True, log_det=False),
    "rq_spline, shared": _splined(1, "bounded", inverse=True, log_det=True),
    "rq_spline, one tensor": _splined(3, "linear", inverse=True, log_det=True, planes=True),
}


def drawn(name: str) -> list[Tensor]:
    """The case's tensors; each requires a gradient."""
    return [t.detach().requires_grad_() for t in CASES[name].inputs()]


def with_gradients(call: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """The call's outputs, and the gradients of a weighted sum of them for each tensor that requires one."""

    def both(*tensors: Tensor) -> Outputs:
        outputs = call(*tensors)
        wanted = [t for t in tensors if t.requires_grad]
        return (*outputs, *gradients_of(outputs, wanted))

    return both


def gradients_of(outputs: Outputs, wanted: Sequence[Tensor], again: bool = False) -> tuple[Tensor | None, ...]:
    """The gradients of a weighted sum of the outputs for each tensor that requires one; None where unused.

    The graph is kept; ``again``: the gradients get a graph too.
    """
    given = [o for o in outputs if o is not None and o.requires_grad]
    weights = [torch.arange(1, o.numel() + 1, device=o.device, dtype=o.dtype).cos().view(o.shape) for o in given]
    return torch.autograd.grad(given, wanted, weights, True, again, allow_unused=True)
