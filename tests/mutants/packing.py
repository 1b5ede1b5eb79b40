"""Mutants of packing, of the plain coupling stack, and of the one-launch Linearizer."""

from __future__ import annotations

from .mutant import Mutant

__all__ = ["MUTANTS"]

_FORWARD = "tests/ops/test_coupling_stack_kernel.py"
_BACKWARD = "tests/ops/test_coupling_stack_backward.py"
_LINEARIZER = "tests/ops/test_linearizer_stack_kernel.py"
_MAPS = f"{_FORWARD}::test_maps_between_layers_and_before_the_first"

MUTANTS = (
    Mutant(
        name="packing: an inverse map's bias is not multiplied by the inverse",
        file="linfast/ops/stack_weights.py",
        old="return V, -V * bias if V.ndim == 1 else -(V @ bias)",
        new="return V, -V * bias if V.ndim == 1 else -bias",
        breaks="W^-1 y - c stands for W^-1 (y - c).",
        tests=(_MAPS,),
    ),
    Mutant(
        name="packing: each part is the whole weight less only the part before it",
        file="linfast/ops/stack_weights.py",
        old="rest = (rest - parts[-1].to(rest.dtype)) * low",
        new="rest = (tensor - parts[-1].to(rest.dtype)) * low",
        breaks="The third of three parts is the weight itself again, less the second.",
        tests=("tests/ops/test_masked_autoregressive_kernel.py::test_every_mode",),
    ),
    Mutant(
        name="packing kernel: the scale of a row is that of the row before it",
        file="kernels/pack_table.py",
        old="at, scale = at + n_in, scale + 1",
        new="at, scale = at + n_in, scale + (at > start)",
        breaks="A row of weights is multiplied by its neighbour's power of two.",
        tests=(
            "tests/ops/test_stack_pack.py::test_parts_of_weights_add_up_to_them",
            f"{_FORWARD}::test_every_activation",
        ),
    ),
    Mutant(
        name="packing table: the last layer's rows keep the order that they have in memory",
        file="kernels/pack_table.py",
        old="if is_last and not interleaved:",
        new="if is_last and interleaved:",
        breaks="Shift and raw output change places, row by row.",
        tests=(f"{_FORWARD}::test_every_activation",),
    ),
    Mutant(
        name="packing kernel: a layer without a map has a map of zeros",
        file="kernels/stack_pack.py",
        old="value = tl.where(source == _ONE, 1.0, value.to",
        new="value = tl.where(source == _ONE, 0.0, value.to",
        breaks="The identity between two layers forgets its input.",
        tests=(_MAPS, "tests/ops/test_stack_pack.py::test_the_packing_kernel_has_the_references_bits"),
    ),
    Mutant(
        name="packing: the gradient is gathered from where the weights were, not from where they went",
        file="kernels/pack_table.py",
        old="inverse[(source[source >= 0] % SHIFT).long()] = places",
        new="inverse[:] = (source[source >= 0] % SHIFT).sort().values",
        breaks="A padded weight gets its neighbour's gradient.",
        tests=(f"{_FORWARD}::test_gradients",),
    ),
    Mutant(
        name="coupling_stack reference: an inverse walks its steps forward",
        file="kernels/stack_spec.py",
        old="return steps[::-1] if self.inverse else steps",
        new="return steps",
        breaks="The plain raw op, and the kernels' gradient, invert the first layer first.",
        tests=(f"{_BACKWARD}::test_every_direction_depth_and_kind_of_map",),
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
        name="linearizer_stack kernel: the output of A is rounded to half precision",
        file="kernels/linearizer_stack.py",
        old="ROWS, HALF, DENSE, False, MAP_PARTS)\n",
        new="ROWS, HALF, DENSE, False, MAP_PARTS)\n"
        "    a, b = a.to(tl.float16).to(tl.float32), b.to(tl.float16).to(tl.float32)\n",
        breaks="The latent between the two networks has eleven bits.",
        tests=(f"{_LINEARIZER}::test_every_mode_and_kind_of_operator",),
    ),
    Mutant(
        name="linearizer_stack backward: dA is transposed",
        file="kernels/linearizer_stack.py",
        old="(padded_dw.mT @ padded_z).flatten()",
        new="(padded_z.mT @ padded_dw).flatten()",
        breaks="The operator gets its transpose's gradient.",
        tests=(f"{_LINEARIZER}::test_each_gradient_alone",),
    ),
    Mutant(
        name="linearizer_stack backward: g_x and g_y are given each other's gradients",
        file="kernels/linearizer_stack.py",
        old="dweights_x, *none_x, dcore, None, dweights_y, *none_y",
        new="dweights_y, *none_x, dcore, None, dweights_x, *none_y",
        breaks="Of two networks of one size each learns what the other should.",
        tests=(f"{_LINEARIZER}::test_gradients",),
    ),
)
