"""Mutants of packing, of the plain coupling stack, and of the one-launch Linearizer."""

from __future__ import annotations

from .mutant import Mutant

__all__ = ["MUTANTS"]

_FORWARD = "tests/ops/test_coupling_stack_kernel.py"
_BACKWARD = "tests/ops/test_coupling_stack_backward.py"
_LINEARIZER = "tests/ops/test_linearizer_stack_kernel.py"
_MAPS = f"{_FORWARD}::test_maps_between_layers_and_before_the_first"
_LAYOUTS = f"{_FORWARD}::test_which_half_moves_the_outputs_layout_and_bias"

MUTANTS = (
    Mutant(
        name="packing: halves are packed as they are",
        file="linfast/ops/stack_weights.py",
        old="return tensor.unflatten(0, (2, -1)).transpose(0, 1)",
        new="return tensor.unflatten(0, (-1, 2))",
        breaks="[shift | raw] rows are read as shift and raw in turn.",
        tests=(_LAYOUTS,),
    ),
    Mutant(
        name="packing: an inverse map's bias is not multiplied by the inverse",
        file="linfast/ops/stack_weights.py",
        old="return V, None if self.bias is None else -(V @ self.bias)",
        new="return V, None if self.bias is None else -self.bias",
        breaks="W^-1 y - c stands for W^-1 (y - c).",
        tests=(_MAPS,),
    ),
    Mutant(
        name="packing: a diagonal map is packed as its inverse is",
        file="linfast/ops/stack_weights.py",
        old="V = self.weight.reciprocal() if self.inverse is None else self.inverse",
        new="V = self.weight if self.inverse is None else self.inverse",
        breaks="An inverse stack multiplies by a diagonal where it should divide.",
        tests=(_MAPS,),
    ),
    Mutant(
        name="packing: a dense map is transposed",
        file="linfast/ops/stack_weights.py",
        old="weight = _pad_halves(weight, 1, layout)",
        new="weight = _pad_halves(weight.mT, 1, layout)",
        breaks="The kernel multiplies by a map's transpose.",
        tests=(_MAPS,),
    ),
    Mutant(
        name="packing: each part is what the one before it leaves of the whole weight",
        file="linfast/ops/stack_weights.py",
        old="rest = rest - parts[-1].to(rest.dtype)",
        new="rest = tensor - parts[-1].to(rest.dtype)",
        breaks="The third of three parts is the weight itself again, less the second.",
        tests=(f"{_FORWARD}::test_parts_of_weights_add_up_to_them", f"{_FORWARD}::test_every_mode"),
    ),
    Mutant(
        name="packing: a map's log_det forgets absolute values' logarithm",
        file="linfast/ops/stack_weights.py",
        old="return self.weight.abs().log().sum()",
        new="return self.weight.abs().sum().log()",
        breaks="A diagonal's log-determinant is the logarithm of the sum.",
        tests=(_MAPS,),
    ),
    Mutant(
        name="coupling_stack reference: gradients pass through the first layer's activation everywhere",
        file="linfast/ops/stack_reference.py",
        old="d = d * derivative(options.activation, run.hidden[i - 1])",
        new="d = d * derivative(options.activation, run.hidden[0])",
        breaks="The plain backward multiplies each layer's gradient by the first one's slope.",
        tests=(f"{_BACKWARD}::test_every_direction_depth_and_kind_of_map",),
    ),
    Mutant(
        name="coupling_stack reference: an inverse walks its steps forward",
        file="linfast/ops/stack_reference.py",
        old="return steps[::-1] if self.inverse else steps",
        new="return steps",
        breaks="The plain raw op undoes the first layer first.",
        tests=(f"{_BACKWARD}::test_every_direction_depth_and_kind_of_map",),
    ),
    Mutant(
        name="coupling_stack by layers: the half that moves conditions itself",
        file="linfast/ops/coupling_stack.py",
        old="kept = x.split(split_sizes(x.shape[1]), dim=1)[1 - moved]",
        new="kept = x.split(split_sizes(x.shape[1]), dim=1)[moved]",
        breaks="On a CPU the conditioner sees the half that it moves, and no inverse exists.",
        tests=(f"{_FORWARD}::test_gradients_of_every_scale_map",),
    ),
    Mutant(
        name="linearizer_stack kernel: g_y moves the halves that g_x moves",
        file="kernels/linearizer_stack.py",
        old="N_LINEAR, ACTIVATION, FORM, KIND, SCALE_FIRST, MOVES_SECOND_Y, True,",
        new="N_LINEAR, ACTIVATION, FORM, KIND, SCALE_FIRST, MOVES_SECOND_X, True,",
        breaks="Where the two networks start with different halves, g_y is another network.",
        tests=(f"{_LINEARIZER}::test_every_mode_and_kind_of_operator",),
    ),
    Mutant(
        name="linearizer_stack kernel: g_y's bound is g_x's",
        file="kernels/linearizer_stack.py",
        old="n_first, n_second, bound_y, floor_y,",
        new="n_first, n_second, bound_x, floor_x,",
        breaks="Both networks' log-scales are bounded by the first one's bound.",
        tests=(f"{_LINEARIZER}::test_every_mode_and_kind_of_operator",),
    ),
    Mutant(
        name="linearizer_stack kernel: what A gives is rounded to half precision",
        file="kernels/linearizer_stack.py",
        old="ROWS, HALF, DENSE, False, MAP_PARTS)\n",
        new="ROWS, HALF, DENSE, False, MAP_PARTS)\n"
        "    a, b = a.to(tl.float16).to(tl.float32), b.to(tl.float16).to(tl.float32)\n",
        breaks="The latent between the two networks has eleven bits.",
        tests=(f"{_LINEARIZER}::test_every_mode_and_kind_of_operator",),
    ),
    Mutant(
        name="linearizer_stack backward: dA is transposed",
        file="kernels/linearizer_chain.py",
        old="(padded_dw.mT @ padded_z).flatten()",
        new="(padded_z.mT @ padded_dw).flatten()",
        breaks="The operator is given its transpose's gradient.",
        tests=(f"{_LINEARIZER}::test_each_gradient_alone",),
    ),
    Mutant(
        name="linearizer_stack backward: g_x's gradient starts from g_y's",
        file="kernels/linearizer_chain.py",
        old="dz = layout.unpad(dz).to(x.dtype)",
        new="dz = dw.to(x.dtype)",
        breaks="A^T is left out of the chain rule.",
        tests=(f"{_LINEARIZER}::test_each_gradient_alone",),
    ),
    Mutant(
        name="linearizer_stack backward: g_x and g_y are given each other's gradients",
        file="kernels/linearizer_chain.py",
        old="return dx, dweights_x, *none_x, dcore, core_operands.new_empty(0), dweights_y, *none_y",
        new="return dx, dweights_y, *none_x, dcore, core_operands.new_empty(0), dweights_x, *none_y",
        breaks="Of two networks of one size each learns what the other should.",
        tests=(f"{_LINEARIZER}::test_gradients",),
    ),
)
