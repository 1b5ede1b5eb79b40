"""Every public callable in states that can break it: a result, or an error with the reason.

Models without values (the meta device), models whose weights are NaN, and autocast around inputs of other dtypes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from linfast.examples import NonFiniteLoss
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tests.arguments.good import GOOD
from tests.arguments.wrong import outcome


def modules_of(value: Any) -> Iterator[nn.Module]:
    """The modules in an argument or in the object of a bound method."""
    if isinstance(value, nn.Module):
        yield value
    elif hasattr(value, "__self__"):
        yield from modules_of(value.__self__)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        for part in vars(value).values():
            yield from modules_of(part)


def on_meta(call: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    for module in (m for value in (call, *arguments.values()) for m in modules_of(value)):
        module.to("meta")
    return tree_map(lambda v: v.to("meta") if isinstance(v, Tensor) else v, arguments)


def of_nan(call: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    with torch.no_grad():
        for module in (m for value in (call, *arguments.values()) for m in modules_of(value)):
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.fill_(torch.nan) if tensor.is_floating_point() else None
    return arguments


def _cast(dtype: torch.dtype) -> Callable[..., dict[str, Any]]:
    def cast(_: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
        return tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, arguments)

    return cast


# (how the arguments are changed, autocast's dtype)
STATES: dict[str, tuple[Callable[..., dict[str, Any]], torch.dtype | None]] = {
    "on the meta device": (on_meta, None),
    "of NaN": (of_nan, None),
    "float64 in bf16": (_cast(torch.float64), torch.bfloat16),
    "fp16 in bf16": (_cast(torch.float16), torch.bfloat16),
    "bf16 in fp16": (_cast(torch.bfloat16), torch.float16),
}


@pytest.mark.parametrize("name", GOOD)
def test_states(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    findings = []
    for state, (changed, dtype) in STATES.items():
        torch.default_generator.manual_seed(0)
        call, arguments = GOOD[name].make()
        # Some modules are shared by several valid calls.
        arguments = {n: copy.deepcopy(v) if isinstance(v, nn.Module) else v for n, v in arguments.items()}
        arguments = changed(call, arguments)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            _, error = outcome(call, arguments)
        if error is not None and not isinstance(error, (ValueError, TypeError, NonFiniteLoss)):
            findings.append(f"{name} {state}: raised {error!r:.200}")
    assert not findings, "\n".join(findings)
