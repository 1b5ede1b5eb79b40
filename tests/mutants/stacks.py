"""Mutants of the coupling stack: its kernel, its backward, and its products in parts."""

from __future__ import annotations

from .mutant import Mutant

__all__ = ["MUTANTS"]

_FORWARD = "tests/ops/test_coupling_stack_kernel.py"
_BACKWARD = "tests/ops/test_coupling_stack_backward.py"
_MAPS = f"{_FORWARD}::test_maps_between_layers_and_before_the_first"

MUTANTS = (
    Mutant(
        name="coupling_stack kernel: an inverse runs its layers first to last",
        file="kernels/coupling_stack.py",
        old="layer = n_layers - 1 - i",
        new="layer = i",
        breaks="The inverse starts with the first layer.",
        tests=(f"{_FORWARD}::test_every_activation",),
    ),
    Mutant(
        name="coupling_stack kernel: log_det is kept in half precision between layers",
        file="kernels/coupling_stack.py",
        old="log_det += tl.sum(tl.where(inside[None, :], log_s, 0.0), 1)",
        new="log_det = (log_det + tl.sum(tl.where(inside[None, :], log_s, 0.0), 1)).to(tl.float16).to(tl.float32)",
        breaks="The log-determinant is rounded to fp16 after every layer.",
        tests=(f"{_FORWARD}::test_every_depth",),
    ),
    Mutant(
        name="coupling_stack kernel: the state keeps twenty bits between layers",
        file="kernels/coupling_stack.py",
        old="moved = couple(moved, shift, log_s, SCALE_FIRST, INVERSE)",
        new="moved = couple(moved, shift, log_s, SCALE_FIRST, INVERSE)\n"
        "        moved = (moved.to(tl.int32, bitcast=True) & -8).to(tl.float32, bitcast=True)",
        breaks="Each coupling cuts the last three bits off what it moves.",
        tests=(f"{_FORWARD}::test_every_depth",),
    ),
    Mutant(
        name="coupling_stack kernel: exact mode takes the fast activations",
        file="kernels/mlp.py",
        old='if precision in ("exact", "high"):\n        return 0',
        new='if precision in ("exact", "high"):\n        return 1',
        breaks="gelu is off by 2.6e-5, tf32's error, where fp32 accuracy is promised.",
        tests=(f"{_FORWARD}::test_every_activation",),
    ),
    Mutant(
        name="mlp: a pair's second bias is its first",
        file="kernels/mlp.py",
        old="return _ended(total, b_ptr + HIDDEN + n, scale_ptr + HIDDEN + n, SCALED)",
        new="return _ended(total, b_ptr + n, scale_ptr + HIDDEN + n, SCALED)",
        breaks="The second layer of a pair is given the first one's bias.",
        tests=(f"{_FORWARD}::test_every_activation",),
    ),
    Mutant(
        name="mlp: high mode drops the products with the weights' second part",
        file="kernels/mlp.py",
        old='out = tl.dot(x0, w1, input_precision="tf32")',
        new="out = tl.zeros_like(total)",
        breaks="Only the first part of weights counts: one part's accuracy in a mode of two or three.",
        tests=("tests/ops/test_products.py::test_other_modes_err_by_their_unit",),
    ),
    Mutant(
        name="mlp: three parts lack the product of second parts",
        file="kernels/mlp.py",
        old='out = tl.dot(x1, w1, out, input_precision="tf32")',
        new="out = out",
        breaks="The smallest of the six products that fp32 accuracy needs is missing.",
        tests=(f"{_BACKWARD}::test_three_parts_keep_every_bit_of_fp32",),
    ),
    Mutant(
        name="mlp: scaled parts lack the product with the weights' low part",
        file="kernels/mlp.py",
        old="low = tl.dot(x1, w0, tl.dot(x0, w1)) * (1.0 / _LOW)",
        new="low = tl.dot(x1, w0) * (1.0 / _LOW)",
        breaks="Weights have 11 bits.",
        tests=(
            "tests/ops/test_products.py::test_two_scaled_parts_are_as_accurate_as_fp32",
            f"{_FORWARD}::test_exact_products_keep_22_bits",
        ),
    ),
    Mutant(
        name="mlp: the low part of a scaled operand is not enlarged",
        file="kernels/mlp.py",
        old="return x0, ((x - x0.to(tl.float32)) * _LOW).to(tl.float16)",
        new="return x0, (x - x0.to(tl.float32)).to(tl.float16)",
        breaks="The remainder counts 2^-11 times.",
        tests=("tests/ops/test_products.py::test_two_scaled_parts_are_as_accurate_as_fp32",),
    ),
    Mutant(
        name="mlp: an operand's scale is that of its first row",
        file="kernels/mlp.py",
        old="scale, unscale = scale_of(tl.max(tl.abs(x), 1))",
        new="scale, unscale = scale_of(tl.max(tl.abs(x), 1) * 0.0 + tl.max(tl.abs(x)))",
        breaks="Small rows beside large ones have no digits left.",
        tests=("tests/ops/test_products.py::test_two_scaled_parts_are_as_accurate_as_fp32",),
    ),
    Mutant(
        name="mlp: tf32 operands are not rounded",
        file="kernels/mlp.py",
        old="nearest = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000",
        new="nearest = x.to(tl.int32, bitcast=True)",
        breaks="Matrix units drop 13 bits: up to six times a rounding's error, and biased.",
        tests=(f"{_FORWARD}::test_every_mode", f"{_BACKWARD}::test_products_of_rows"),
    ),
    Mutant(
        name="packing reference: tf32 weights are not rounded",
        file="linfast/ops/stack_weights.py",
        old="nearest = (tensor.view(torch.int32) + 0x1000) & -0x2000",
        new="nearest = tensor.view(torch.int32)",
        breaks="Matrix units drop 13 bits of the weights.",
        tests=("tests/ops/test_stack_pack.py::test_the_packing_kernel_has_the_references_bits",),
    ),
    Mutant(
        name="mlp: silu's derivative has the wrong sign inside",
        file="kernels/mlp.py",
        old="result = s * (1.0 + x * (1.0 - s))",
        new="result = s * (1.0 - x * (1.0 - s))",
        breaks="The conditioner's gradient is wrong wherever x is not 0.",
        tests=(f"{_BACKWARD}::test_B1_and_B2_on_their_own",),
    ),
    Mutant(
        name="stack layout: exact mode has one part",
        file="kernels/stack_spec.py",
        old='STACK_PARTS = {**N_PARTS, "exact": 2}',
        new='STACK_PARTS = {**N_PARTS, "exact": 1}',
        breaks="exact mode computes what fast mode promises.",
        tests=(
            "tests/ops/test_stack_pack.py::test_parts_of_weights_add_up_to_them",
            f"{_FORWARD}::test_every_mode",
        ),
    ),
    Mutant(
        name="row products: two parts lack the product with x's second",
        file="kernels/mlp.py",
        old='out = tl.dot(x1, w0, out, input_precision="tf32")',
        new="out = out",
        breaks="A gradient's products in two parts have one part's accuracy.",
        tests=(f"{_BACKWARD}::test_products_of_rows",),
    ),
    Mutant(
        name="row products: three parts lack the product with x's third",
        file="kernels/mlp.py",
        old='out = tl.dot(x2, w0, out, input_precision="tf32")',
        new="out = out",
        breaks="A gradient's products in three parts lose the last bits of x.",
        tests=(f"{_BACKWARD}::test_three_parts_keep_every_bit_of_fp32",),
    ),
    Mutant(
        name="row products: sums over rows are kept in half precision between steps",
        file="kernels/row_products.py",
        old="total = dot(tl.trans(d), x, total, PARTS, TYPE)",
        new="total = dot(tl.trans(d), x, total.to(tl.float16).to(tl.float32), PARTS, TYPE)",
        breaks="A weight's gradient is rounded to fp16 after every 32 rows.",
        tests=(f"{_BACKWARD}::test_sums_over_rows",),
    ),
    Mutant(
        name="coupling_stack backward: the last split of the weights' gradient is dropped",
        file="kernels/coupling_stack_backward.py",
        old="dweights[row, at] += scratch.partials[:, at].sum(0)",
        new="dweights[row, at] += scratch.partials[: max(1, len(scratch.partials) - 1), at].sum(0)",
        breaks="Where rows are summed in several runs, the last one's sum is left out.",
        tests=(f"{_BACKWARD}::test_runs_of_rows_and_splits_add_up",),
    ),
    Mutant(
        name="coupling_stack backward: a later run of rows overwrites the earlier ones' gradient",
        file="kernels/coupling_stack_backward.py",
        old="dweights[row, at] += scratch.partials[:, at].sum(0)",
        new="dweights[row, at] = scratch.partials[:, at].sum(0)",
        breaks="The weights' gradient is only that of the last run of rows.",
        tests=(f"{_BACKWARD}::test_runs_of_rows_and_splits_add_up",),
    ),
    Mutant(
        name="coupling_stack backward: the kept half's own gradient is overwritten",
        file="kernels/coupling_stack_backward.py",
        old="launch_linear(d, matrices[i], g_kept, mode, combine=ADD)",
        new="launch_linear(d, matrices[i], g_kept, mode)",
        breaks="dk is only the gradient through the conditioner, without g's share.",
        tests=(f"{_BACKWARD}::test_B1_and_B2_on_their_own",),
    ),
    Mutant(
        name="stack pass: an exact gradient's products have one part",
        file="kernels/coupling_stack_backward.py",
        old='return Mode(N_PARTS[precision], torch.float32 if precision == "tf32" else self.part_dtype)',
        new='return Mode(1, torch.float32 if precision == "tf32" else self.part_dtype)',
        breaks="On a GPU exact mode's gradients have bf16's accuracy.",
        tests=(f"{_BACKWARD}::test_products_have_the_parts_that_the_mode_promises",),
    ),
    Mutant(
        name="coupling_stack: an inverse adds its maps' log_det",
        file="linfast/ops/stack_weights.py",
        old="return log_det - of_maps if inverse else log_det + of_maps",
        new="return log_det + of_maps",
        breaks="The inverse's log-determinant has the maps' share with the wrong sign.",
        tests=(_MAPS,),
    ),
)
