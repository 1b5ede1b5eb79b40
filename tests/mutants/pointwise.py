"""Mutants of elementwise code: the affine coupling, scale maps, activations, and their arithmetic."""

from __future__ import annotations

from .mutant import Mutant

__all__ = ["MUTANTS"]

_KERNEL = "tests/ops/test_affine_coupling_kernel.py"
_MAPS = f"{_KERNEL}::test_every_map_order_and_direction"
_LAYOUTS = f"{_KERNEL}::test_every_shape_and_layout"
_FORMULAS = "tests/ops/test_ops.py"
_STACK = "tests/ops/test_coupling_stack_kernel.py"

MUTANTS = (
    Mutant(
        name="affine_coupling kernel: the inverse's log_det has the wrong sign",
        file="kernels/affine_coupling.py",
        old="tl.store(partial_ptr + at, -total if INVERSE else total, mask=row < n_rows)",
        new="tl.store(partial_ptr + at, total, mask=row < n_rows)",
        breaks="The inverse returns the forward's log-determinant.",
        tests=(_MAPS,),
    ),
    Mutant(
        name="affine_coupling kernel: log_det is summed in half precision",
        file="kernels/affine_coupling.py",
        old="total = tl.sum(tl.where(moves, log_s, 0.0), 1)",
        new="total = tl.sum(tl.where(moves, log_s, 0.0).to(tl.float16), 1).to(tl.float32)",
        breaks="The log-determinant keeps fp16's eleven bits where fp32 is promised.",
        tests=(_MAPS,),
    ),
    Mutant(
        name="affine_coupling kernel: padding is added into log_det",
        file="kernels/affine_coupling.py",
        old="total = tl.sum(tl.where(moves, log_s, 0.0), 1)",
        new="total = tl.sum(log_s, 1)",
        breaks="The tile's columns past the moved half add the log-scale that a raw value of 0 has.",
        tests=(_MAPS,),
    ),
    Mutant(
        name="affine_coupling kernel: interleaved shift and scale are swapped",
        file="kernels/launch.py",
        old="return params[:, 0::2], params[:, 1::2]",
        new="return params[:, 1::2], params[:, 0::2]",
        breaks="The conditioner's shift is used as the scale and its scale as the shift.",
        tests=(_LAYOUTS,),
    ),
    Mutant(
        name="affine_coupling kernel: x's inner stride is taken for 1",
        file="kernels/affine_coupling.py",
        old="x_at = b * stride_xb + o * stride_xo + i * stride_xi\n    y_at",
        new="x_at = b * stride_xb + o * stride_xo + i\n    y_at",
        breaks="A strided x is read as if it were contiguous.",
        tests=(f"{_KERNEL}::test_strides_of_inputs_and_of_the_incoming_gradient",),
    ),
    Mutant(
        name="affine_coupling kernel: the gradient overwrites the saved output",
        file="kernels/affine_coupling.py",
        old="dx, dparams = like(y), like(params)",
        new="dx, dparams = y, like(params)",
        breaks="The backward writes dx into the y that the caller holds and a second backward would read.",
        tests=(_MAPS,),
    ),
    Mutant(
        name="math: exp is a polynomial of degree six",
        file="kernels/math.py",
        old="result = tl.exp2(r * LOG2E) * tl.exp2(n)",
        new="result = (1.0 + r * (1.0 + r / 2 * (1.0 + r / 3 * (1.0 + r / 4 * (1.0 + r / 5 * (1.0 + r / 6))))))"
        " * tl.exp2(n)",
        breaks="The scale is wrong by up to 1e-5, some hundred roundings.",
        tests=(_MAPS,),
    ),
    Mutant(
        name="math: clamp does not clamp above",
        file="kernels/math.py",
        old="result = tl.where(raw > bound, bound, tl.where(raw < -bound, -bound, raw))",
        new="result = tl.where(raw < -bound, -bound, raw)",
        breaks="A raw value above the bound scales by more than the bound allows.",
        tests=(_MAPS,),
    ),
    Mutant(
        name="math: the inverse's log-scale gradient lacks the shift",
        file="kernels/math.py",
        old="d_log_s = -grad * (out + shift) - grad_log_det",
        new="d_log_s = -grad * out - grad_log_det",
        breaks="A term of the shift-first inverse's gradient is dropped.",
        tests=(_MAPS,),
    ),
    Mutant(
        name="affine_coupling reference: a moved second half comes back in front",
        file="linfast/ops/affine_coupling.py",
        old="y = cat((first, out) if spec.moves_second else (out, second), dim=1)\n    if not spec.log_det",
        new="y = cat((out, first) if spec.moves_second else (out, second), dim=1)\n    if not spec.log_det",
        breaks="With moves='second' the two halves of the result are swapped.",
        tests=(f"{_FORMULAS}::test_affine_coupling_is_its_formula",),
    ),
    Mutant(
        name="affine_coupling reference: half precision is computed in half",
        file="linfast/ops/affine_coupling.py",
        old="        compute = torch.promote_types(moved.dtype, torch.float32)\n",
        new="        compute = moved.dtype\n",
        breaks="On a CPU scale and log-determinant of an fp16 or bf16 x are not fp32.",
        tests=(f"{_KERNEL}::test_half_precision_keeps_scale_and_log_det_in_fp32",),
    ),
    Mutant(
        name="scale maps: tanh's derivative lacks the bound",
        file="linfast/scale_maps.py",
        old="lambda r, c, floor: c * (1 - torch.tanh(r).square()),",
        new="lambda r, c, floor: 1 - torch.tanh(r).square(),",
        breaks="The derivative is that of a bound of 1.",
        tests=(f"{_FORMULAS}::test_scale_maps_agree_with_their_derivative_inverse_and_bound",),
    ),
    Mutant(
        name="scale maps: 2 / pi has four digits",
        file="linfast/scale_maps.py",
        old="_TWO_OVER_PI = 2.0 / math.pi",
        new="_TWO_OVER_PI = 0.6366",
        breaks="The arctan map's plain form differs from the kernel's by 3e-5.",
        tests=(_MAPS,),
    ),
    Mutant(
        name="activations: gelu is the approximation in tanh",
        file="linfast/ops/activations.py",
        old='"gelu": F.gelu,',
        new='"gelu": lambda x: F.gelu(x, approximate="tanh"),',
        breaks="The plain form is off by up to 5e-4 from the exact one that is promised.",
        tests=(f"{_STACK}::test_every_activation",),
    ),
)
