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
        old="tl.load(b_ptr + HIDDEN + n)[None, :]",
        new="tl.load(b_ptr + n)[None, :]",
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
        tests=(f"{_FORWARD}::test_every_mode", f"{_BACKWARD}::test_products_of_tiles"),
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
        tests=(f"{_BACKWARD}::test_every_activation",),
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
        tests=(f"{_BACKWARD}::test_products_of_tiles",),
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
        old="total = dot(x, w, total, PARTS, TYPE)",
        new="total = dot(x, w, total.to(tl.float16).to(tl.float32), PARTS, TYPE)",
        breaks="A product's sums are rounded to fp16 after every step of its depth.",
        tests=(f"{_BACKWARD}::test_sums_over_rows",),
    ),
    Mutant(
        name="coupling_stack backward: the last program's share of the weights' gradient is dropped",
        file="kernels/coupling_stack_backward.py",
        old="dweights = partials.sum(0)",
        new="dweights = partials[: max(1, programs - 1)].sum(0)",
        breaks="Where several programs sum over rows, the last one's sum is left out.",
        tests=(f"{_BACKWARD}::test_tiles_runs_and_programs_add_up",),
    ),
    Mutant(
        name="coupling_stack backward: a later run of rows overwrites the earlier ones' gradient",
        file="kernels/coupling_stack_backward.py",
        old="again = (turn > 0) | (tile > 0)",
        new="again = tile > 0",
        breaks="A program's share of the weights' gradient is only that of its last run of rows.",
        tests=(f"{_BACKWARD}::test_tiles_runs_and_programs_add_up",),
    ),
    Mutant(
        name="coupling_stack backward: a bias' gradient is that of the last tile of rows",
        file="kernels/row_products.py",
        old="tl.store(at, tl.load(at, mask=again, other=0.0) + value)",
        new="tl.store(at, value)",
        breaks="Sums over earlier tiles of rows are overwritten.",
        tests=(f"{_BACKWARD}::test_tiles_runs_and_programs_add_up",),
    ),
    Mutant(
        name="coupling_stack backward: the kept half's own gradient is overwritten",
        file="kernels/stack_backward_tiles.py",
        old="tl.store(here, d + tl.load(there, mask=mask, other=0.0), mask=mask)",
        new="tl.store(here, d, mask=mask)",
        breaks="dk is only the gradient through the conditioner, without g's share.",
        tests=(f"{_BACKWARD}::test_every_direction_depth_and_kind_of_map",),
    ),
    Mutant(
        name="coupling_stack backward: rows past the batch are zeros",
        file="kernels/stack_backward_tiles.py",
        old="x = tl.load(x_at, mask=known, other=0.0).to(tl.float32)",
        new="x = tl.load(x_at, mask=inside & known, other=0.0).to(tl.float32)",
        breaks="A network may overflow at zero, and its gradients are then not numbers.",
        tests=(f"{_BACKWARD}::test_rows_past_the_batch_do_not_overflow",),
    ),
    Mutant(
        name="coupling_stack backward: a head's row of the weights' gradient is not cleared",
        file="kernels/coupling_stack_backward.py",
        old="dweights[0, : spec.map_offset] = 0.0",
        new="dweights[0, : spec.map_offset] = 1.0",
        breaks="The gradient has numbers where a head has no weights.",
        tests=(f"{_BACKWARD}::test_the_gradient_of_a_head_has_no_conditioner",),
    ),
    Mutant(
        name="stack pass: an exact gradient's products have one part",
        file="kernels/stack_backward_grid.py",
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
