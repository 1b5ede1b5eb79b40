"""Mutants of what is done to each element: the affine coupling, scale maps, activations, and their arithmetic."""

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
        name="affine_coupling kernel: log-scales keep nineteen bits",
        file="kernels/affine_coupling.py",
        old="    log_s = log_scale(raw, bound, floor, KIND)\n    return couple(",
        new="    log_s = log_scale(raw, bound, floor, KIND)\n"
        "    log_s = (log_s.to(tl.int32, bitcast=True) & -16).to(tl.float32, bitcast=True)\n"
        "    return couple(",
        breaks="The log-determinant's error is four times what fp32 allows.",
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
        file="kernels/affine_coupling.py",
        old="return params[:, 0::2], params[:, 1::2]",
        new="return params[:, 1::2], params[:, 0::2]",
        breaks="What the conditioner gives as a shift scales, and the other way round.",
        tests=(_LAYOUTS,),
    ),
    Mutant(
        name="affine_coupling kernel: an odd width splits after its smaller half",
        file="kernels/affine_coupling.py",
        old="first = (x.shape[1] + 1) // 2",
        new="first = x.shape[1] // 2",
        breaks="Of an odd number of channels one too few is moved or kept.",
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
        old="return tl.exp2(r * LOG2E) * tl.exp2(n)",
        new="return (1.0 + r * (1.0 + r / 2 * (1.0 + r / 3 * (1.0 + r / 4 * (1.0 + r / 5 * (1.0 + r / 6))))))"
        " * tl.exp2(n)",
        breaks="The scale is wrong by up to 1e-5, some hundred roundings.",
        tests=(_MAPS,),
    ),
    Mutant(
        name="math: log2(e) has five digits",
        file="kernels/math.py",
        old="LOG2E = tl.constexpr(1.4426950408889634)",
        new="LOG2E = tl.constexpr(1.4427)",
        breaks="Every scale is wrong by 2e-6 of its logarithm, some tens of roundings.",
        tests=(_MAPS,),
    ),
    Mutant(
        name="math: the arctangent's polynomial is a degree short",
        file="kernels/math.py",
        old="p = ((8.05374449538e-2 * z - 1.38776856032e-1) * z + 1.99777106478e-1) * z - 3.33329491539e-1",
        new="p = (-1.38776856032e-1 * z + 1.99777106478e-1) * z - 3.33329491539e-1",
        breaks="The arctan map is wrong by up to 3e-5, some hundred roundings.",
        tests=(_MAPS,),
    ),
    Mutant(
        name="math: the hyperbolic tangent's polynomial is a degree short",
        file="kernels/math.py",
        old="p = (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z",
        new="p = ((2.06390887954e-2 * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z",
        breaks="The tanh map is wrong by up to 3e-5 where |raw| is below 0.625.",
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
        name="math: smooth's derivative lacks a square",
        file="kernels/math.py",
        old="result = 1.0 / (root * root)",
        new="result = 1.0 / root",
        breaks="The raw value's gradient is too large by 1 + |raw| / c.",
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
        name="math: log_det's gradient has the wrong sign in an inverse",
        file="kernels/math.py",
        old="d_log_s = -grad * out - grad_log_det",
        new="d_log_s = -grad * out + grad_log_det",
        breaks="Maximising a likelihood through a scale-first inverse would minimise it.",
        tests=(_MAPS,),
    ),
    Mutant(
        name="affine_coupling reference: the inverse's log_det has the wrong sign",
        file="linfast/ops/affine_coupling.py",
        old="return y, -total if inverse else total",
        new="return y, total",
        breaks="On a CPU the inverse returns the forward's log-determinant.",
        tests=(f"{_FORMULAS}::test_affine_coupling_is_its_formula",),
    ),
    Mutant(
        name="affine_coupling reference: scale-first is undone in shift-first's order",
        file="linfast/ops/affine_coupling.py",
        old="return (value - shift) * (-log_s).exp()",
        new="return value * (-log_s).exp() - shift",
        breaks="On a CPU the inverse of m e^s + t scales before it takes the shift off.",
        tests=(f"{_FORMULAS}::test_affine_coupling_is_its_formula",),
    ),
    Mutant(
        name="affine_coupling reference: a moved second half comes back in front",
        file="linfast/ops/affine_coupling.py",
        old='y = torch.cat((out, second) if moves == "first" else (first, out), dim=1)\n    if not log_det',
        new='y = torch.cat((out, second) if moves == "first" else (out, first), dim=1)\n    if not log_det',
        breaks="With moves='second' the two halves of the result are swapped.",
        tests=(f"{_FORMULAS}::test_affine_coupling_is_its_formula",),
    ),
    Mutant(
        name="affine_coupling reference: half precision is computed in half",
        file="linfast/ops/affine_coupling.py",
        old="    compute = torch.promote_types(moved.dtype, torch.float32)\n",
        new="    compute = moved.dtype\n",
        breaks="On a CPU scale and log-determinant of an fp16 or bf16 x are not fp32.",
        tests=(f"{_KERNEL}::test_half_precision_keeps_scale_and_log_det_in_fp32",),
    ),
    Mutant(
        name="affine_coupling undo: the gradient of an interleaved conditioner is put in halves",
        file="linfast/ops/affine_coupling.py",
        old='torch.cat((dshift, draw), 1) if layout == "halves" else torch.stack((dshift, draw), 2).flatten(1, 2)',
        new="torch.cat((dshift, draw), 1)",
        breaks="Shift's and scale's gradients reach the wrong rows of the conditioner's last layer.",
        tests=("tests/laws/test_reversible.py::test_gradients_are_those_of_the_stored_graph",),
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
        name="scale maps: softplus lacks its floor",
        file="linfast/scale_maps.py",
        old="torch.log((F.softplus(r) + floor).clamp(max=c))",
        new="torch.log(F.softplus(r).clamp(max=c))",
        breaks="The smallest scale is 0 and not the floor: an inverse divides by it.",
        tests=(f"{_FORMULAS}::test_scale_maps_are_the_published_ones",),
    ),
    Mutant(
        name="activations: gelu is the approximation in tanh",
        file="linfast/ops/activations.py",
        old='"gelu": F.gelu,',
        new='"gelu": lambda x: F.gelu(x, approximate="tanh"),',
        breaks="The plain form is off by up to 5e-4 from the exact one that is promised.",
        tests=(f"{_STACK}::test_every_activation_direction_and_conditioner_depth",),
    ),
    Mutant(
        name="activations: gelu's derivative has another density",
        file="linfast/ops/activations.py",
        old="torch.exp(-0.5 * x.square())",
        new="torch.exp(-x.square())",
        breaks="The derivative's second term lacks the factor 1/2 in its exponent.",
        tests=("tests/ops/test_coupling_stack_backward.py::test_B1_and_B2_on_their_own",),
    ),
)
