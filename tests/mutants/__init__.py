"""Mutants: changes that break the code, to show that tests fail on them. Run ``python -m tests.mutants``."""

from __future__ import annotations

from . import (
    accelerate,
    autoregressive,
    flows,
    images,
    linear_ops,
    mixes,
    operators,
    packing,
    pointwise,
    reversible,
    sampling,
    splines,
    stacks,
    training,
)
from .mutant import Mutant

__all__ = ["MUTANTS"]

MUTANTS: tuple[Mutant, ...] = (
    *pointwise.MUTANTS,
    *mixes.MUTANTS,
    *stacks.MUTANTS,
    *packing.MUTANTS,
    *linear_ops.MUTANTS,
    *images.MUTANTS,
    *flows.MUTANTS,
    *reversible.MUTANTS,
    *operators.MUTANTS,
    *sampling.MUTANTS,
    *training.MUTANTS,
    *accelerate.MUTANTS,
    *autoregressive.MUTANTS,
    *splines.MUTANTS,
)
