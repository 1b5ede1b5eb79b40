"""``python -m tests.static.batches``: the number of variants of each kernel over batches and depths of all sizes.

Prints {call: {kernel: [maximum for one batch, number for all batches]}} for one kind of GPU; a separate process,
for the reason in tests/static/record.py.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable

from tests.static.calls import BATCHED, LAYERED
from tests.static.record import recorded

BATCHES = (1, 2, 31, 1000, 1024, 4096, 65_536)
DEPTHS = (1, 2, 3, 16)
_TARGET = "sm_90"


def variants(call: Callable[[int], None], counts: Iterable[int]) -> dict[str, tuple[int, int]]:
    """(maximum number of variants for one count, number for all counts) by kernel."""
    one: dict[str, int] = defaultdict(int)
    every: dict[str, set[str]] = defaultdict(set)
    for count in counts:
        of_count: dict[str, set[str]] = defaultdict(set)
        for launch in recorded(lambda n=count: call(n), _TARGET):  # type: ignore[misc]
            of_count[launch.kernel].add(launch.digest)
        for kernel, digests in of_count.items():
            one[kernel] = max(one[kernel], len(digests))
            every[kernel] |= digests
    return {kernel: (one[kernel], len(digests)) for kernel, digests in every.items()}


if __name__ == "__main__":
    found = {name: variants(call, BATCHES) for name, call in BATCHED.items()}
    found |= {f"{name} by depth": variants(call, DEPTHS) for name, call in LAYERED.items()}
    print(json.dumps(found))
