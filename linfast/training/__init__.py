"""The losses of the paper's three applications, and the objectives that draw their data.

``linfast.examples`` trains them: its ``Trainer`` takes any ``Objective``.
"""

from .flow_matching import FlowMatchingLoss, OneStepFlowMatching, one_step_loss
from .idempotent import IdempotentGeneration, IdempotentLoss, idempotent_loss
from .objective import Objective
from .style_transfer import GeneratedDepthwise, ModularStyle, StyleTransfer

__all__ = [
    "FlowMatchingLoss",
    "GeneratedDepthwise",
    "IdempotentGeneration",
    "IdempotentLoss",
    "ModularStyle",
    "Objective",
    "OneStepFlowMatching",
    "StyleTransfer",
    "idempotent_loss",
    "one_step_loss",
]
