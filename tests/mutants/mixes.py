"""Mutants of the channel mix, and of a coupling and a mix in one launch."""

from __future__ import annotations

from .mutant import Mutant

__all__ = ["MUTANTS"]

_MIX = "tests/ops/test_channel_mix_kernel.py"
_BOTH = "tests/ops/test_coupling_mix_kernel.py"

MUTANTS = (
    Mutant(
        name="channel_mix kernel: fp32 operands are truncated to tf32",
        file="kernels/channel_mix.py",
        old="result = value.to(tl.float32)",
        new="result = (value.to(tl.float32).to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)",
        breaks="Products have ten bits after the point where exact fp32 is promised.",
        tests=(f"{_MIX}::test_every_shape",),
    ),
    Mutant(
        name="channel_mix kernel: sums are kept in half precision between chunks",
        file="kernels/channel_mix.py",
        old="return tl.dot(_operand(w, HALF), _operand(x, HALF), total, input_precision",
        new="total = total.to(tl.float16).to(tl.float32)\n"
        "    return tl.dot(_operand(w, HALF), _operand(x, HALF), total, input_precision",
        breaks="With more than one chunk of channels the sum is rounded to fp16 before each next one.",
        tests=(f"{_MIX}::test_every_width_and_layout",),
    ),
    Mutant(
        name="channel_mix kernel: sums keep nineteen bits between chunks",
        file="kernels/channel_mix.py",
        old="    return tl.dot(_operand(w, HALF), _operand(x, HALF), total, input_precision",
        new="    total = (total.to(tl.int32, bitcast=True) & -16).to(tl.float32, bitcast=True)\n"
        "    return tl.dot(_operand(w, HALF), _operand(x, HALF), total, input_precision",
        breaks="With more than one chunk of channels a sum's last four bits are cut off before each next one.",
        tests=(f"{_MIX}::test_every_width_and_layout",),
    ),
    Mutant(
        name="channel_mix kernel: the last split of dW is dropped",
        file="kernels/channel_mix.py",
        old="dweight = partial.sum(0).to(weight.dtype)",
        new="dweight = partial[: max(1, len(partial) - 1)].sum(0).to(weight.dtype)",
        breaks="The weight's gradient lacks the last run of columns.",
        tests=(f"{_MIX}::test_more_columns_than_one_split",),
    ),
    Mutant(
        name="channel_mix kernel: dx is W's product and not its transpose's",
        file="kernels/channel_mix.py",
        old="_mix(positions(grad), weight.t(), None, positions(dx))",
        new="_mix(positions(grad), weight, None, positions(dx))",
        breaks="The input's gradient is W g in place of W^T g.",
        tests=(f"{_MIX}::test_every_shape",),
    ),
    Mutant(
        name="define_op: a derived backward is twice the gradient",
        file="linfast/ops/register.py",
        old="results[i] = gradient",
        new="results[i] = gradient * 2",
        breaks="The plain backward gives twice the gradients.",
        tests=(f"{_MIX}::test_every_shape",),
    ),
    Mutant(
        name="coupling_mix kernel: log_det is kept in half precision",
        file="kernels/coupling_mix.py",
        old="total = tl.sum(tl.reshape(log_s, (COLUMNS // GROUP, GROUP)), 1)",
        new="total = tl.sum(tl.reshape(log_s, (COLUMNS // GROUP, GROUP)), 1).to(tl.float16).to(tl.float32)",
        breaks="Each group's log-determinant is rounded to fp16.",
        tests=(f"{_BOTH}::test_every_shape_and_layout",),
    ),
    Mutant(
        name="coupling_mix kernel: the coupled half is rounded to half before the product",
        file="kernels/coupling_mix.py",
        old="u = u.to(moved_ptr.dtype.element_ty)",
        new="u = u.to(tl.float16).to(moved_ptr.dtype.element_ty)",
        breaks="The coupling's output reaches the mix with eleven bits.",
        tests=(f"{_BOTH}::test_every_width",),
    ),
    Mutant(
        name="coupling_mix backward: dW reads the buffer that dx was written to",
        file="kernels/coupling_mix_backward.py",
        old="u = with_channels(x, x.shape[1]) if needs_weight else dx",
        new="u = dx",
        breaks="dx overwrites the coupled x that dW needs.",
        tests=(f"{_BOTH}::test_every_shape_and_layout",),
    ),
    Mutant(
        name="coupling_mix backward: every sample gets the first one's log_det gradient",
        file="kernels/coupling_mix_backward.py",
        old="h = tl.load(h_ptr + (n // n_positions) * stride_hb,",
        new="h = tl.load(h_ptr + 0 * n,",
        breaks="The log-determinant's gradient is that of another sample.",
        tests=(f"{_BOTH}::test_every_shape_and_layout",),
    ),
)
