"""Losses of the paper's applications."""

from .flow_matching import FlowMatchingLoss, one_step_loss

__all__ = ["FlowMatchingLoss", "one_step_loss"]
