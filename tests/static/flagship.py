"""The launches that docs/roofline.md is about; ``python -m tests.static.flagship`` prints them as JSON."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

from tests.static import calls
from tests.static.cases import Case
from tests.static.record import show

MODES = ("fast", "tf32", "high", "exact")
SIZES = {(64, 128): MODES, (128, 256): ("fast", "tf32")}  # modes in which D and H fit one launch
# Launchers choose a tile by the batch. A launch that another batch has made before is not listed again.
BATCHES = (64, 1024, 4096, 1 << 14, 1 << 16)


def cases() -> Iterator[Case]:
    """Couplings D/2 -> H -> H -> D with SiLU and no maps, and the Linearizer of two such stacks and a dense A."""
    functions = {"stack": calls.coupling_stack, "linearizer": calls.linearizer}
    for (D, H), modes in SIZES.items():
        for mode, (name, function), batch in itertools.product(modes, functions.items(), BATCHES):
            call = partial(function, features=D, hidden=H, n_linear=3, backward=False, precision=mode)
            yield Case(f"{name} {mode} D={D} B={batch}", call, batch=batch, targets=("sm_80", "sm_90"))


if __name__ == "__main__":
    show(cases())
