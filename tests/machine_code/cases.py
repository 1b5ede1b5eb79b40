"""The cases that run on machine code: for every op some sizes with odd edges."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from linfast.kernels.spline_spec import TAILS, Spline
from torch import Tensor

from linfast import ops
from linfast.ops import CouplingStack
from linfast.ops.masked_autoregressive import MASKED_ACTIVATIONS
from linfast.ops.rq_spline import spline_transform
from linfast.scale_maps import SCALE_MAP_KINDS, ScaleMap
from tests.machine_code.variants import Case, Outputs
from tests.ops.made import random_extras, random_made, tensors_of
from tests.ops.made import rebuilt as rebuilt_made
from tests.ops.stacks import leaves, random_layers, rebuilt

__all__ = ["all_cases"]


def all_cases() -> list[Case]:
    """The cases of all ops."""
    parts = (
        *(_couplings, _mixes, _products, _convolutions, _norms, _stacks, _linearizers, _masked, _splines),
        _residual_blocks,
    )
    return [case for part in parts for case in part()]


def _randn(*shapes: tuple[int, ...]) -> Callable[[], list[Tensor]]:
    return lambda: [torch.randn(shape) for shape in shapes]


def _couplings() -> Iterator[Case]:
    for i, kind in enumerate(SCALE_MAP_KINDS):
        order = ("shift_first", "scale_first")[i % 2]
        for shape in ((9, 7), (3, 6, 5, 7)):
            moved = (shape[1] + 1) // 2

            def couple(x: Tensor, p: Tensor, kind: str = kind, order: str = order, **options: bool) -> Outputs:
                return ops.affine_coupling(x, p, ScaleMap(kind), order=order, log_det=True, **options)

            inputs = _randn(shape, (shape[0], 2 * moved, *shape[2:]))
            yield Case("affine_coupling", f"{shape} {kind} {order}", inputs, couple, smoke=kind == "smooth")
    for channels in (5, 18):
        shape, moved = (2, channels, 7, 4), (channels + 1) // 2

        def couple_and_mix(x: Tensor, p: Tensor, W: Tensor, b: Tensor, **options: bool) -> Outputs:
            return ops.coupling_mix(x, p, ScaleMap(), W, b, log_det=True, **options)

        inputs = _randn(shape, (2, 2 * moved, 7, 4), (channels, channels), (channels,))
        yield Case("coupling_mix", f"{shape}", inputs, couple_and_mix, smoke=True)


def _mixes() -> Iterator[Case]:
    for n_in, n_out in ((3, 3), (5, 3), (15, 16), (33, 33), (7, 130)):
        for innermost in (False, True):

            def mix(x: Tensor, W: Tensor, b: Tensor, innermost: bool = innermost) -> Outputs:
                return [ops.channel_mix(x.contiguous(memory_format=torch.channels_last) if innermost else x, W, b)]

            label = f"{n_in} -> {n_out} channels {'last' if innermost else 'first'}"
            inputs = _randn((2, n_in, 5, 7), (n_out, n_in), (n_out,))
            yield Case("channel_mix", label, inputs, mix, smoke=(n_in, innermost) in ((5, False), (33, True)))
    for shape in ((3, 6, 5, 7), (1, 2, 40, 31)):
        for size in ((3, 3), (1, 9)):
            for transpose in (False, True):

                def convolve(x: Tensor, w: Tensor, transpose: bool = transpose) -> Outputs:
                    return [ops.depthwise_conv(x, w, transpose=transpose)]

                label = f"{shape} {size}{' transposed' if transpose else ''}"
                inputs = _randn(shape, (shape[1], *size))
                yield Case("depthwise_conv", label, inputs, convolve, smoke=shape[0] == 3 and size == (3, 3))


def _products() -> Iterator[Case]:
    for batch, n_in, n_out, rank in ((3, 7, 7, 3), (2, 300, 300, 8), (2, 33, 9, 70)):
        for shared in ("nothing", "U", "V"):

            def expand(x: Tensor, U: Tensor, V: Tensor, square: bool = n_in == n_out) -> Outputs:
                return [ops.low_rank(x, U, V, alpha=0.7 if square else 0.0)]

            shapes = [(n,) if name == shared else (batch, n) for name, n in (("U", n_out), ("V", n_in))]
            inputs = _randn((batch, n_in), *((*shape, rank) for shape in shapes))
            label = f"{(batch, n_in, n_out, rank)} shares {shared}"
            yield Case("low_rank", label, inputs, expand, smoke=n_in == 300 and shared == "nothing")
    for batch, count, n_out, n_in in ((9, 3, 7, 5), (200, 3, 70, 33), (40, 2, 66, 66)):
        index = torch.randint(count, (batch,), generator=torch.Generator().manual_seed(batch))

        def pick(z: Tensor, A: Tensor, b: Tensor, precision: str, index: Tensor = index) -> Outputs:
            return [ops.latent_matmul(z, A, index.to(z.device), bias=b, precision=precision)]

        inputs = _randn((batch, n_in), (count, n_out, n_in), (n_out,))
        yield Case("latent_matmul", f"{(batch, count, n_out, n_in)}", inputs, pick, smoke=batch < 200)


def _norms() -> Iterator[Case]:
    for shape, groups in (((3, 8, 5, 7), 2), ((2, 24, 40, 31), 8), ((9, 7), 7), ((2, 5000), 1)):

        def inputs(shape: tuple[int, ...] = shape) -> list[Tensor]:
            x, w, b, scale, shift = _randn(shape, shape[1:2], shape[1:2], shape[:2], shape[:2])()
            return [x + 2, w + 1, b, scale, shift]

        def norm(x: Tensor, *parameters: Tensor, groups: int = groups) -> Outputs:
            return [ops.group_norm_silu(x, groups, *parameters)]

        # With one element per group y does not depend on x; its terms are 1 / sqrt(eps) times those of y.
        cancels = 1e-5**-0.5 if shape == (9, 7) else 1.0
        yield Case("group_norm_silu", f"{shape} groups {groups}", inputs, norm, groups in (2, 7), cancels=cancels)


def _convolutions() -> Iterator[Case]:
    for shape, n_out, k, groups in (
        ((2, 8, 5, 7), 8, 3, 2), ((2, 18, 3, 4), 20, 3, 6), ((2, 9, 4, 3), 33, 1, 9), ((1, 4, 3, 2), 3, 5, 2),
    ):  # fmt: skip

        def inputs(shape: tuple[int, ...] = shape, n_out: int = n_out, k: int = k) -> list[Tensor]:
            batch, n_in, *size = shape
            shapes = (shape, (n_out, n_in, k, k), (n_out,), (n_in,), (n_in,), (batch, n_out, *size))
            x, weight, *rest = _randn(*shapes)()
            return [x + 2, weight / (n_in * k * k) ** 0.5, *rest]

        def convolve(
            x: Tensor, W: Tensor, b: Tensor, nw: Tensor, nb: Tensor, r: Tensor, precision: str, groups: int = groups
        ) -> Outputs:
            norm = {"groups": groups, "norm_weight": nw, "norm_bias": nb}
            return ops.conv2d_fused(x, W, b, **norm, residual=r, alpha=0.7, precision=precision)[:1]

        yield Case("conv2d_fused", f"{shape} -> {n_out} k {k} groups {groups}", inputs, convolve, smoke=n_out == 20)

    def twice(x: Tensor, V: Tensor, W: Tensor, precision: str) -> Outputs:
        y, statistics = ops.conv2d_fused(x, V, next_groups=4, precision=precision)
        return ops.conv2d_fused(y, W, groups=4, statistics=statistics, precision=precision)[:1]

    inputs = _randn((2, 8, 5, 7), (8, 8, 3, 3), (8, 8, 3, 3))
    yield Case("conv2d_fused", "two, the first sums groups for the second", inputs, twice, smoke=True)


def _stacks() -> Iterator[Case]:
    for batch, D, hidden, depth, maps, activation, kind in (
        (5, 6, (16, 16), 3, "none", "silu", "smooth"),
        (40, 10, (24, 16), 2, "dense", "gelu", "tanh"),
        (70, 33, (40,), 2, "diagonal", "tanh", "sigmoid"),
        (9, 7, (), 2, "none", "relu", "softplus"),
        (16, 33, (128, 128), 2, "diagonal", "silu", "smooth"),
        (20, 33, (128, 128), 1, "none", "silu", "smooth"),
        (70, 33, (128, 128), 3, "none", "silu", "smooth"),  # sm_90's tile of 128 rows, which loads weights ahead
        (5, 9, (260,), 1, "none", "silu", "tanh"),
        (260, 33, (64, 64), 1, "none", "silu", "smooth"),  # the backward's larger tile
    ):

        def inputs(batch=batch, D=D, hidden=hidden, depth=depth, maps=maps) -> list[Tensor]:
            return [torch.randn(batch, D), *leaves(random_layers(D, hidden, depth, maps=maps))]

        template = random_layers(D, hidden, depth, maps=maps)

        def run(x, *tensors, template=template, activation=activation, kind=kind, wide=260 in hidden, **options):
            layers, _ = rebuilt(template, tensors)
            options |= {"activation": activation, "scale_map": ScaleMap(kind), "log_det": True}
            with torch.set_grad_enabled(not wide):  # layer by layer only where no gradient is required
                outputs = ops.coupling_stack(x, layers, **options)
            return [output + 0 * x.sum() for output in outputs] if wide else outputs

        label = f"{(batch, D)} hidden {hidden} depth {depth} maps {maps} {activation} {kind}"
        smoke = maps == "dense" or 260 in hidden or (batch, depth) == (70, 3)
        yield Case("coupling_stack", label, inputs, run, smoke=smoke, x_alone=True)
    yield _hard_values()
    layer = random_layers(7, (16, 16), 1)

    def one(x: Tensor, *tensors: Tensor, **options) -> Outputs:
        ((weights, biases, *_),), _ = rebuilt(layer, tensors)
        options |= {"activation": "silu", "scale_map": ScaleMap(), "log_det": True}
        return ops.mlp_coupling(x, weights, biases, **options)

    def inputs_of_one() -> list[Tensor]:
        return [torch.randn(20, 7), *leaves(random_layers(7, (16, 16), 1))]

    yield Case("mlp_coupling", "(20, 7) hidden (16, 16)", inputs_of_one, one, smoke=True, x_alone=True)


def _hard_values() -> Case:
    """Rows of x from 1e-20 to 1e20, and weights of Student's t with 1.5 degrees of freedom, which has no variance.

    Rows are scaled by powers of two, exactly, and results back, so that every row counts in an error. The modes are
    those of two parts. In one part a conditioner's output of a thousand is off by ten, and gradients depend on
    whether it is near 0, where the scale map is steep: the allowance's own draws of their errors lie between 0.01
    and 9.
    """
    batch, D, hidden = 66, 33, (128,)  # more than 64 rows: sm_90's tile of 128
    scale = 2.0 ** torch.linspace(-66, 66, batch).round()[:, None]
    template = random_layers(D, hidden, 2, bias=False)

    def inputs() -> list[Tensor]:
        t = torch.distributions.StudentT(1.5)
        return [torch.randn(batch, D), *(t.sample(w.shape) / w.shape[1] ** 0.5 for w in leaves(template))]

    def run(x: Tensor, *tensors: Tensor, **options) -> Outputs:
        layers, _ = rebuilt(template, tensors)
        options |= {"activation": "silu", "scale_map": ScaleMap(), "log_det": True}
        y, log_det = ops.coupling_stack(x * scale.to(x), layers, **options)
        return [y / scale.to(x), log_det]

    label = f"{(batch, D)} hidden {hidden} depth 2 rows from 1e-20 to 1e20, heavy-tailed weights"
    return Case("coupling_stack", label, inputs, run, True, x_alone=True, dtypes=("fp32",), modes=("exact", "high"))


def _linearizers() -> Iterator[Case]:
    for batch, D, hidden, maps, core in (
        (70, 7, (16, 16), "none", "dense"),  # as the last one on sm_90's tile of 128 rows
        (70, 10, (16, 16), "dense", "diagonal"),
        (9, 6, (16, 16), "diagonal", "dense"),
        (70, 33, (128, 128), "none", "dense"),
    ):
        template = [random_layers(D, hidden, depth, maps=maps) for depth in (2, 3)]
        first = len(leaves(template[0]))

        def inputs(batch=batch, D=D, hidden=hidden, maps=maps, core=core) -> list[Tensor]:
            A = torch.randn(D) if core == "diagonal" else torch.randn(D, D) / D**0.5
            stacks = [leaves(random_layers(D, hidden, depth, maps=maps)) for depth in (2, 3)]
            return [torch.randn(batch, D), A, *stacks[0], *stacks[1]]

        def run(x, A, *tensors, template=template, first=first, precision) -> Outputs:
            halves = (tensors[:first], tensors[first:])
            (layers_x, _), (layers_y, _) = map(rebuilt, template, halves)
            g_x = CouplingStack(layers_x, "silu", ScaleMap(bound=0.5))
            g_y = CouplingStack(layers_y, "silu", ScaleMap(bound=0.3))
            return [ops.linearizer_stack(x, g_x, A, g_y, precision=precision)]

        label = f"{(batch, D)} hidden {hidden} maps {maps} A {core}"
        yield Case("linearizer_stack", label, inputs, run, smoke=D == 7, x_alone=True)


def _masked() -> Iterator[Case]:
    for batch, D, hidden, per_feature, residual, activation, kind in (
        (70, 5, (24, 20), 2, False, "elu", "sigmoid"),
        (9, 7, (40,), 2, True, "silu", "softplus"),
        (200, 3, (9,), 1, False, "tanh", None),
    ):
        order = [1, 2, 2, 4, 3] if D == 5 else None
        template = random_made(D, hidden, per_feature, order=order, residual=residual)
        extras = random_extras(template[0], batch) if residual else None

        def inputs(batch=batch, D=D, template=template, extras=extras) -> list[Tensor]:
            return [torch.randn(batch, D), *(torch.randn_like(t) * t.std() for t in tensors_of(template, extras))]

        def run(
            x, *tensors, template=template, extras=extras, activation=activation, kind=kind, **options
        ) -> Outputs:
            (masks, weights, biases), given = rebuilt_made(template, tensors, extras)
            scale_map = kind and ScaleMap(kind)  # without one log_det is 0, and has no gradient
            options |= {"activation": activation, "scale_map": scale_map, "log_det": kind is not None}
            return ops.masked_autoregressive(x, masks, weights, biases, extras=given, **options)

        label = f"{(batch, D)} hidden {hidden} {activation} {kind}{' residual, extras' if residual else ''}"
        # The backward of an inverse reads y as it was returned, also in half precision: so must the reference's.
        yield Case("masked_autoregressive", label, inputs, run, smoke=D == 5)


def _splines() -> Iterator[Case]:
    for batch, features, bins, tails, soft_clip, layout in (
        (9, 5, 8, "linear", False, "bins last"),
        (40, 3, 5, "circular", True, "planes"),
        (7, 11, 10, "bounded", False, "features last"),
        (30, 6, 3, "linear", True, "shared"),
        (3, 130, 2, "linear", False, "bins last"),
    ):
        spline = Spline(bins, tails=TAILS.index(tails), soft_clip=soft_clip)
        innermost = {"planes": 0, "features last": 1}.get(layout, 2)

        def transform(x: Tensor, p: Tensor, inverse: bool, spline=spline, innermost=innermost) -> Outputs:
            p = p.transpose(innermost, 2).contiguous().transpose(innermost, 2)
            return spline_transform(x, p, spline, inverse, True)

        inputs = _randn((batch, features), (1 if layout == "shared" else batch, features, spline.per_feature))
        label = f"{(batch, features)} bins {bins} {tails}{' soft clip' if soft_clip else ''} {layout}"
        yield Case("rq_spline", label, inputs, transform, smoke=features in (5, 3, 6))


def _residual_blocks() -> Iterator[Case]:
    for i, activation in enumerate(MASKED_ACTIVATIONS):
        for shape in ((9, 7), (300, 33)):
            for norm in ("none", "given", "batch"):

                def activate(
                    x: Tensor, bias: Tensor, *parameters: Tensor, norm: str = norm, activation: str = activation
                ) -> Outputs:
                    given = {} if norm != "given" else {"mean": torch.ones_like(bias), "var": torch.ones_like(bias)}
                    of_batch = norm == "batch"
                    return [ops.norm_activate(x, activation, bias, *parameters, **given, of_batch=of_batch)[1]]

                inputs = _randn(shape, *((shape[1],) for _ in range(1 if norm == "none" else 3)))
                label = f"{shape} {activation} {norm}"
                yield Case("norm_activate", label, inputs, activate, smoke=shape[0] == 300 and i in (1, 4))
    for shape, rows in (((9, 7), 9), ((300, 33), 300), ((300, 33), 1)):
        for norm in ("end", "none", "batch"):

            def gated(x: Tensor, bias: Tensor, skip: Tensor, gate: Tensor, norm: str = norm) -> Outputs:
                of_batch, activation = norm == "batch", None if norm == "end" else "elu"
                found = ops.norm_activate(x, activation, bias, skip=skip, gate=gate, of_batch=of_batch)[:2]
                return [t for t in found if t is not None]

            inputs = _randn(shape, shape[1:], shape, (rows, shape[1]))
            label = f"{shape} gate {rows} {norm}"
            yield Case("norm_activate", label, inputs, gated, smoke=shape[0] == 300)
