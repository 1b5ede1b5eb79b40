"""Mutants of the algebra of operators and Linearizers, and of induced spaces."""

from __future__ import annotations

from .mutant import Mutant

__all__ = ["MUTANTS"]

_LAWS = "tests/laws/test_operators.py"
_SPECTRAL = "tests/laws/test_operators_spectral.py"
_STRUCTURE = "tests/laws/test_operators_structure.py"
_LINEARIZER = "tests/laws/test_linearizer.py"
_CONTRACT = "tests/laws/test_linearizer_contract.py"
_SPACE = "tests/laws/test_space.py"

MUTANTS = (
    Mutant(
        name="Dense: the transpose is the matrix",
        file="linfast/operators/dense.py",
        old="self.weight.mT if transpose else self.weight",
        new="self.weight",
        breaks="A.T(z) is A(z).",
        tests=(f"{_LAWS}::test_transpose_is_the_adjoint",),
    ),
    Mutant(
        name="LowRank: Woodbury's correction has the wrong sign",
        file="linfast/operators/low_rank.py",
        old="self.U @ core / -self.alpha",
        new="self.U @ core / self.alpha",
        breaks="The inverse adds the correction in place of subtracting it.",
        tests=(f"{_SPECTRAL}::test_inverse_undoes",),
    ),
    Mutant(
        name="LowRank: the pseudo-inverse drops nothing",
        file="linfast/operators/low_rank.py",
        old="limit = rtol * largest(S, alpha)",
        new="limit = 0.0 * rtol * largest(S, alpha)",
        breaks="Singular values that are only rounding are inverted, and rtol is ignored.",
        tests=(
            f"{_SPECTRAL}::test_pinv_drops_what_rtol_says",
            f"{_SPECTRAL}::test_pinv_meets_the_penrose_conditions",
        ),
    ),
    Mutant(
        name="Projection: its mask has no gradient",
        file="linfast/operators/diagonal.py",
        old="return soft.detach().round() + (soft - soft.detach())",
        new="return soft.detach().round() + 0 * (soft - soft.detach())",
        breaks="The straight-through gradient is 0, and a rank is never learned.",
        tests=(f"{_LAWS}::test_projection_has_the_gradient_of_the_sigmoid",),
    ),
    Mutant(
        name="DepthwiseConv: an even kernel's transpose grows on the wrong side",
        file="linfast/operators/depthwise.py",
        old="F.pad(flipped, (0, grow_w, 0, grow_h))",
        new="F.pad(flipped, (grow_w, 0, grow_h, 0))",
        breaks="The closed transpose of an even kernel is shifted by a pixel.",
        tests=(f"{_LAWS}::test_transposes_twice_and_composes_with_it",),
    ),
    Mutant(
        name="lazy: a product's inverse keeps its order",
        file="linfast/operators/base.py",
        old="return Product(self.right._inverted(read), self.left._inverted(read))",
        new="return Product(self.left._inverted(read), self.right._inverted(read))",
        breaks="(A B)^-1 is A^-1 B^-1.",
        tests=(
            f"{_SPECTRAL}::test_inverse_undoes",
            f"{_STRUCTURE}::test_a_product_without_closed_structure_has_an_inverse_that_is_a_product",
        ),
    ),
    Mutant(
        name="lazy: a closed multiple forgets its factor",
        file="linfast/operators/base.py",
        old="return self.operator.closed()._scaled(self.factor)",
        new="return self.operator.closed()",
        breaks="The inverse, svd and powers of c A are A's.",
        tests=(f"{_LAWS}::test_closed_is_the_same_operator",),
    ),
    Mutant(
        name="spectral: singular operators are inverted without an error",
        file="linfast/operators/spectral.py",
        old="if read and not bool(regular.all()):",
        new="if False:",
        breaks="An inverse without any accurate digit is returned.",
        tests=(
            f"{_SPECTRAL}::test_inverse_of_a_singular_operator_names_pinv",
            f"{_SPECTRAL}::test_inverse_refuses_what_would_lose_every_digit",
        ),
    ),
    Mutant(
        name="regular: weights that changed are not read again",
        file="linfast/operators/spectral.py",
        old="return state is None or at not in seen or state != _state(operator)",
        new="return state is None or at not in seen",
        breaks="An operator that became singular gives NaN instead of an error.",
        tests=("tests/test_host_reads.py::test_an_operator_that_became_singular_raises_again",),
    ),
    Mutant(
        name="register: a raw op runs in autocast",
        file="linfast/ops/register.py",
        old="_complete(without_autocast(device, function, *arguments),",
        new="_complete(function(*arguments),",
        breaks="A backward inside an autocast block multiplies in bf16.",
        tests=("tests/ops/test_every_op.py::test_no_part_of_an_op_is_in_autocast",),
    ),
    Mutant(
        name="Linearizer: the adjoint does not exchange its networks",
        file="linfast/linearizer.py",
        old="return Linearizer(self.g_y, self.A.T, self.g_x)",
        new="return Linearizer(self.g_x, self.A.T, self.g_y)",
        breaks="f.T encodes y with g_x.",
        tests=(f"{_LINEARIZER}::test_transpose_is_the_adjoint_in_the_induced_spaces",),
    ),
    Mutant(
        name="Linearizer: maps between different spaces compose",
        file="linfast/linearizer.py",
        old="if not same_space(self.g_x, other.g_y):",
        new="if False:",
        breaks="h @ f of unrelated networks is a Linearizer, and wrong.",
        tests=(f"{_CONTRACT}::test_equal_weights_are_not_one_space",),
    ),
    Mutant(
        name="InducedSpace: interpolation starts at its end",
        file="linfast/space.py",
        old="return self._decode((1 - t) * start + t * end)",
        new="return self._decode(t * start + (1 - t) * end)",
        breaks="t = 0 gives v and t = 1 gives u.",
        tests=(f"{_SPACE}::test_combinations_interpolation_and_mean",),
    ),
)
