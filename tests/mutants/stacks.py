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
        old="moved = couple(moved, shift, log_s, SCALE_FIRST, INVERSE, FORM)",
        new="moved = couple(moved, shift, log_s, SCALE_FIRST, INVERSE, FORM)\n"
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
        name="stack tiles: small batches take the tile of large ones",
        file="kernels/stack_configs.py",
        old='if batch <= config.rows * MULTIPROCESSORS.get(target or "", 0):',
        new="if batch < 0:",
        breaks="A batch of 1,024 rows runs on 8 of 132 multiprocessors.",
        tests=("tests/ops/test_precision.py::test_small_batches_get_tiles_of_fewer_rows",),
    ),
    Mutant(
        name="math: fast mode's exponential is of half the argument",
        file="kernels/math.py",
        old="result = tl.exp2(x * LOG2E)",
        new="result = tl.exp2(x * (0.5 * LOG2E))",
        breaks="The scale is the square root of what it should be in tf32 and fast.",
        tests=(f"{_FORWARD}::test_every_scale_map_and_order",),
    ),
    Mutant(
        name="mlp: a pair's second bias is its first",
        file="kernels/mlp.py",
        old="load_vector(b_ptr + HIDDEN, N, STAGES == 1)",
        new="load_vector(b_ptr, N, STAGES == 1)",
        breaks="The second layer of a pair is given the first one's bias.",
        tests=(f"{_FORWARD}::test_every_activation",),
    ),
    Mutant(
        name="mlp: high mode drops the products with the weights' second part",
        file="kernels/mlp.py",
        old='out = tl.dot(x0, w1, input_precision="tf32")',
        new="out = tl.zeros_like(total)",
        breaks="Only the first part of weights counts: one part's accuracy in a mode of two or three.",
        tests=(f"{_FORWARD}::test_every_mode",),
    ),
    Mutant(
        name="mlp: exact mode drops the product of second parts",
        file="kernels/mlp.py",
        old='out = tl.dot(x1, w1, out, input_precision="tf32")',
        new="out = out",
        breaks="The smallest of exact mode's six products that fp32 accuracy needs is missing.",
        tests=(f"{_FORWARD}::test_exact_products_keep_every_bit_of_fp32",),
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
        name="stack layout: exact mode has two parts",
        file="kernels/stack_spec.py",
        old='"exact": 3,',
        new='"exact": 2,',
        breaks="exact mode computes what high mode promises.",
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
