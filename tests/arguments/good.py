"""A valid call of every public callable, and the callables that need no separate checks."""

from __future__ import annotations

from tests.arguments.calls import Good
from tests.arguments.of_flows import FLOWS
from tests.arguments.of_operators import OPERATORS
from tests.arguments.of_ops import OPS
from tests.arguments.of_rest import REST
from tests.arguments.of_sampling import SAMPLING

__all__ = ["EXEMPT", "GOOD", "Good"]

GOOD: dict[str, Good] = {**OPS, **FLOWS, **OPERATORS, **SAMPLING, **REST}

DATA = "holds what it is given: the functions that take it check it"
PROTOCOL = "linfast calls it, with what it has checked; a subclass may supply its own"
_DATA = (
    "AffineMap CouplingLayer CouplingStack SVD Eig FlowMatchingLoss IdempotentLoss Report Row LinearizerSVD "
    "accelerate.MLP Step Step.of"
)
_PROTOCOL = (
    "FlowTransform.log_abs_det_jacobian "
    "ChannelLinear.after _LinearMix.after ActNorm.after Permute.after AffineCoupling.transform_then_mix "
    "AutoregressiveMasks.apply AutoregressiveMasks.masks AutoregressiveMasks.pack "
    "AutoregressiveMasks.pack_extras AutoregressiveMasks.sort_norms AutoregressiveMasks.spec "
    "ChannelLinear.log_abs_det ActNorm.log_abs_det Mix.log_abs_det CouplingStack.with_maps "
    "Objective.begin_step Objective.draw Objective.forward OneStepFlowMatching.draw DataObjective.forward "
    "IdempotentGeneration.begin_step IdempotentGeneration.draw StyleTransfer.draw "
    "StyleTransfer.forward compat.G.forward compat.G.inverse LinearModule.forward LinearModule.inverse"
)
EXEMPT: dict[str, str] = {**dict.fromkeys(_DATA.split(), DATA), **dict.fromkeys(_PROTOCOL.split(), PROTOCOL)}
