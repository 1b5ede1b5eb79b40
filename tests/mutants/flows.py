"""Mutants of flows: couplings, ActNorm, mixes, squeeze, the chain, folding, conditioners and freeze."""

from __future__ import annotations

from .mutant import Mutant

__all__ = ["MUTANTS"]

_LAWS = "tests/laws/test_bijections.py"
_INVERSE = f"{_LAWS}::test_inverse_undoes_forward_and_forward_undoes_inverse"
_LOG_DET = f"{_LAWS}::test_log_det_is_that_of_the_jacobian"
_ACTNORM = "tests/laws/test_actnorm.py"
_FOLDED = "tests/laws/test_fusion.py::test_a_folded_flow_is_the_flow"
_FREEZE = "tests/laws/test_freeze.py"

MUTANTS = (
    Mutant(
        name="AdditiveCoupling: an inverse adds",
        file="linfast/flows/couplings.py",
        old="out = (moved - params if inverse else moved + params).to(x.dtype)",
        new="out = (moved + params).to(x.dtype)",
        breaks="The inverse adds the shift a second time.",
        tests=(_INVERSE,),
    ),
    Mutant(
        name="couplings: the half that moves conditions itself",
        file="linfast/flows/couplings.py",
        old='return second if self.moves == "first" else first',
        new='return first if self.moves == "first" else second',
        breaks="The conditioner sees the half that it moves, and no inverse exists.",
        tests=(f"{_LAWS}::test_default_flows_round_trip_at_depth",),
    ),
    Mutant(
        name="AdditiveCoupling undo: an inverse's shift has the forward's gradient",
        file="linfast/flows/couplings.py",
        old="grad.clone(), -moved if inverse else moved",
        new="grad.clone(), moved",
        breaks="Training by inversion gets a wrong sign where an additive coupling ran inverted.",
        tests=("tests/laws/test_reversible.py::test_gradients_are_those_of_the_stored_graph",),
    ),
    Mutant(
        name="ActNorm: an inverse subtracts before it scales",
        file="linfast/flows/actnorm.py",
        old="y = x * (-log_scale).exp() - bias if inverse",
        new="y = (x - bias) * (-log_scale).exp() if inverse",
        breaks="The inverse is that of the other order.",
        tests=(_INVERSE,),
    ),
    Mutant(
        name="ActNorm: log_det does not count positions",
        file="linfast/flows/actnorm.py",
        old="total = self.log_abs_det() * position_count(x)",
        new="total = self.log_abs_det()",
        breaks="An image's log-determinant is a single pixel's.",
        tests=(_LOG_DET,),
    ),
    Mutant(
        name="ActNorm: that it was initialised is not saved",
        file="linfast/flows/actnorm.py",
        old="        self.initialized.fill_(True)\n",
        new="",
        breaks="A loaded model throws its scales away at the next batch.",
        tests=(f"{_ACTNORM}::test_loading_copying_and_pickling_keep_the_flag",),
    ),
    Mutant(
        name="ActNorm: the variance is E[x^2] - E[x]^2 in single precision",
        file="linfast/flows/actnorm.py",
        old="squares = (wide - mean[:, None]).square().sum(1)",
        new="squares = wide.float().square().sum(1).sub(wide.shape[1] * mean.float().square()).double()",
        breaks="The first batch's spread is lost where its mean is large.",
        tests=(
            f"{_ACTNORM}::test_first_batch_is_normalised",
            f"{_ACTNORM}::test_nearly_constant_channels_are_not_blown_up",
        ),
    ),
    Mutant(
        name="ActNorm: squares are of this process's rows alone",
        file="linfast/flows/actnorm.py",
        old="    _all_reduce(squares)\n",
        new="",
        breaks="Processes start from different, too small, standard deviations.",
        tests=(f"{_ACTNORM}::test_statistics_are_those_of_all_processes",),
    ),
    Mutant(
        name="ActNorm folded: the map's own bias is not scaled",
        file="linfast/flows/actnorm.py",
        old="bias = scale * (own if bias is None else bias + own)",
        new="bias = scale * own if bias is None else scale * bias + own",
        breaks="Behind another map with a bias the folded ActNorm adds its bias after scaling.",
        tests=(_FOLDED,),
    ),
    Mutant(
        name="Mix: the inverse's permutation is of the wrong side",
        file="linfast/flows/mix.py",
        old="torch.linalg.solve_triangular(L, eye[:, self.permutation], upper=False",
        new="torch.linalg.solve_triangular(L, eye[self.permutation], upper=False",
        breaks="W^-1 has P in place of its transpose.",
        tests=(_INVERSE,),
    ),
    Mutant(
        name="Mix: an inverse adds the forward's log_det",
        file="linfast/flows/mix.py",
        old="return y, constant_log_det(x, -total if inverse else total)",
        new="return y, constant_log_det(x, total)",
        breaks="The inverse's log-determinant has the wrong sign.",
        tests=(_LOG_DET,),
    ),
    Mutant(
        name="Mix: W and its inverse are formed under autocast",
        file="linfast/flows/mix.py",
        old="    @outside_autocast\n    def _weight",
        new="    def _weight",
        breaks="W is a product of operands rounded to bf16, and W^-1 is another's inverse.",
        tests=("tests/laws/test_autocast.py",),
    ),
    Mutant(
        name="Householder: a reflection goes half the way",
        file="linfast/flows/mix.py",
        old="Q = Q - (2.0 / v.square().sum())",
        new="Q = Q - (1.0 / v.square().sum())",
        breaks="Each factor is a projection and not a reflection.",
        tests=(_INVERSE,),
    ),
    Mutant(
        name="Permute folded: columns are permuted",
        file="linfast/flows/mix.py",
        old="return weight[order], None if bias is None else bias[order]",
        new="return weight[:, order], None if bias is None else bias[order]",
        breaks="A folded permutation acts before the map and not after it.",
        tests=(_FOLDED,),
    ),
    Mutant(
        name="Squeeze: rows and columns of a patch are swapped one way",
        file="linfast/flows/squeeze.py",
        old="permute(0, 1, 3, 5, 2, 4)",
        new="permute(0, 1, 5, 3, 2, 4)",
        breaks="The channels of a squeezed patch are in another order than the inverse takes them.",
        tests=(_INVERSE,),
    ),
    Mutant(
        name="Flow: an inverse runs its layers first to last",
        file="linfast/flows/fusion.py",
        old="layers: list[Any] = list(reversed(bijections) if inverse else bijections)",
        new="layers: list[Any] = list(bijections)",
        breaks="The inverse undoes the first layer first.",
        tests=(_INVERSE,),
    ),
    Mutant(
        name="Flow: log_det is the last layer's",
        file="linfast/flows/flow.py",
        old="total = total + part if total is not None and part is not None else None",
        new="total = part if total is not None and part is not None else None",
        breaks="The log-determinants of all layers but one are dropped.",
        tests=(_LOG_DET,),
    ),
    Mutant(
        name="folding: an inverse row's log_det has the forward's sign",
        file="linfast/flows/fusion.py",
        old="part = constant_log_det(x, -of_row if inverse else of_row)",
        new="part = constant_log_det(x, of_row)",
        breaks="Folded layers' log-determinants are added where they should be subtracted.",
        tests=(_FOLDED,),
    ),
    Mutant(
        name="MLP folded: a constant time is dropped where there is a bias",
        file="linfast/flows/conditioners.py",
        old="biases[0] = shift if biases[0] is None else biases[0] + shift",
        new="biases[0] = shift if biases[0] is None else biases[0]",
        breaks="In one launch a flow with a time computes what it computes at no time.",
        tests=("tests/models/test_one_launch.py::test_flow_runs_as_one_stack",),
    ),
    Mutant(
        name="SinusoidalEmbedding: its periods end one step short",
        file="linfast/flows/conditioners.py",
        old="(-math.log(self.max_period) / (half - 1))",
        new="(-math.log(self.max_period) / half)",
        breaks="The slowest frequency is not 1 / max_period: weights of the reference mean something else.",
        tests=(
            "tests/compat/test_from_reference.py::test_every_method_in_fp64",
            "tests/accelerate/test_reference.py",
        ),
    ),
    Mutant(
        name="builders: the default bound does not shrink with depth",
        file="linfast/flows/builders.py",
        old="return min(2.0, 4.0 / depth)",
        new="return 2.0",
        breaks="The log-scales of a deep default flow add up, and it no longer inverts.",
        tests=(f"{_LAWS}::test_default_bound_survives_last_layers_scaled_by_six",),
    ),
    Mutant(
        name="freeze: W is kept under its inverse's name",
        file="linfast/flows/mix.py",
        old="return derived(self, inverse, lambda: self._wide_weight(inverse).to(dtype))",
        new='return derived(self, "weight", lambda: self._wide_weight(inverse).to(dtype))',
        breaks="Inside a freeze the direction that comes second uses the first one's matrix.",
        tests=(
            f"{_FREEZE}::test_derived_weights_are_computed_once",
            f"{_FREEZE}::test_gradients_to_x_alone_use_what_is_kept",
        ),
    ),
    Mutant(
        name="freeze: what is kept outlives the block",
        file="linfast/freeze.py",
        old="        _active.remove(frozen)\n",
        new="        pass\n",
        breaks="After the block stale weights are used.",
        tests=(f"{_FREEZE}::test_blocks_nest_and_end_with_an_exception",),
    ),
    Mutant(
        name="freeze: gradients of derived weights are lost",
        file="linfast/freeze.py",
        old="return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters())",
        new="return False",
        breaks="Inside a freeze no gradient reaches what a kept matrix is made of.",
        tests=(f"{_FREEZE}::test_gradients_are_those_without_a_freeze",),
    ),
)
