"""The spills that are accepted, with their reasons. Nothing else may spill.

A number is bytes of the stack plus instructions that access it, as in the tables, for a target, a kernel and a
call. No GPU was available: statements about speed are predictions, not measurements.
"""

from __future__ import annotations

from tests.static.table import Key

_NEW, _OLD = "3.7.1", "3.6.0"
_BACKWARD = "_coupling_stack_backward_kernel"

# Tiles for small batches. ptxas gives threads 128 of their 255 registers, so that two programs would fit a
# multiprocessor. 32 rows do not spill, but a program then takes up to twice as long, by a model of the loop.
_SMALL = {
    _NEW: [
        ("sm_90", "_coupling_stack_kernel", "D=128 H=256 fast 16 rows forward n=3", 10),
        ("sm_90", "_linearizer_stack_kernel", "D=64 H=128 tf32 16 rows dense", 37),
        ("sm_100", "_coupling_stack_kernel", "D=64 H=128 tf32 16 rows forward n=3", 22),
        ("sm_100", "_coupling_stack_kernel", "D=64 H=128 tf32 16 rows inverse n=3 dense", 23),
    ],
    _OLD: [
        ("sm_90", "_coupling_stack_kernel", "D=64 H=128 fast 64 rows inverse n=4 diagonal", 12),
        ("sm_90", "_linearizer_stack_kernel", "D=64 H=128 tf32 16 rows dense", 23),
        ("sm_100", "_coupling_stack_kernel", "D=128 H=256 fast 16 rows forward n=3", 10),
        ("sm_100", "_linearizer_stack_kernel", "D=128 H=256 tf32 16 rows dense", 25),
    ],
}
# At the limit of registers. The next tile below 64 rows has 32, which reads the weights twice as often; below 32
# there is no tile, and not running in one launch costs more than a few spilled words.
_FULL = {
    _NEW: [("sm_90", "_linearizer_stack_kernel", "D=64 H=128 exact dense", 97)],
    _OLD: [
        ("sm_100", "_coupling_stack_kernel", "D=128 H=256 fast forward n=3", 12),
        ("sm_100", "_coupling_stack_kernel", "D=128 H=256 tf32 forward n=3", 10),
        ("sm_80", "_coupling_stack_kernel", "D=64 H=128 tf32 inverse n=4 dense", 12),
    ],
}
# 128 rows in three parts at odd sizes, where each of the 24 loads per step has its own address. 64 rows do not
# spill, and read the bank twice as often on every GPU.
_BANK = [
    ("sm_80", "_bank_kernel", "many rows n=51 exact fp32", 10),
    ("sm_80", "_bank_kernel", "many rows n=51 exact fp32 (2)", 30),
]
# A few words and accesses, where ptxas chose 48 to 128 of the 255 registers. The cause was not investigated.
_FEW_WORDS = {
    _NEW: [
        ("sm_100", "_group_norm_silu_kernel", "16x4096 contiguous fp32", 27),
        ("sm_100", "_conv2d_fused_kernel", "C=32 tf32", 11),
        ("sm_80", "_conv2d_fused_kernel", "C=32 high (2)", 13),
        ("sm_80", "_conv2d_fused_kernel", "C=32 exact (2)", 24),
        ("sm_80", "_masked_autoregressive_kernel", "D=16 H=128 high inverse", 10),
        ("sm_90", "_norm_activate_kernel", "x512 gated fp32", 10),
    ],
    _OLD: [
        ("sm_80", "_coupling_stack_backward_kernel", "gradient high", 10),
        ("sm_90", "_masked_autoregressive_kernel", "D=16 H=128 exact inverse elu", 22),
        ("sm_100", "_coupling_mix_dot_kernel", "C=128 contiguous fp32", 10),
        ("sm_100", "_conv2d_fused_kernel", "C=16 tf32", 12),
        ("sm_100", "_conv2d_fused_kernel", "C=32 tf32", 14),
        ("sm_80", "_conv2d_fused_kernel", "C=32 high (2)", 13),
        ("sm_80", "_conv2d_fused_kernel", "C=32 exact (2)", 13),
        ("sm_100", "_conv2d_fused_kernel", "C=128 tf32 (2)", 10),
        ("sm_80", "_conv2d_fused_kernel", "C=16 NCHW tf32", 11),
        *[
            (target, "_masked_autoregressive_kernel", "D=16 H=128 high inverse", 12)
            for target in ("sm_90", "sm_100")
        ],
        ("sm_80", "_masked_autoregressive_kernel", "D=16 H=128 high inverse", 10),
        ("sm_90", "_rq_spline_backward_kernel", "K=10 circular fp32", 10),
        ("sm_100", "_residual_stack_kernel", "H=128 tf32 fp32", 55),
        *[(target, "_norm_activate_kernel", "x512 gated fp32", 10) for target in ("sm_90", "sm_100")],
    ],
}
# Scalar registers, which go to lanes of a vector register and not to memory; in "exact, few rows" also 8 others.
_SCALARS = {
    _NEW: [
        ("gfx942", "_masked_autoregressive_kernel", "D=33 H=100 exact residual forward", 4),
        ("gfx942", "_bank_kernel", "many rows contiguous exact fp32", 12),
        ("gfx942", "_bank_kernel", "many rows contiguous exact fp32 (2)", 7),
        ("gfx942", "_bank_kernel", "many rows contiguous high fp32", 12),
        ("gfx942", "_bank_kernel", "many rows contiguous high fp32 (2)", 7),
        ("gfx942", "_bank_kernel", "many rows contiguous fast fp32", 8),
        ("gfx942", "_bank_kernel", "many rows contiguous fast fp32 (2)", 2),
        ("gfx942", _BACKWARD, "gradient exact", 37),
        ("gfx942", _BACKWARD, "gradient exact, few rows", 36),
        ("gfx942", _BACKWARD, "gradient fast", 40),
        ("gfx942", _BACKWARD, "gradient high", 47),
        ("gfx942", _BACKWARD, "gradient fast, few rows", 34),
        ("gfx942", _BACKWARD, "gradient high, few rows", 35),
    ],
    _OLD: [
        ("gfx942", "_masked_autoregressive_kernel", "D=33 H=100 exact residual forward", 1),
        ("gfx942", _BACKWARD, "gradient exact", 19),
        ("gfx942", _BACKWARD, "gradient exact, few rows", 35),
        ("gfx942", _BACKWARD, "gradient fast", 34),
        ("gfx942", _BACKWARD, "gradient high", 38),
        ("gfx942", _BACKWARD, "gradient fast, few rows", 32),
        ("gfx942", _BACKWARD, "gradient high, few rows", 35),
    ],
}
# A few words that are read once for each step of the stack, and not in the loops over tiles (seen in the code).
_ONCE_A_STEP = {
    _NEW: [("sm_80", _BACKWARD, "gradient exact", 14)],
    _OLD: [("sm_80", _BACKWARD, "gradient exact", 36)],
}
# Operands in two parts, "high" and "exact", at the limit of 255 registers: 128 rows on sm_90, 64 elsewhere and for
# small batches. At most 25 of 2,190 instructions per layer access the stack ("high" on sm_90). The next tile has 32
# rows, does not spill, and issues 2.2 to 3 times as many instructions per row.
_TWO_PARTS = {
    _NEW: [
        ("sm_100", "_coupling_stack_kernel", "D=64 H=128 high forward n=3", 36),
        ("sm_100", "_coupling_stack_kernel", "D=64 H=128 high inverse n=3 diagonal", 46),
        ("sm_80", "_coupling_stack_kernel", "D=64 H=128 exact forward n=3", 36),
        ("sm_80", "_coupling_stack_kernel", "D=64 H=128 exact inverse n=3 diagonal", 36),
        ("sm_80", "_coupling_stack_kernel", "D=64 H=128 high inverse n=3 diagonal", 10),
        ("sm_90", "_coupling_stack_kernel", "D=64 H=128 exact 64 rows forward n=3", 14),
        ("sm_90", "_coupling_stack_kernel", "D=64 H=128 exact 64 rows inverse n=3 diagonal", 27),
        ("sm_90", "_coupling_stack_kernel", "D=64 H=128 exact forward n=3", 11),
        ("sm_90", "_coupling_stack_kernel", "D=64 H=128 exact gelu", 13),
        ("sm_90", "_coupling_stack_kernel", "D=64 H=128 exact inverse n=3 diagonal", 13),
        ("sm_90", "_coupling_stack_kernel", "D=64 H=128 exact relu", 11),
        ("sm_90", "_coupling_stack_kernel", "D=64 H=128 high 64 rows forward n=3", 25),
        ("sm_90", "_coupling_stack_kernel", "D=64 H=128 high 64 rows inverse n=3 diagonal", 86),
        ("sm_90", "_coupling_stack_kernel", "D=64 H=128 high forward n=3", 123),
        ("sm_90", "_coupling_stack_kernel", "D=64 H=128 high inverse n=3 diagonal", 105),
        ("sm_80", "_linearizer_stack_kernel", "D=64 H=128 exact dense", 62),
        ("sm_80", "_linearizer_stack_kernel", "D=64 H=128 exact diagonal", 201),
        ("sm_80", "_linearizer_stack_kernel", "D=64 H=128 high diagonal", 10),
        ("sm_90", "_linearizer_stack_kernel", "D=64 H=128 exact 64 rows diagonal", 106),
        ("sm_90", "_linearizer_stack_kernel", "D=64 H=128 exact 64 rows no maps", 79),
        ("sm_90", "_linearizer_stack_kernel", "D=64 H=128 exact diagonal", 14),
        ("sm_90", "_linearizer_stack_kernel", "D=64 H=128 exact no maps", 11),
        ("sm_90", "_linearizer_stack_kernel", "D=64 H=128 high 64 rows diagonal", 121),
        ("sm_90", "_linearizer_stack_kernel", "D=64 H=128 high 64 rows no maps", 95),
        ("sm_90", "_linearizer_stack_kernel", "D=64 H=128 high dense", 161),
        ("sm_90", "_linearizer_stack_kernel", "D=64 H=128 high diagonal", 132),
        ("sm_90", "_linearizer_stack_kernel", "D=64 H=128 high no maps", 117),
    ],
    _OLD: [
        ("sm_80", "_coupling_stack_kernel", "D=64 H=128 exact forward n=3", 47),
        ("sm_80", "_coupling_stack_kernel", "D=64 H=128 exact inverse n=3 diagonal", 47),
        ("sm_90", "_coupling_stack_kernel", "D=64 H=128 exact 64 rows forward n=3", 25),
        ("sm_90", "_coupling_stack_kernel", "D=64 H=128 exact 64 rows inverse n=3 diagonal", 27),
        ("sm_90", "_coupling_stack_kernel", "D=64 H=128 exact forward n=3", 12),
        ("sm_90", "_coupling_stack_kernel", "D=64 H=128 exact gelu", 90),
        ("sm_90", "_coupling_stack_kernel", "D=64 H=128 exact inverse n=3 diagonal", 37),
        ("sm_90", "_coupling_stack_kernel", "D=64 H=128 exact relu", 12),
        ("sm_90", "_coupling_stack_kernel", "D=64 H=128 exact tanh", 50),
        ("sm_90", "_coupling_stack_kernel", "D=64 H=128 high 64 rows forward n=3", 37),
        ("sm_90", "_coupling_stack_kernel", "D=64 H=128 high 64 rows inverse n=3 diagonal", 103),
        ("sm_90", "_coupling_stack_kernel", "D=64 H=128 high forward n=3", 107),
        ("sm_90", "_coupling_stack_kernel", "D=64 H=128 high inverse n=3 diagonal", 107),
        ("sm_90", "_coupling_stack_kernel", "gradient exact narrow", 10),
        ("sm_100", "_linearizer_stack_kernel", "D=64 H=128 exact dense", 23),
        ("sm_80", "_linearizer_stack_kernel", "D=64 H=128 exact dense", 60),
        ("sm_80", "_linearizer_stack_kernel", "D=64 H=128 exact diagonal", 230),
        ("sm_90", "_linearizer_stack_kernel", "D=64 H=128 exact 64 rows diagonal", 155),
        ("sm_90", "_linearizer_stack_kernel", "D=64 H=128 exact 64 rows no maps", 150),
        ("sm_90", "_linearizer_stack_kernel", "D=64 H=128 exact dense", 136),
        ("sm_90", "_linearizer_stack_kernel", "D=64 H=128 exact diagonal", 40),
        ("sm_90", "_linearizer_stack_kernel", "D=64 H=128 exact no maps", 24),
        ("sm_90", "_linearizer_stack_kernel", "D=64 H=128 high 64 rows diagonal", 111),
        ("sm_90", "_linearizer_stack_kernel", "D=64 H=128 high 64 rows no maps", 108),
        ("sm_90", "_linearizer_stack_kernel", "D=64 H=128 high dense", 165),
        ("sm_90", "_linearizer_stack_kernel", "D=64 H=128 high diagonal", 202),
        ("sm_90", "_linearizer_stack_kernel", "D=64 H=128 high no maps", 225),
    ],
}
# Layer by layer in two parts: the epilogue holds shift, log-scale and the moved half beside the sums.
_WIDE_LAYERS = {
    _NEW: [
        ("sm_100", "_layer_coupling_kernel", "D=256 H=512 exact forward n=3", 110),
        ("sm_100", "_layer_coupling_kernel", "D=256 H=512 exact inverse n=1", 26),
        ("sm_100", "_layer_coupling_kernel", "D=256 H=512 high inverse n=1", 30),
        ("sm_80", "_layer_coupling_kernel", "D=131 H=260 exact", 20),
        ("sm_80", "_layer_coupling_kernel", "D=131 H=260 exact (2)", 20),
        ("sm_80", "_layer_coupling_kernel", "D=256 H=512 exact forward n=3", 11),
        ("sm_80", "_layer_coupling_kernel", "D=256 H=512 exact inverse n=1", 11),
        ("sm_80", "_layer_kernel", "D=256 H=512 exact forward n=3", 24),
    ],
    _OLD: [
        ("sm_100", "_layer_coupling_kernel", "D=256 H=512 exact forward n=3", 24),
        ("sm_100", "_layer_coupling_kernel", "D=256 H=512 exact inverse n=1", 24),
        ("sm_80", "_layer_coupling_kernel", "D=256 H=512 exact forward n=3", 11),
        ("sm_80", "_layer_coupling_kernel", "D=256 H=512 exact inverse n=1", 11),
        ("sm_80", "_layer_kernel", "D=256 H=512 exact forward n=3", 24),
    ],
}
# ptxas gives threads 128 of their 255 registers, so that two programs would fit a multiprocessor. Small networks
# and small batches, whose time is latency.
_HALF_OF_REGISTERS = {
    _NEW: [
        ("sm_80", "_coupling_stack_backward_kernel", "gradient exact narrow", 133),
        ("sm_80", "_coupling_stack_backward_kernel", "gradient fast, few rows", 142),
        ("sm_90", "_coupling_stack_backward_kernel", "gradient exact narrow", 189),
        ("sm_100", "_coupling_stack_kernel", "gradient tf32", 12),
        ("sm_80", "_linearizer_stack_kernel", "D=64 H=128 high 16 rows diagonal", 42),
    ],
    _OLD: [
        ("sm_80", "_bank_gradient_kernel", "few rows n=51 tf32 fp32", 13),
        ("sm_100", "_conv2d_weight_kernel", "C=16 exact", 28),
        ("sm_100", "_coupling_stack_backward_kernel", "gradient tf32, few rows", 221),
        ("sm_80", "_coupling_stack_backward_kernel", "gradient exact narrow", 131),
        ("sm_80", "_coupling_stack_backward_kernel", "gradient fast, few rows", 134),
        ("sm_90", "_coupling_stack_backward_kernel", "gradient exact narrow", 179),
        ("sm_80", "_linearizer_stack_kernel", "D=64 H=128 high 16 rows diagonal", 43),
    ],
}


def allowed(triton: str) -> dict[Key, int]:
    """The maximum that a row of this version's table may spill."""
    groups = (_SMALL, _FULL, _FEW_WORDS, _SCALARS, _ONCE_A_STEP, _TWO_PARTS, _WIDE_LAYERS, _HALF_OF_REGISTERS)
    rows = [row for group in groups for row in group.get(triton, [])] + _BANK
    return {(kernel, call, target): most for target, kernel, call, most in rows}
