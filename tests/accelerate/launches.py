"""Counting linfast's ops."""

from __future__ import annotations

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode


class Launches(TorchDispatchMode):
    """The number of calls of each of linfast's ops inside the block."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "linfast":
            self.counts[function._schema.name.removeprefix("linfast::")] += 1
        return function(*args, **(kwargs or {}))
