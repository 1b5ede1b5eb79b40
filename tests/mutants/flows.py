"""Mutants of flows: couplings, ActNorm, mixes, squeeze, the chain, folding, conditioners and freeze."""

from __future__ import annotations

from .mutant import Mutant

__all__ = ["MUTANTS"]

_LAWS = "tests/laws/test_bijections.py"
_INVERSE = f"{_LAWS}::test_inverse_undoes_forward_and_forward_undoes_inverse"
_LOG_DET = f"{_LAWS}::test_log_det_is_that_of_the_jacobian"
_ACTNORM = "tests/laws/test_actnorm.py"
_FOLDED = "tests/laws/test_fusion.py::test_a_folded_flow_is_the_flow"
_SPLINES = "tests/laws/test_splines.py"
_FREEZE = "tests/laws/test_freeze.py"

MUTANTS = (
    Mutant(
        name="couplings: the half that moves conditions itself",
        file="linfast/flows/couplings.py",
        old='return second if self.moves == "first" else first',
        new='return first if self.moves == "first" else second',
        breaks="The conditioner sees the half that it moves, and no inverse exists.",
        tests=(f"{_LAWS}::test_default_flows_round_trip_at_depth",),
    ),
    Mutant(
        name="ActNorm: log_det does not count positions",
        file="linfast/flows/bijection.py",
        old="total = of_position * x.shape[2:].numel()",
        new="total = of_position",
        breaks="An image's log-determinant is a single pixel's.",
        tests=(_LOG_DET,),
    ),
    Mutant(
        name="ActNorm: its flag is not saved",
        file="linfast/flows/actnorm.py",
        old="        self.initialized.fill_(True)\n",
        new="",
        breaks="A loaded model loses its scales at the next batch.",
        tests=(f"{_ACTNORM}::test_loading_copying_and_pickling_keep_the_flag",),
    ),
    Mutant(
        name="ActNorm: the variance is E[x^2] - E[x]^2 in single precision",
        file="linfast/flows/actnorm.py",
        old="squares = (wide - mean[:, None]).square().sum(1)",
        new="squares = wide.float().square().sum(1).sub(wide.shape[1] * mean.float().square()).double()",
        breaks="The first batch's spread is lost where its mean is large.",
        tests=(f"{_ACTNORM}::test_a_mean_ten_thousand_times_the_spread_is_taken_off_first",),
    ),
    Mutant(
        name="Mix: the inverse permutes on the wrong side",
        file="linfast/flows/mix.py",
        old="torch.linalg.solve_triangular(L, eye[permutation].mT, upper=False",
        new="torch.linalg.solve_triangular(L, eye[permutation], upper=False",
        breaks="W^-1 has P in place of its transpose.",
        tests=(_INVERSE,),
    ),
    Mutant(
        name="Squeeze: rows and columns of a patch are swapped in one direction",
        file="linfast/flows/squeeze.py",
        old="permute(0, 1, 3, 5, 2, 4)",
        new="permute(0, 1, 5, 3, 2, 4)",
        breaks="The channels of a squeezed patch are not in the order that the inverse expects.",
        tests=(_INVERSE,),
    ),
    Mutant(
        name="Flow: an inverse runs its layers first to last",
        file="linfast/flows/match.py",
        old="return Launch(layers, segments[::-1] if inverse else segments, why_reference(x))",
        new="return Launch(layers, segments, why_reference(x))",
        breaks="The inverse starts with the first layer.",
        tests=(_INVERSE,),
    ),
    Mutant(
        name="folding: an inverse row's log_det has the forward's sign",
        file="linfast/flows/segments.py",
        old="part = constant_log_det(x, of_row, inverse)",
        new="part = constant_log_det(x, of_row)",
        breaks="Folded layers' log-determinants are added where they should be subtracted.",
        tests=(_FOLDED,),
    ),
    Mutant(
        name="builders: the default bound does not shrink with depth",
        file="linfast/flows/builders.py",
        old="bound=min(2.0, 4.0 / depth)",
        new="bound=2.0",
        breaks="The log-scales of a deep default flow add up, and it no longer inverts.",
        tests=(f"{_LAWS}::test_default_bound_survives_last_layers_scaled_by_six",),
    ),
    Mutant(
        name="splines: zeros are not the identity",
        file="linfast/flows/splines.py",
        old="spline._replace(offset=unit_derivative(spline.min_derivative))",
        new="spline",
        breaks="A new spline flow is not the identity.",
        tests=(f"{_SPLINES}::test_a_new_layer_is_the_identity",),
    ),
    Mutant(
        name="splines: rebuilding in the backward mixes up the layouts' gradients",
        file="linfast/flows/splines.py",
        old="movedim(-1, 2 if self.layout",
        new="movedim(-1, 1 if self.layout",
        breaks="The conditioner's gradients are those of other parameters.",
        tests=(f"{_SPLINES}::test_rebuilt_activations_give_the_gradients_of_stored_ones",),
    ),
    Mutant(
        name="masked splines: the inverse's backward loses log_det",
        file="linfast/ops/masked_plain.py",
        old="a.t(), grad_log_det, spline",
        new="a.t(), None, spline",
        breaks="The gradient of the log-determinant of a sample is dropped.",
        tests=(f"{_SPLINES}::test_the_gradient_of_a_masked_inverse_is_that_of_an_unrolled_one",),
    ),
    Mutant(
        name="freeze: W is kept under its inverse's name",
        file="linfast/flows/mix.py",
        old="return derived(self, inverse, lambda: self._wide_weight(numbers, inverse).to(numbers[0].dtype))",
        new='return derived(self, "weight", lambda: self._wide_weight(numbers, inverse).to(numbers[0].dtype))',
        breaks="Inside a freeze the direction that comes second uses the first one's matrix.",
        tests=(
            f"{_FREEZE}::test_derived_weights_are_computed_once",
            f"{_FREEZE}::test_gradients_of_x_only_use_the_kept_weights",
        ),
    ),
    Mutant(
        name="freeze: gradients of derived weights are lost",
        file="linfast/freeze.py",
        old="return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters())",
        new="return False",
        breaks="Inside a freeze no gradient reaches the weights from which a kept matrix was computed.",
        tests=(f"{_FREEZE}::test_gradients_are_those_without_a_freeze",),
    ),
)
