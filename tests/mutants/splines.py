"""Mutants of the kernels of the rational-quadratic spline."""

from __future__ import annotations

from .mutant import Mutant

__all__ = ["MUTANTS"]

_KERNEL = "tests/ops/test_rq_spline_kernel.py"
_FORMS = f"{_KERNEL}::test_every_form"

MUTANTS = (
    Mutant(
        name="rq_spline kernel: a bin ends with the derivative that it begins with",
        file="kernels/spline_bin.py",
        old="raw_1 = tl.where(passed, knots[j + 1], raw_1)",
        new="raw_1 = tl.where(passed, knots[j], raw_1)",
        breaks="The derivative at the second knot of every bin but the first is wrong.",
        tests=(_FORMS,),
    ),
    Mutant(
        name="rq_spline kernel: the inverse's denominator cancels",
        file="kernels/spline_bin.py",
        old="t = tl.where(b < 0.0, root - b, 2.0 * c) / tl.where(b < 0.0, 2.0 * a, b + root)",
        new="t = 2.0 * c / (b + root)",
        breaks="Where a bin ends steeply, the inverse has few correct digits.",
        tests=(f"{_KERNEL}::test_the_inverse_is_accurate_where_a_bin_ends_steeply",),
    ),
    Mutant(
        name="rq_spline kernel: the softmax is not shifted by its maximum",
        file="kernels/spline_bin.py",
        old="term = tl.exp2((raw[j] - most) * sharpness)",
        new="term = tl.exp2(raw[j] * sharpness)",
        breaks="Raw sizes of 1e4 overflow.",
        tests=(f"{_KERNEL}::test_nothing_is_nan_and_the_map_is_monotone",),
    ),
    Mutant(
        name="rq_spline backward: a bin's gradient lacks what it receives through the sum of all",
        file="kernels/spline_bin.py",
        old="above = -mean * factor",
        new="above = mean * 0.0",
        breaks="Raw sizes of later bins have no gradient.",
        tests=(_FORMS,),
    ),
    Mutant(
        name="rq_spline backward: of circular tails only the first end has a gradient",
        file="kernels/spline_bin.py",
        old="gradient += tl.where(k == BINS - 1, of_1, 0.0)",
        new="gradient += 0.0",
        breaks="The derivative that both ends share receives nothing from the last bin.",
        tests=(_FORMS,),
    ),
    Mutant(
        name="rq_spline backward: shared parameters lack the gradient of the last rows",
        file="kernels/rq_spline.py",
        old="dparams[0] = written.sum(0)",
        new="dparams[0] = written[: max(1, len(written) - 1)].sum(0)",
        breaks="The sum over blocks of rows stops one short.",
        tests=(_FORMS,),
    ),
    Mutant(
        name="rq_spline kernel: the columns of a matrix are in another order",
        file="kernels/spline_planes.py",
        old="parts = even + odd",
        new="parts = odd + even",
        breaks="With bins last each parameter is taken for another one.",
        tests=(_FORMS,),
    ),
    Mutant(
        name="rq_spline kernel: planes are read as if features were innermost",
        file="kernels/spline_planes.py",
        old="values = tl.reshape(tl.trans(tl.reshape(values, [OUTER, INNER])), [OUTER * INNER])",
        new="values = values + 0.0",
        breaks="Each value gets the parameters of another one.",
        tests=(_FORMS,),
    ),
)
