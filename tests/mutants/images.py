"""Mutants of group norm with SiLU, its statistics from tiles, and the fused convolution."""

from __future__ import annotations

from .mutant import Mutant

__all__ = ["MUTANTS"]

_NORM = "tests/ops/test_group_norm_silu_kernel.py"
_CONV = "tests/ops/test_conv2d_fused_kernel.py"
_FORMULAS = "tests/ops/test_ops.py"

MUTANTS = (
    Mutant(
        name="group_norm_silu kernel: eps is left out",
        file="kernels/group_norm_silu.py",
        old="rstd = tl.div_rn(1.0, tl.sqrt_rn(squares / n + eps))",
        new="rstd = tl.div_rn(1.0, tl.sqrt_rn(squares / n))",
        breaks="A constant group is divided by 0, and any other is off by eps / 2 of its variance.",
        tests=(f"{_NORM}::test_what_is_not_given_is_one_or_zero", f"{_NORM}::test_nan_and_constant_groups"),
    ),
    Mutant(
        name="group_norm_silu kernel: the variance is E[x^2] - E[x]^2",
        file="kernels/group_norm_silu.py",
        old="squares = tl.sum(centred * centred)",
        new="squares = tl.sum(x * x) - n * mean * mean",
        breaks="The variance cancels where the mean is large relative to the spread.",
        tests=(f"{_NORM}::test_a_mean_a_thousand_times_the_spread_costs_only_the_inputs_own_digits",),
    ),
    Mutant(
        name="group_norm_silu kernel: a large group's variance is E[x^2] - E[x]^2",
        file="kernels/group_norm_silu.py",
        old="                total += centred * centred\n        squares = tl.sum(total)\n",
        new="                total += x * x\n        squares = tl.sum(total) - n * mean * mean\n",
        breaks="The variance of a group of more than one tile cancels where the mean is large.",
        tests=(
            f"{_NORM}::test_a_mean_a_thousand_times_the_spread_costs_only_the_inputs_own_digits",
            f"{_NORM}::test_every_shape_and_grouping",
        ),
    ),
    Mutant(
        name="group_norm_silu kernel: padding is added into the variance",
        file="kernels/group_norm_silu.py",
        old="centred = tl.where(inside, x - mean, 0.0)\n        squares",
        new="centred = x - mean\n        squares",
        breaks="The tile's elements past the group add the mean's square.",
        tests=(f"{_NORM}::test_every_shape_and_grouping",),
    ),
    Mutant(
        name="group_norm_silu kernel: a large group's sum is kept in half precision between tiles",
        file="kernels/group_norm_silu.py",
        old="total += tl.load(x_ptr + c * stride_xc + p * stride_xp, mask=inside, other=0.0).to(tl.float32)",
        new="total += tl.load(x_ptr + c * stride_xc + p * stride_xp, mask=inside, other=0.0).to(tl.float32)\n"
        "                total = total.to(tl.float16).to(tl.float32)",
        breaks="The sum of a group of more than one tile is rounded to fp16 at each.",
        tests=(f"{_NORM}::test_a_mean_a_thousand_times_the_spread_costs_only_the_inputs_own_digits",),
    ),
    Mutant(
        name="group_norm_silu backward: dx lacks the variance's share",
        file="kernels/group_norm_silu.py",
        old="dx = rstd * (d * a - all_d / n - h * (all_dh / n))",
        new="dx = rstd * (d * a - all_d / n)",
        breaks="The standard deviation counts as a constant in dx.",
        tests=(f"{_NORM}::test_what_is_not_given_is_one_or_zero",),
    ),
    Mutant(
        name="group_norm_silu backward: scale and shift are given each other's gradients",
        file="kernels/group_norm_silu.py",
        old="return dweight, dbias, dscale, dshift",
        new="return dweight, dbias, dshift, dscale",
        breaks="The two halves of the time embedding get each other's gradients.",
        tests=(f"{_NORM}::test_what_is_not_given_is_one_or_zero",),
    ),
    Mutant(
        name="group statistics: a tile's share of the variance lacks its count",
        file="kernels/group_statistics.py",
        old="+ count[None, :] * off * off",
        new="+ off * off",
        breaks="The spread between tiles counts once and not once per value.",
        tests=(f"{_CONV}::test_statistics_are_handed_over",),
    ),
    Mutant(
        name="conv2d_fused kernel: the padding's zeros are x's and not the activation's",
        file="kernels/conv2d_fused.py",
        old="a = tl.where(inside, a, 0.0)",
        new="a = tl.where(inside, a, a)",
        breaks="The image is padded with the norm and SiLU of 0.",
        tests=(f"{_CONV}::test_what_is_not_given",),
    ),
    Mutant(
        name="conv2d_fused kernel: the transpose reads the taps forward",
        file="kernels/conv2d_fused.py",
        old="first_tap, strides = weight[:, :, -1:, -1:], (wc, wo, -wu, -wv)",
        new="first_tap, strides = weight, (wc, wo, wu, wv)",
        breaks="dx is computed with the unflipped kernel.",
        tests=(f"{_CONV}::test_what_is_not_given",),
    ),
    Mutant(
        name="conv2d_fused kernel: activations lose their last eight bits",
        file="kernels/conv2d_fused.py",
        old="a = tl.where(inside, a, 0.0)",
        new="a = tl.where(inside, a, 0.0)\n"
        "        a = (a.to(tl.int32, bitcast=True) & -256).to(tl.float32, bitcast=True)",
        breaks="The output of the norm and SiLU has the accuracy of two bf16 parts.",
        tests=(f"{_CONV}::test_what_is_not_given",),
    ),
    Mutant(
        name="conv2d_fused: exact mode has two parts",
        file="kernels/conv2d_fused.py",
        old="return Mode.of(dtype, spec.precision, spec.part_dtype)",
        new='return Mode.of(dtype, {"exact": "high"}.get(spec.precision, spec.precision), spec.part_dtype)',
        breaks="exact mode computes what high mode promises.",
        tests=(f"{_CONV}::test_exact_products_keep_every_bit_of_fp32",),
    ),
    Mutant(
        name="conv2d_fused backward: the last split of dW is dropped",
        file="kernels/conv2d_fused_backward.py",
        old="dweight.copy_(partial.sum(0).permute(2, 3, 0, 1))",
        new="dweight.copy_(partial[: max(1, len(partial) - 1)].sum(0).permute(2, 3, 0, 1))",
        breaks="Where positions are summed in several runs, the last one's sum is left out.",
        tests=(f"{_CONV}::test_more_positions_than_one_split",),
    ),
    Mutant(
        name="conv2d_fused reference: alpha is left out",
        file="linfast/ops/conv2d_fused.py",
        old="torch.add(y, residual, alpha=alpha)",
        new="torch.add(y, residual)",
        breaks="On a CPU the residual has weight 1 whatever alpha is.",
        tests=(f"{_FORMULAS}::test_conv2d_fused_is_its_formula",),
    ),
)
