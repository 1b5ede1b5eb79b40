"""Static cases of latent_matmul: every tile of a bank's product and of its gradient, and the product transposed."""

from __future__ import annotations

from typing import Any

from linfast.kernels.latent_matmul import GRADIENT_TILE, TILES, BankTile

from tests.static.cases import StaticCase

_DTYPES = ("fp32", "fp16", "bf16")


def cases() -> list[StaticCase]:
    """The shipped configurations."""
    return [
        *(_product(tile, dtype) for _, tile in TILES for dtype in _DTYPES),
        *(_product(tile, dtype, transposed=True) for _, tile in TILES for dtype in ("fp32", "bf16")),
        *(_gradient(dtype) for dtype in _DTYPES),
    ]


def _product(tile: BankTile, dtype: str, transposed: bool = False) -> StaticCase:
    """``transposed``: dz, where A is read along n_out."""
    signature = {f"{name}_ptr": f"*{dtype}" for name in ("z", "a", "bias", "y")}
    signature |= {f"{name}_ptr": "*i64" for name in ("order", "start", "last_tile", "operator")}
    signature |= dict.fromkeys(("n_operators", "n_out", "n_in"), "i32") | {"alpha": "fp32"}
    ones, runs = ("stride_am", "stride_an") if transposed else ("stride_an", "stride_am")
    signature |= dict.fromkeys(("stride_zb", "stride_ak", runs, "stride_yb"), "i32")
    constexprs = {"stride_zn": 1, ones: 1, "stride_bias": 1, "ADD_Z": True, "BIAS": not transposed}
    return _case("_bank_kernel", tile, dtype, signature, constexprs, "transposed" if transposed else "contiguous")


def _gradient(dtype: str) -> StaticCase:
    signature = {f"{name}_ptr": f"*{dtype}" for name in ("z", "grad", "da")}
    signature |= {f"{name}_ptr": "*i64" for name in ("order", "start")}
    signature |= dict.fromkeys(("n_out", "n_in", "stride_zb", "stride_gb"), "i32")
    ones = {"stride_zn": 1, "stride_gn": 1}
    return _case("_bank_gradient_kernel", GRADIENT_TILE, dtype, signature, ones, "contiguous")


def _case(
    kernel: str, tile: BankTile, dtype: str, signature: dict[str, str], constexprs: dict[str, Any], layout: str
) -> StaticCase:
    constexprs |= {"INT64": False, "ROWS": tile.rows, "COLUMNS": tile.columns, "INNER": tile.inner}
    return StaticCase(
        op="latent_matmul",
        kernel=kernel,
        config=f"{tile.rows}x{tile.columns}x{tile.inner} {layout} {dtype}",
        signature={**signature, **dict.fromkeys(constexprs, "constexpr")},
        constexprs=constexprs,
        num_warps=tile.num_warps,
        aligned=tuple(
            name
            for name, kind in signature.items()
            if kind.startswith("*") or name.startswith("stride") or name in ("n_out", "n_in")
        ),
        matrix_units=dtype != "fp32",
    )
