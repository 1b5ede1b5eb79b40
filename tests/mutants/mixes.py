"""Mutants of the channel mix, and of a coupling and a mix in one."""

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
        name="channel_mix kernel: fp32 operands lose their last eight bits",
        file="kernels/channel_mix.py",
        old="result = value.to(tl.float32)",
        new="result = (value.to(tl.float32).to(tl.int32, bitcast=True) & -256).to(tl.float32, bitcast=True)",
        breaks="Products have the accuracy of two bf16 parts where exact fp32 is promised.",
        tests=(f"{_MIX}::test_every_shape", f"{_MIX}::test_every_width_and_layout"),
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
        name="channel_mix kernel: the bias's stride is taken for 1",
        file="kernels/channel_mix.py",
        old="y += tl.load(bias_ptr + o * stride_bo).to(tl.float32)",
        new="y += tl.load(bias_ptr + o).to(tl.float32)",
        breaks="A strided or expanded bias is read as if it were contiguous.",
        tests=(
            f"{_MIX}::test_strides_of_inputs_and_of_the_incoming_gradient",
            f"{_MIX}::test_weights_with_a_step_and_a_bias_of_stride_zero",
        ),
    ),
    Mutant(
        name="channel_mix kernel: one merged view is taken for all",
        file="kernels/channel_mix.py",
        old="batch == 1 or count == 1 or all(view",
        new="batch == 1 or count == 1 or any(view",
        breaks="Batch and positions of a view that cannot be merged are walked with one stride.",
        tests=(f"{_MIX}::test_strides_of_inputs_and_of_the_incoming_gradient",),
    ),
    Mutant(
        name="channel_mix reference: dW is transposed",
        file="linfast/ops/channel_mix.py",
        old='dweight = torch.einsum("bop,bcp->oc", g, values)',
        new='dweight = torch.einsum("bop,bcp->co", g, values).reshape(weight.shape)',
        breaks="The plain backward gives the gradient of W's transpose.",
        tests=(f"{_MIX}::test_every_shape",),
    ),
    Mutant(
        name="coupling_mix kernel: an odd width's middle channel is taken for the second half's",
        file="kernels/coupling_mix.py",
        old="if (c >= (N_IN + 1) // 2) == MOVES_SECOND:",
        new="if (c >= N_IN // 2) == MOVES_SECOND:",
        breaks="The channel in the middle of an odd number moves with the wrong half.",
        tests=(f"{_BOTH}::test_every_shape_and_layout",),
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
        name="coupling_mix kernel: channels of padding are added into log_det",
        file="kernels/coupling_mix.py",
        old="sum_log_s += tl.sum(tl.where(moves, log_s, 0.0), 0)",
        new="sum_log_s += tl.sum(log_s, 0)",
        breaks="The chunk's channels past the moved half add the log-scale that a raw value of 0 has.",
        tests=(f"{_BOTH}::test_every_map_order_and_direction",),
    ),
    Mutant(
        name="coupling_mix kernel: the coupled half is rounded to half before the product",
        file="kernels/coupling_mix.py",
        old="u = u.to(moved_ptr.dtype.element_ty)",
        new="u = u.to(tl.float16).to(moved_ptr.dtype.element_ty)",
        breaks="What the coupling gives reaches the mix with eleven bits.",
        tests=(f"{_BOTH}::test_every_width",),
    ),
    Mutant(
        name="coupling_mix kernel: coupled values keep nineteen bits",
        file="kernels/coupling_mix.py",
        old="u = u.to(moved_ptr.dtype.element_ty)",
        new="u = (u.to(tl.int32, bitcast=True) & -16).to(tl.float32, bitcast=True).to(moved_ptr.dtype.element_ty)",
        breaks="What the coupling gives loses its last four bits before the mix.",
        tests=(f"{_BOTH}::test_every_width",),
    ),
    Mutant(
        name="coupling_mix backward: the kept half's gradient comes from the moved half's columns of W",
        file="kernels/coupling_mix_backward.py",
        old="du_kept = dot_chunk(du_kept, weight_kept_ptr, c, o, n_kept",
        new="du_kept = dot_chunk(du_kept, weight_moved_ptr, c, o, n_kept",
        breaks="One half of W is used for both halves of dx.",
        tests=(f"{_BOTH}::test_every_width",),
    ),
    Mutant(
        name="coupling_mix backward: dW reads the buffer that dx was written to",
        file="kernels/coupling_mix_backward.py",
        old="u = mixed_like(x, x.shape[1]) if needs_weight else dx",
        new="u = dx",
        breaks="The coupled x that dW needs is never kept apart from dx.",
        tests=(f"{_BOTH}::test_every_shape_and_layout",),
    ),
    Mutant(
        name="coupling_mix backward: every sample gets the first one's log_det gradient",
        file="kernels/coupling_mix_backward.py",
        old="h = tl.load(h_ptr + (n // n_positions) * stride_hb,",
        new="h = tl.load(h_ptr + 0 * n,",
        breaks="The log-determinant's gradient is not the sample's own.",
        tests=(f"{_BOTH}::test_every_shape_and_layout",),
    ),
    Mutant(
        name="coupling_mix reference: dW is of the input and not of what was coupled",
        file="linfast/ops/coupling_mix.py",
        old="channel_mix_backward_reference(u, weight, grad, [True, *needs[2:]])",
        new="channel_mix_backward_reference(x, weight, grad, [True, *needs[2:]])",
        breaks="The plain backward takes the coupling for the identity in the weight's gradient.",
        tests=(f"{_BOTH}::test_every_shape_and_layout",),
    ),
)
