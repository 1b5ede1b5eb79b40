"""The paper's three applications: their losses, their objectives and one training loop."""

from .flow_matching import FlowMatchingLoss, OneStepFlowMatching, one_step_loss
from .idempotent import IdempotentGeneration, IdempotentLoss, idempotent_loss
from .objective import Objective
from .style_transfer import GeneratedDepthwise, ModularStyle, StyleTransfer
from .trainer import NonFiniteLoss, Trainer, TrainSettings

__all__ = [
    "FlowMatchingLoss",
    "GeneratedDepthwise",
    "IdempotentGeneration",
    "IdempotentLoss",
    "ModularStyle",
    "NonFiniteLoss",
    "Objective",
    "OneStepFlowMatching",
    "StyleTransfer",
    "TrainSettings",
    "Trainer",
    "idempotent_loss",
    "one_step_loss",
]
