"""Mutants of the operators' algebra, of the Linearizer's, and of induced spaces."""

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
        old="U / -self.alpha",
        new="U / self.alpha",
        breaks="The inverse adds the correction in place of subtracting it.",
        tests=(f"{_SPECTRAL}::test_inverse_undoes",),
    ),
    Mutant(
        name="LowRank: a product forgets the right operator's alpha",
        file="linfast/operators/low_rank.py",
        old="U = torch.cat((other.alpha * self.U, P), -1)",
        new="U = torch.cat((self.U, P), -1)",
        breaks="(a I + U V^T)(b I + ...) has U V^T where b U V^T belongs.",
        tests=(f"{_LAWS}::test_closed_is_the_same_operator", f"{_STRUCTURE}::test_low_rank_stays_low_rank"),
    ),
    Mutant(
        name="LowRank: a power drops a term of the product",
        file="linfast/operators/low_rank.py",
        old="return a * b, a * N + b * M + M @ S @ N",
        new="return a * b, a * N + M @ S @ N",
        breaks="Squares and powers lack b M.",
        tests=(f"{_SPECTRAL}::test_power_is_repeated_application",),
    ),
    Mutant(
        name="LowRank: the pseudo-inverse drops nothing",
        file="linfast/operators/low_rank.py",
        old="limit = cutoff(S, max(self.n_out, self.n_in), rtol) * largest(S, alpha)",
        new="limit = 0.0 * cutoff(S, max(self.n_out, self.n_in), rtol) * largest(S, alpha)",
        breaks="Singular values that are rounding are inverted, and rtol is not heard.",
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
        name="Diagonal: the pseudo-inverse loses signs",
        file="linfast/operators/diagonal.py",
        old="self.diagonal.sign() * pseudo_inverse_values(size, limit)",
        new="pseudo_inverse_values(size, limit)",
        breaks="A negative entry has a positive reciprocal.",
        tests=(f"{_SPECTRAL}::test_pinv_meets_the_penrose_conditions",),
    ),
    Mutant(
        name="DepthwiseConv: an even kernel's transpose grows on the wrong side",
        file="linfast/operators/depthwise_conv.py",
        old="F.pad(flipped, (0, grow_w, 0, grow_h))",
        new="F.pad(flipped, (grow_w, 0, grow_h, 0))",
        breaks="The closed transpose of an even kernel is shifted by a pixel.",
        tests=(f"{_LAWS}::test_transposes_twice_and_composes_with_it",),
    ),
    Mutant(
        name="BlockDiagonal: singular vectors are not sorted with their values",
        file="linfast/operators/block_diagonal.py",
        old="torch.block_diag(*U)[:, order]",
        new="torch.block_diag(*U)",
        breaks="U's columns belong to other singular values.",
        tests=(f"{_SPECTRAL}::test_svd_rebuilds",),
    ),
    Mutant(
        name="TimeLowRank: a batch of times has its V in reverse",
        file="linfast/operators/time_low_rank.py",
        old="return LowRank(self.alpha, U, V) if times.ndim else",
        new="return LowRank(self.alpha, U, V.flip(0)) if times.ndim else",
        breaks="In a batch of times each U meets the V of the sample at the other end.",
        tests=("tests/laws/test_time_low_rank.py::test_a_number_a_tensor_and_a_batch_agree",),
    ),
    Mutant(
        name="lazy: a product's transpose keeps its order",
        file="linfast/operators/lazy.py",
        old="return Product(self.right.T, self.left.T)",
        new="return Product(self.left.T, self.right.T)",
        breaks="(A B)^T is A^T B^T.",
        tests=(f"{_LAWS}::test_transpose_is_the_adjoint",),
    ),
    Mutant(
        name="lazy: a product's inverse keeps its order",
        file="linfast/operators/lazy.py",
        old="return Product(self.right.inverse(), self.left.inverse())",
        new="return Product(self.left.inverse(), self.right.inverse())",
        breaks="(A B)^-1 is A^-1 B^-1.",
        tests=(
            f"{_SPECTRAL}::test_inverse_undoes",
            f"{_STRUCTURE}::test_a_product_without_closed_structure_has_an_inverse_that_is_a_product",
        ),
    ),
    Mutant(
        name="lazy: a closed multiple forgets its factor",
        file="linfast/operators/lazy.py",
        old="return self.operator.closed()._scaled(self.factor)",
        new="return self.operator.closed()",
        breaks="The inverse, svd and powers of c A are A's.",
        tests=(f"{_LAWS}::test_closed_is_the_same_operator",),
    ),
    Mutant(
        name="spectral: what is singular is inverted without a word",
        file="linfast/operators/spectral.py",
        old="if not bool((condition < 1.0 / torch.finfo(condition.dtype).eps).all()):",
        new="if False:",
        breaks="An inverse that has lost every digit is returned.",
        tests=(
            f"{_SPECTRAL}::test_inverse_of_a_singular_operator_names_pinv",
            f"{_SPECTRAL}::test_inverse_refuses_what_would_lose_every_digit",
        ),
    ),
    Mutant(
        name="spectral: the Frobenius norm counts equal singular values once",
        file="linfast/operators/base.py",
        old="return torch.hypot(torch.linalg.vector_norm(S, dim=-1), others**0.5 * rest)",
        new="return torch.hypot(torch.linalg.vector_norm(S, dim=-1), rest)",
        breaks="The norm of alpha I + U V^T lacks all but one of the alphas.",
        tests=(f"{_SPECTRAL}::test_norm_is_the_matrix_norm",),
    ),
    Mutant(
        name="spectral: the rank's cutoff lacks the size",
        file="linfast/operators/spectral.py",
        old="return n * torch.finfo(S.dtype).eps if rtol is None else rtol",
        new="return torch.finfo(S.dtype).eps if rtol is None else rtol",
        breaks="Rounding noise counts as rank.",
        tests=(
            f"{_SPECTRAL}::test_rank_is_the_matrix_rank",
            f"{_SPECTRAL}::test_pinv_meets_the_penrose_conditions",
            f"{_SPACE}::test_project_on_a_dependent_basis",
        ),
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
        name="Linearizer: a composition is in the wrong order",
        file="linfast/linearizer.py",
        old="return Linearizer(other.g_x, self.A @ other.A, self.g_y)",
        new="return Linearizer(other.g_x, other.A @ self.A, self.g_y)",
        breaks="(h @ f)(x) is f's operator after h's.",
        tests=(f"{_LINEARIZER}::test_composition_is_application_in_turn",),
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
        name="LinearizerSVD: a rebuilt f counts the rest twice",
        file="linfast/svd.py",
        old="return LowRank(rest, U, Vh.mT * S if only else Vh.mT * S - rest * U)",
        new="return LowRank(rest, U, Vh.mT * S)",
        breaks="alpha I is added on the span of U too.",
        tests=(f"{_LINEARIZER}::test_svd_is_a_singular_system_of_data",),
    ),
    Mutant(
        name="InducedSpace: interpolation starts at its end",
        file="linfast/space.py",
        old="return self._decode((1 - t) * start + t * end)",
        new="return self._decode(t * start + (1 - t) * end)",
        breaks="t = 0 gives v and t = 1 gives u.",
        tests=(f"{_SPACE}::test_combinations_interpolation_and_mean",),
    ),
    Mutant(
        name="InducedSpace: a projection keeps directions that are rounding",
        file="linfast/space.py",
        old="directions = Vh * keep[:, None]",
        new="directions = Vh",
        breaks="With a dependent basis the projection is on a larger space.",
        tests=(f"{_SPACE}::test_project_on_a_dependent_basis",),
    ),
)
