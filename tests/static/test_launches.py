"""The recorded launches include every kernel and table entry; a launch that does not fit its kernel is found."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import linfast.kernels
import pytest
from linfast.kernels import (
    affine_coupling,
    channel_mix,
    conv2d_configs,
    coupling_mix,
    coupling_mix_backward,
    depthwise_conv,
    group_norm_silu,
    latent_matmul,
    low_rank,
    masked_autoregressive,
    norm_activate,
    rq_spline,
    stack_backward_grid,
    stack_pack,
)
from linfast.kernels.stack_configs import CONFIGS, LAYERS
from linfast.kernels.stack_spec import STACK_PARTS

from tests.marks import long
from tests.static import table
from tests.static.cases import TARGETS
from tests.static.child import ChildFailed
from tests.static.record import Launch

_KERNELS = Path(linfast.kernels.__file__).parent
_NVIDIA = TARGETS[:3]
_OF_CONVOLUTIONS = (
    "_conv2d_fused_kernel",
    "_conv2d_weight_kernel",
    "_group_statistics_kernel",
)  # torch's on gfx942


def _shipped() -> Iterator[tuple[tuple[str, ...], str, dict[str, Any]]]:
    """(targets, kernel, constants) of every entry of every table."""
    for _, tile in affine_coupling.TILES:
        for kernel in ("_affine_coupling_kernel", "_affine_coupling_backward_kernel"):
            yield TARGETS, kernel, tile
    for kernel, mixes in {
        "_channel_mix_unrolled_kernel": channel_mix.UNROLLED,
        "_channel_mix_dot_kernel": channel_mix.DOTS,
        "_channel_mix_weight_kernel": channel_mix.WEIGHTS,
        "_coupling_mix_unrolled_kernel": channel_mix.UNROLLED,
        "_coupling_mix_dot_kernel": coupling_mix.DOTS,
        "_coupling_mix_backward_unrolled_kernel": channel_mix.UNROLLED,
        "_coupling_mix_backward_dot_kernel": coupling_mix_backward.BACKWARD_DOTS,
    }.items():
        for _, mix in mixes:
            yield TARGETS, kernel, mix
    for tile in depthwise_conv.TILES.values():
        for kernel in ("_depthwise_conv_kernel", "_depthwise_conv_weight_kernel"):
            yield TARGETS, kernel, tile
    for kernel, budgets in {
        "_group_norm_silu_kernel": group_norm_silu.BUDGETS,
        "_group_norm_silu_backward_kernel": group_norm_silu.BACKWARD_BUDGETS,
    }.items():
        for elements, num_warps in budgets:
            yield TARGETS, kernel, {"CHANNELS x POSITIONS": elements, "num_warps": num_warps}
    for kernel in ("_norm_activate_kernel", "_norm_activate_backward_kernel"):
        for tile in (norm_activate.SUMMING, norm_activate.ELEMENTWISE):
            yield TARGETS, kernel, tile
    for kernel, banks in {
        "_bank_kernel": [bank for _, bank in latent_matmul.TILES],
        "_bank_gradient_kernel": [latent_matmul.GRADIENT_TILE],
        "_row_kernel": [latent_matmul.ROW_TILE],
    }.items():
        for bank in banks:
            yield TARGETS, kernel, bank
    for _, rank in low_rank.TILES:
        for kernel in ("_project_kernel", "_expand_kernel", "_low_rank_backward_kernel"):
            yield TARGETS, kernel, rank
    for kernel, convs in {
        "_conv2d_fused_kernel": conv2d_configs.TILES,
        "_conv2d_weight_kernel": conv2d_configs.WEIGHT_TILES,
    }.items():
        for _, conv in convs:
            size = {name: value for name, value in conv.items() if name != "split_warps"}
            yield _NVIDIA, kernel, size
            if "split_warps" in conv and conv["COLUMNS"] <= conv2d_configs.WIDEST["exact"]:
                yield _NVIDIA, kernel, {**size, "num_warps": conv["split_warps"]}
    for tile in (stack_backward_grid.LARGE, stack_backward_grid.SMALL):
        for parts in (1, 2, 3):
            for target in TARGETS:
                stages = stack_backward_grid.STAGES.get(target, tile["STAGES"])
                yield (target,), "_coupling_stack_backward_kernel", {**tile, "STAGES": stages, "PARTS": parts}
    packing = {"RUNS x LONGEST": stack_pack.TILE["VALUES"], "num_warps": stack_pack.TILE["num_warps"]}
    yield TARGETS, "_stack_pack_kernel", packing
    for target, program in masked_autoregressive.TILES.items():
        size = {"ROWS": program.rows, "UNITS": program.units, "CHUNK": program.chunk}
        yield (target,), "_masked_autoregressive_kernel", {**size, "num_warps": program.num_warps}
    for _, spline in rq_spline.TILES:
        for kernel in ("_rq_spline_kernel", "_rq_spline_backward_kernel"):
            yield TARGETS, kernel, {"ROWS x FEATURES": spline["VALUES"], "num_warps": spline["num_warps"]}
    yield from _shipped_stacks()
    yield from _shipped_layers()


def _shipped_stacks() -> Iterator[tuple[tuple[str, ...], str, dict[str, Any]]]:
    for (target, mode), entries in CONFIGS.items():
        for entry, config in [(each, tile) for each in entries for tile in (*each.smaller, each.config)]:
            constants = {
                "HALF": entry.features // 2, "HIDDEN": entry.hidden, "PARTS": STACK_PARTS[mode],
                "ROWS": config.rows, "CHUNK": min(config.chunk or entry.hidden, entry.hidden),
                "LAYER_STAGES": config.layer_stages, "CHUNK_STAGES": config.chunk_stages,
                "num_warps": config.num_warps,
            }  # fmt: skip
            most = {"N_LINEAR": entry.n_linear, "MAPS": entry.maps}
            yield (target,), "_coupling_stack_kernel", {**constants, **most}
            if entry.linearizer:
                yield (target,), "_linearizer_stack_kernel", {**constants, "MAPS_X": entry.maps}


def _shipped_layers() -> Iterator[tuple[tuple[str, ...], str, dict[str, Any]]]:
    for (target, mode), config in LAYERS.items():
        constants = {
            "ROWS": config.rows, "DEPTH": config.depth, "STAGES": config.stages, "PARTS": STACK_PARTS[mode],
            "num_warps": config.num_warps,
        }  # fmt: skip
        yield (target,), "_layer_kernel", {**constants, "COLUMNS": config.columns}
        yield (target,), "_layer_coupling_kernel", {**constants, "COLUMNS": config.last_columns}


def _has(launch: Launch, constants: dict[str, Any]) -> bool:
    known = {"num_warps": launch.options.get("num_warps", 4), **launch.constants}
    for product in [name for name in constants if " x " in name]:
        known[product] = math.prod(known[name] for name in product.split(" x "))
    return all(known.get(name) == value for name, value in constants.items())


def test_every_launched_kernel_is_recorded_for_every_target(now: list[Launch]) -> None:
    sources = [path.read_text() for path in _KERNELS.glob("*.py")]
    launched = {name for source in sources for name in re.findall(r"(_\w+_kernel)\[", source)}
    assert len(launched) > 20
    missing = {(name, target) for name in launched for target in TARGETS}
    missing -= {(launch.kernel, launch.target) for launch in now}
    assert missing == {(name, "gfx942") for name in _OF_CONVOLUTIONS}


def test_every_entry_of_every_table_is_recorded_where_it_ships(now: list[Launch]) -> None:
    missing = [
        (target, kernel, constants)
        for targets, kernel, constants in _shipped()
        for target in targets
        if not any((launch.target, launch.kernel) == (target, kernel) and _has(launch, constants) for launch in now)
    ]
    assert missing == []


def _with(tmp_path: Path, old: str, new: str, file: str = "low_rank.py") -> Path:
    """A copy of the kernels with a replaced text in one file."""
    folder = tmp_path / "kernels"
    shutil.copytree(_KERNELS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1))
    return folder


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"DENSE": dense, ', "", "missing .*'DENSE'"),
        *long(
            ('"RANK": rank, ', '"RANKED": rank, ', "RANK"),
            ("n_features, total, split_rows,", "n_features, split_rows,", "missing|multiple values"),
        ),
    ],
)
def test_an_argument_that_does_not_fit_its_kernel_is_an_error(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    with pytest.raises(ChildFailed, match=message):
        table.launches("low_rank", kernels=_with(tmp_path, old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(batch, total, rank), dtype=torch.float32)", "(batch, total, rank), dtype=torch.float16)"),
        *long(
            ('"ROWS": 512, "RANKS": 4', '"ROWS": 256, "RANKS": 4'),
            ("total += factor.to", "total -= factor.to"),
            ("n_features, total, split_rows, *x.stride(),", "n_features, total, split_rows, *x.stride()[::-1],"),
        ),
    ],
)
def test_another_type_tile_order_or_source_makes_a_table_stale(tmp_path: Path, old: str, new: str) -> None:
    planted = table.launches("low_rank", kernels=_with(tmp_path, old, new))
    for triton in table.VERSIONS:
        assert table.stale(table.kept(triton), planted) != []
