"""The launches that docs/roofline.md is about; ``python -m tests.static.flagship`` prints them as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from tests.static import calls
from tests.static.cases import Case
from tests.static.record import show

MODES = ("fast", "tf32", "high", "exact")
# As many rows as fill a GPU, so that the launchers choose the tile for large batches.
_ROWS = 1 << 17


def cases() -> Iterator[Case]:
    """Couplings 32 -> 128 -> 128 -> 64 with SiLU and no maps, and the Linearizer of two such stacks and a dense A."""
    sizes = {"features": 64, "hidden": 128, "n_linear": 3, "backward": False}
    for mode in MODES:
        for name, function in {"stack": calls.coupling_stack, "linearizer": calls.linearizer}.items():
            call = partial(function, **sizes, precision=mode)
            yield Case(f"{name} {mode}", call, batch=_ROWS, targets=("sm_80", "sm_90"))


if __name__ == "__main__":
    show(cases())
