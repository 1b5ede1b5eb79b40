"""The calls whose launches are compiled: every op at sizes that reach every tile of every table, in every mode.

Half precision, odd sizes and strides are only for the targets of _TWO; activations and scale maps are compared on
one tile of one target.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from linfast.kernels.conv2d_configs import WIDEST
from linfast.kernels.stack_configs import CONFIGS, LARGEST_LAYERS, LAYERS, MULTIPROCESSORS, StackEntry, entry_for
from linfast.kernels.stack_spec import DENSE, DIAGONAL, NO_MAPS

from linfast.ops.activations import ACTIVATION_NAMES
from linfast.ops.masked_autoregressive import MASKED_ACTIVATIONS
from linfast.precision import PRECISIONS
from linfast.scale_maps import SCALE_MAP_KINDS
from tests.ops.stacks import NAMES
from tests.static import calls

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
_NVIDIA = TARGETS[:3]
_TWO = ("sm_80", "sm_90")
_ONE = ("sm_90",)
_FULL = 1 << 16  # a batch for which every target has a program for each multiprocessor, whatever the tile
_MANY = 1024  # rows: enough for the backward's larger tile, on the two multiprocessors that record.py gives it


@dataclass(frozen=True)
class Case:
    """A named call, with the batch that it is compiled at and the targets that it runs on."""

    name: str
    function: partial[None]
    batch: int = 8
    targets: tuple[str, ...] = TARGETS

    @property
    def op(self) -> str:
        return self.function.func.__name__

    def run(self) -> None:
        self.function(self.batch)


def all_cases() -> list[Case]:
    """All cases in the order of the table."""
    makers = (
        *(_affine_couplings, _channel_mixes, _coupling_mixes, _depthwise_convs, _group_norms, _latent_matmuls),
        *(_low_ranks, _convs, _stacks, _layers, _linearizers, _gradients),
        *(_masked, _splines, _residual_blocks),
    )
    return [case for make in makers for case in make()]


def _affine_couplings() -> Iterator[Case]:
    for width in (16, 64, 256, 4096):
        yield Case(f"x{width} contiguous fp32", partial(calls.affine_coupling, shape=(2 * width,)))
    yield Case("x64 inverse fp32", partial(calls.affine_coupling, shape=(128,), inverse=True), targets=_TWO)
    yield Case("x32 channels_last fp32", partial(calls.affine_coupling, shape=(64, 16, 16), last=True))
    yield Case("x3 fp32", partial(calls.affine_coupling, shape=(5,)), targets=_TWO)
    yield Case("x4096 bf16", partial(calls.affine_coupling, shape=(8192,), dtype="bf16"), targets=_TWO)
    for kind in SCALE_MAP_KINDS:
        call = partial(calls.affine_coupling, shape=(8192,), kind=kind, order="scale_first")
        yield Case(f"x4096 {kind} scale first", call, targets=_ONE)


def _channel_mixes() -> Iterator[Case]:
    for channels in (4, 15, 16, 32, 64, 128):
        image = {"channels": channels, "shape": (32, 32)}
        yield Case(f"C={channels} contiguous fp32", partial(calls.channel_mix, **image))
        if channels in (15, 64, 128):
            yield Case(f"C={channels} bf16", partial(calls.channel_mix, **image, dtype="bf16"), targets=_TWO)
    yield Case("C=64 channels_last fp32", partial(calls.channel_mix, channels=64, shape=(32, 32), last=True))


def _coupling_mixes() -> Iterator[Case]:
    for channels in (4, 15, 16, 32, 64, 128):
        image = {"channels": channels, "shape": (32, 32)}
        yield Case(f"C={channels} contiguous fp32", partial(calls.coupling_mix, **image))
        if channels in (15, 64, 128):
            yield Case(f"C={channels} bf16", partial(calls.coupling_mix, **image, dtype="bf16"), targets=_TWO)
    call = partial(calls.coupling_mix, channels=64, shape=(32, 32), inverse=True)
    yield Case("C=64 inverse fp32", call, targets=_TWO)
    call = partial(calls.coupling_mix, channels=64, shape=(32, 32), last=True)
    yield Case("C=64 channels_last fp32", call)
    call = partial(calls.coupling_mix, channels=128, shape=(32, 32), frozen=True)
    yield Case("C=128 no dW fp32", call, targets=_TWO)


def _depthwise_convs() -> Iterator[Case]:
    for k in (3, 9):
        for last in (False, True):
            call = partial(calls.depthwise_conv, channels=64, size=64, kernel=(k, k), last=last)
            yield Case(f"{k}x{k} {'channels_last' if last else 'NCHW'} fp32", call)
    yield Case("5x2 small fp32", partial(calls.depthwise_conv, channels=3, size=8, kernel=(5, 2)), targets=_TWO)
    call = partial(calls.depthwise_conv, channels=64, size=64, kernel=(3, 3), dtype="bf16")
    yield Case("3x3 bf16", call, targets=_TWO)


def _group_norms() -> Iterator[Case]:
    for per_group, size in ((16, 8), (4, 32), (16, 32), (16, 64)):
        call = partial(calls.group_norm_silu, per_group=per_group, shape=(size, size))
        yield Case(f"{per_group}x{size * size} contiguous fp32", call)
    for size in (32, 64):
        call = partial(calls.group_norm_silu, per_group=16, shape=(size, size), last=True)
        yield Case(f"16x{size * size} channels_last fp32", call)
    call = partial(calls.group_norm_silu, per_group=16, shape=(32, 32), dtype="bf16")
    yield Case("16x1024 bf16", call, targets=_TWO)
    yield Case("12x1240 fp32", partial(calls.group_norm_silu, per_group=12, shape=(31, 40)), targets=_TWO)
    yield Case("64x1 fp32", partial(calls.group_norm_silu, per_group=64, shape=()), targets=_TWO)
    call = partial(
        calls.group_norm_silu, per_group=16, shape=(64, 64), affine=False, embedded=False, activation=False
    )
    yield Case("16x4096 plain fp32", call, targets=_TWO)


def _residual_blocks() -> Iterator[Case]:
    for dtype in ("fp32", "bf16"):
        yield Case(f"x512 {dtype}", partial(calls.norm_activate, width=512, dtype=dtype), 64)
        yield Case(f"x512 gated {dtype}", partial(calls.norm_activate, width=512, dtype=dtype, gated=True), 64)
    call = partial(calls.norm_activate, width=512, of_batch=False, frozen=True)
    yield Case("x512 given fp32", call, 64)
    call = partial(calls.norm_activate, width=51, of_batch=False, normed=False, activation="gelu")
    yield Case("x51 gelu fp32", call, 64, _TWO)
    call = partial(calls.norm_activate, of_batch=False, normed=False, activation=None, gated=True)
    yield Case("x512 end of a block fp32", partial(call, width=512), 64)
    yield Case("x512 end of a block, no gradients of parameters fp32", partial(call, width=512, frozen=True), 64)
    yield Case("x51 end of a block, one gate fp32", partial(call, width=51, rows=1), 64, _TWO)


def _latent_matmuls() -> Iterator[Case]:
    for kind, batch, operators in (("row by row", 32, 4), ("few rows", 16_384, 1024), ("many rows", 16_384, 4)):
        call = partial(calls.latent_matmul, n=64, operators=operators)
        for mode in PRECISIONS if batch > 32 else ("exact",):
            yield Case(f"{kind} contiguous {mode} fp32", partial(call, precision=mode), batch)
        yield Case(f"{kind} bf16", partial(call, dtype="bf16"), batch)
        for mode in ("exact", "tf32") if batch > 32 else ("exact",):
            odd = partial(calls.latent_matmul, n=51, operators=operators, precision=mode)
            yield Case(f"{kind} n=51 {mode} fp32", odd, batch, _TWO)


def _low_ranks() -> Iterator[Case]:
    for rank in (4, 8, 16, 32, 64):
        yield Case(f"r={rank} contiguous fp32", partial(calls.low_rank, n=1024, rank=rank))
    yield Case("r=5 fp32", partial(calls.low_rank, n=1024, rank=5), targets=_TWO)
    yield Case("r=8 transposed fp32", partial(calls.low_rank, n=1024, rank=8, dense=False), targets=_TWO)
    yield Case("r=8 bf16", partial(calls.low_rank, n=1024, rank=8, dtype="bf16"), targets=_TWO)


def _convs() -> Iterator[Case]:
    """The cases that run by default, and the widest tile, which only backend "triton" uses."""
    for channels in (16, 32, 64, 128):
        for mode in [mode for mode, widest in WIDEST.items() if channels <= widest or mode == "tf32"]:
            call = partial(calls.conv2d_fused, channels=channels, size=32, precision=mode)
            yield Case(f"C={channels} {mode}", call, targets=_NVIDIA)
    small = {"channels": 16, "precision": "tf32"}
    yield Case("C=16 NCHW tf32", partial(calls.conv2d_fused, **small, size=32, last=False), targets=_TWO)
    yield Case("C=16 4x4 tf32", partial(calls.conv2d_fused, **small, size=4), targets=_TWO)
    call = partial(calls.conv2d_fused, channels=32, size=32, kernel=1, precision="tf32")
    yield Case("C=32 1x1 tf32", call, targets=_TWO)
    call = partial(calls.conv2d_fused, channels=64, size=32, precision="fast", dtype="bf16")
    yield Case("C=64 bf16", call, targets=_TWO)


def _tiles() -> Iterator[tuple[str, str, StackEntry, str, int]]:
    """(target, mode, entry, its sizes in words, a batch) for each tile of each entry; small batches are named."""
    for (target, mode), entries in CONFIGS.items():
        for entry in entries:
            batch, sizes = 8, f"D={entry.features} H={entry.hidden} {mode}"
            for config in entry.smaller:
                yield target, mode, entry, f"{sizes} {config.rows} rows", batch
                batch = config.rows * MULTIPROCESSORS[target] + 1
            yield target, mode, entry, sizes, batch


def _stack(mode: str, entry: StackEntry, **options: Any) -> partial[None]:
    return partial(
        calls.coupling_stack,
        features=entry.features,
        hidden=entry.hidden,
        precision=mode,
        backward=False,
        **options,
    )


def _stacks() -> Iterator[Case]:
    """Each tile forward with three layers and no maps, the common flow, and inverse at its maximal sizes."""
    for target, mode, entry, sizes, batch in _tiles():
        n = min(3, entry.n_linear)
        yield Case(f"{sizes} forward n={n}", _stack(mode, entry, n_linear=n), batch, (target,))
        most = {"n_linear": entry.n_linear, "maps": entry.maps}
        name = f"{sizes} inverse n={entry.n_linear} {NAMES[entry.maps]}"
        yield Case(name, _stack(mode, entry, **most, inverse=True), batch, (target,))
    for mode in ("fast", "exact"):
        for name in ACTIVATION_NAMES:
            call = _stack(mode, CONFIGS["sm_90", mode][0], n_linear=3, activation=name)
            yield Case(f"D=64 H=128 {mode} {name}", call, _FULL, _ONE)


def _layers() -> Iterator[Case]:
    """Layer by layer: each tile whole, and in both directions; other sizes and types on some targets."""
    call = partial(calls.coupling_stack, backward=False)
    most = partial(call, features=LARGEST_LAYERS[0], hidden=LARGEST_LAYERS[1])
    for target, mode in LAYERS:
        name = f"D={LARGEST_LAYERS[0]} H={LARGEST_LAYERS[1]} {mode}"
        yield Case(f"{name} forward n=3", partial(most, n_linear=3, precision=mode), targets=(target,))
        yield Case(
            f"{name} inverse n=1", partial(most, n_linear=1, precision=mode, inverse=True), targets=(target,)
        )
    for mode in ("fast", "exact"):
        for features, hidden in ((131, 260), (6, 300)):
            odd = partial(call, features=features, hidden=hidden, n_linear=2, precision=mode)
            narrow = " narrow" if features < 16 else ""
            yield Case(f"D={features} H={hidden} {mode}{narrow}", odd, targets=_TWO)
        for name in ACTIVATION_NAMES:
            wide = partial(most, n_linear=3, precision=mode, activation=name)
            yield Case(f"D={LARGEST_LAYERS[0]} H={LARGEST_LAYERS[1]} {mode} {name}", wide, targets=_ONE)
    for kind in SCALE_MAP_KINDS:
        yield Case(
            f"layers exact {kind} scale", partial(most, n_linear=3, precision="exact", kind=kind), targets=_ONE
        )
    yield Case("layers fast bf16", partial(most, n_linear=3, precision="fast", dtype="bf16"), targets=_TWO)


def _linearizers() -> Iterator[Case]:
    for target, mode, entry, sizes, batch in _tiles():
        if entry.linearizer:
            taken = entry_for(entry.features, entry.hidden, 3, mode, target, entry.maps, linearizer=True)
            n = 3 if taken is entry else entry.n_linear
            sizes = sizes if n == 3 else f"{sizes} n={n}"
            options = {"n_linear": n, "maps": entry.maps, "precision": mode, "backward": False}
            call = partial(calls.linearizer, features=entry.features, hidden=entry.hidden, **options)
            yield Case(f"{sizes} {NAMES[entry.maps]}", call, batch, (target,))
            if n == 3 and (target, entry.hidden, entry.maps) == (
                "sm_90",
                128,
                DIAGONAL,
            ):  # a flow without mixes: no maps
                yield Case(f"{sizes} no maps", partial(call, maps=NO_MAPS), batch, (target,))


def _gradients() -> Iterator[Case]:
    """The backward of the coupling stack on both its tiles, at its widest and narrowest."""
    for mode in ("fast", "tf32", "high", "exact"):
        maps = NO_MAPS if mode == "exact" else DENSE
        targets = tuple(target for target in TARGETS if (target, mode) in CONFIGS)
        widest = partial(calls.coupling_stack, features=64, hidden=128, n_linear=3, precision=mode, maps=maps)
        yield Case(f"gradient {mode}", widest, _MANY, targets)
        yield Case(f"gradient {mode}, few rows", widest, targets=targets)
    exact = {"n_linear": 3, "precision": "exact"}
    yield Case("gradient exact narrow", partial(calls.coupling_stack, features=6, hidden=16, **exact), targets=_TWO)
    widest = partial(calls.coupling_stack, features=64, hidden=128, **exact)
    yield Case("gradient exact dense", partial(widest, maps=DENSE), _MANY, _ONE)
    for n_linear in (1, 2, 4):
        call = partial(calls.coupling_stack, features=64, hidden=128, n_linear=n_linear, precision="high")
        yield Case(f"gradient high n={n_linear}", call, _MANY, _ONE)
    for name in ACTIVATION_NAMES:
        call = partial(widest, activation=name)
        yield Case(f"gradient {name}", call, _MANY, _ONE)
    for kind in SCALE_MAP_KINDS:
        call = partial(widest, kind=kind)
        yield Case(f"gradient {kind} scale", call, _MANY, _ONE)


def _masked() -> Iterator[Case]:
    """Both directions in every mode; residual blocks, extras and activations on one target."""
    sizes = {"features": 16, "hidden": 128}
    for mode in ("fast", "tf32", "high", "exact"):
        targets = _NVIDIA if mode == "tf32" else TARGETS
        for inverse in (False, True):
            call = partial(calls.masked_autoregressive, **sizes, precision=mode, inverse=inverse)
            yield Case(f"D=16 H=128 {mode} {'inverse' if inverse else 'forward'}", call, targets=targets)
    whole = {"features": 33, "hidden": 100, "precision": "exact", "residual": True, "extras": True}
    for inverse in (False, True):
        call = partial(calls.masked_autoregressive, **whole, inverse=inverse)
        yield Case(f"D=33 H=100 exact residual {'inverse' if inverse else 'forward'}", call)
    call = partial(calls.masked_autoregressive, **sizes, precision="fast", inverse=True, dtype="bf16")
    yield Case("D=16 H=128 fast inverse bf16", call, targets=_TWO)
    call = partial(calls.masked_autoregressive, **sizes, precision="exact", kind=None, inverse=True)
    yield Case("D=16 H=128 exact additive", call, targets=_TWO)
    for name in MASKED_ACTIVATIONS:
        for mode in ("fast", "exact"):
            call = partial(calls.masked_autoregressive, **sizes, precision=mode, activation=name, inverse=True)
            yield Case(f"D=16 H=128 {mode} inverse {name}", call, targets=_ONE)
    for kind in SCALE_MAP_KINDS:
        call = partial(calls.masked_autoregressive, **sizes, precision="exact", kind=kind, inverse=True)
        yield Case(f"D=16 H=128 exact inverse {kind} scale", call, targets=_ONE)


def _splines() -> Iterator[Case]:
    """Both tiles, in each layout and direction."""
    for bins in (8, 16):
        yield Case(f"K={bins} fp32", partial(calls.rq_spline, bins=bins))
    yield Case("K=8 inverse fp32", partial(calls.rq_spline, inverse=True))
    yield Case("K=8 planes fp32", partial(calls.rq_spline, layout=(2, 1, 0)))
    yield Case("K=8 features last fp32", partial(calls.rq_spline, layout=(0, 2, 1)), targets=_TWO)
    yield Case("K=8 shared fp32", partial(calls.rq_spline, shared=True))
    yield Case("K=8 D=300 fp32", partial(calls.rq_spline, features=300), targets=_TWO)
    yield Case("K=8 bf16", partial(calls.rq_spline, dtype="bf16"), targets=_TWO)
    yield Case("K=10 circular fp32", partial(calls.rq_spline, bins=10, tails="circular"), targets=_TWO)
    call = partial(calls.rq_spline, tails="bounded", soft_clip=True, inverse=True)
    yield Case("K=8 bounded soft clip inverse fp32", call, targets=_TWO)
