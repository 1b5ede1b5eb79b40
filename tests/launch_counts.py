"""A stand-in for a GPU that counts launches on a CPU, by torch and by linfast.

Every computing operation of torch is a launch, and torch.cat is one per 128 tensors; views and allocations are not.
Inside linfast's ops the same holds, and every kernel[grid] is a launch. The kernels themselves do not run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from linfast.ops import register

_COMPUTES_NOTHING = {
    *("empty", "new_empty", "empty_strided", "new_empty_strided", "empty_like", "detach", "lift_fresh"),
    *("_unsafe_view", "promote_types"),
}
_CAT_AT_ONCE = 128


class Launches(TorchDispatchMode):
    """Records the names of the launches in the block."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        launcher = register._launcher

        def counted(path: str) -> Callable[..., Any]:
            launch = launcher(path)

            def run(*arguments: Any) -> Any:
                with self:
                    return launch(*arguments)

            return run

        def grid(executor: Any, *arguments: Any, **named: Any) -> None:
            self.names.append(executor.fn.__name__)

        monkeypatch.setattr(register, "_launcher", counted)
        monkeypatch.setattr(GridExecutor, "__call__", grid)

    def of(self, call: Callable[[Tensor], Any], x: Tensor) -> list[str]:
        """The launches of a second call; the first builds the tables for these shapes."""
        for _ in range(2):
            self.names.clear()
            with self:
                call(x)
        return list(self.names)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace != "linfast" and not func.is_view and name not in _COMPUTES_NOTHING:
            count = -(-len(args[0]) // _CAT_AT_ONCE) if name == "cat" else 1
            self.names += [name] * count
        return func(*args, **(kwargs or {}))
