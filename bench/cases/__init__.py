"""Every case, one file each; a new one is registered here and nowhere else."""

from ..harness import Case
from . import linearizer, low_rank, reversible

__all__ = ["CASES"]

CASES: dict[str, Case] = {case.name: case for case in (linearizer.CASE, low_rank.CASE, reversible.CASE)}
