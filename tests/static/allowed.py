"""Spills that are left as they are, by version of Triton, with the reason. Everything else must not spill.

Numbers are bytes of the stack and instructions that reach it, together, as in the tables.
"""

from __future__ import annotations

SPILLS: dict[str, dict[tuple[str, str, str], int]] = {}
