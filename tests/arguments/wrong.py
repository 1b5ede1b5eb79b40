"""Replacements for a valid argument, and the required outcome: an error that names it, or a right result.

An argument's annotation says which types it takes, the table's dimensions which shapes: a dimension whose name
occurs nowhere else in the call may have any size. Everything else is wrong.
"""

from __future__ import annotations

import collections.abc
import math
import re
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

MUST_RAISE, MUST_WORK, MAY = "must raise", "must work", "may"


@dataclass(frozen=True)
class Wrong:
    """A replacement for a valid value: its description, and what the callable must do with it."""

    label: str
    value: Any
    verdict: str
    dtype: torch.dtype | None = None  # of the results, where it differs from the valid call's


def admitted(annotation: Any, kind: type) -> bool:
    """Whether a parameter with this annotation takes values of this type."""
    if annotation in (Any, object):
        return True
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return any(admitted(part, kind) for part in typing.get_args(annotation))
    if annotation is None or annotation is type(None):
        return kind is type(None)
    origin = typing.get_origin(annotation) or annotation
    if origin is float:
        return kind in (float, int, np.float32, np.int64)
    if origin is int:
        return kind in (int, np.int64)
    if origin in (collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection):
        return issubclass(kind, (list, tuple))
    if origin in (tuple, collections.abc.Mapping):
        return issubclass(kind, (tuple, list) if origin is tuple else collections.abc.Mapping)
    if origin is collections.abc.Callable or origin is type:
        return False
    return isinstance(origin, type) and issubclass(kind, origin)


FLOAT8 = torch.float8_e4m3fn
SIMPLE: dict[str, Any] = {
    "None": None, "0": 0, "-1": -1, "1.5": 1.5, "NaN": math.nan, "infinity": math.inf, "True": True,
    "10**30": 10**30,
    "a numpy integer": np.int64(2), "a numpy float": np.float32(0.5), "a string": "nonsense", "a list": [1.0, 2.0],
    "an empty list": [], "a numpy array": np.ones((2, 2), np.float32), "an object": object(), "a dict": {"a": 1},
    "a class": int, "a complex number": 1j, "a list of strings": ["a", "b"], "a list of None": [None, None],
    "a tensor [2]": torch.ones(2), "a bool tensor": torch.tensor(True), "an integer tensor": torch.tensor(2),
    "a complex tensor": torch.ones(2, dtype=torch.complex64), "a meta tensor": torch.ones(2, device="meta"),
    "a sparse tensor": torch.eye(2).to_sparse(), "a nested tensor": torch.nested.nested_tensor([torch.ones(2)] * 2),
    "a float8 tensor": torch.tensor(2.0).to(FLOAT8),
}  # fmt: skip


def wrong_values(name: str, good: Any, annotation: Any, dims: dict[str, str], allowed: set[str]) -> Iterator[Wrong]:
    """All replacements for this argument; ``allowed``: labels that the docstring allows."""
    for label, value in SIMPLE.items():
        if not (label == "True" and isinstance(good, bool)):
            fits = label in allowed or _may_fit(name, label, value, good, annotation, dims)
            yield Wrong(label, value, MAY if fits else MUST_RAISE)
    if isinstance(good, Tensor):
        yield from _of_tensor(name, good, dims, allowed)
    if isinstance(good, int) and not isinstance(good, bool):
        label = "it as a numpy integer"
        yield Wrong(label, np.int64(good), MAY if label in allowed else MUST_WORK)
        yield Wrong("it as a float", float(good), MAY if admitted(annotation, float) else MUST_RAISE)
    if isinstance(good, (tuple, list)) and good and not isinstance(good[0], (Tensor, str)):
        yield Wrong("it as a list", list(good), MUST_WORK)
        yield Wrong("it as a numpy array", np.arange(float(len(good))), MAY)
        for label in ("None", "0", "-1", "1.5", "NaN", "True", "a string", "an object"):
            yield Wrong(f"it with {label}", [SIMPLE[label], *good[1:]], MAY if label in ("0", "-1") else MUST_RAISE)


def _may_fit(name: str, label: str, value: Any, good: Any, annotation: Any, dims: dict[str, str]) -> bool:
    """Whether one of ``SIMPLE`` is valid here, by its type and, for a tensor, its shape."""
    if annotation in (Any, object):
        return True
    if isinstance(value, bool | str) or label == "NaN" or not admitted(annotation, type(value)):
        return False
    if not isinstance(value, Tensor):
        return True
    if label in ("a sparse tensor", "a nested tensor", "a float8 tensor"):
        return False
    if not value.is_floating_point():
        return name == "t" and label == "an integer tensor" and not isinstance(good, Tensor)  # times are numbers
    if isinstance(good, Tensor):
        return label == "a tensor [2]" and good.ndim == 1 and dims[name].islower()
    return isinstance(good, float)


def _of_tensor(name: str, good: Tensor, dims: dict[str, str], allowed: set[str]) -> Iterator[Wrong]:
    def verdict(label: str, otherwise: str) -> str:
        return MAY if label in allowed else otherwise

    yield Wrong("it as a list", good.tolist(), verdict("it as a list", MUST_RAISE))
    yield Wrong("it as an array", good.numpy(), verdict("it as an array", MUST_RAISE))
    if good.is_floating_point():
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64):
            label = f"it in {dtype}"
            time = name == "t" and dtype in (torch.int64, torch.uint8)
            yield Wrong(label, good.to(dtype), verdict(label, MAY if time else MUST_RAISE))
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            yield Wrong(f"it in {dtype}", good.to(dtype), verdict(f"it in {dtype}", MAY), dtype)
        doubled = torch.stack((good, good), -1).requires_grad_()
        yield Wrong("a strided view with a gradient", doubled[..., 0], MUST_WORK)
    else:
        yield Wrong("it in float32", good.float(), MUST_RAISE)
        yield Wrong("it in bool", good.bool(), MUST_RAISE)
    for label, layout in _layouts(good):
        yield Wrong(label, layout, verdict(label, MUST_RAISE))
    yield Wrong("it on the meta device", good.to("meta"), verdict("it on the meta device", MUST_RAISE))
    mine = dims[name].split()
    free_rank = "*" in mine
    others = [d for other, text in dims.items() if other != name for d in text.split()]
    yield Wrong("one rank more", good[..., None], verdict("one rank more", MUST_WORK if free_rank else MUST_RAISE))
    yield Wrong("one rank more in front", good[None], verdict("one rank more in front", MUST_RAISE))
    if good.ndim:
        label = "one rank fewer"
        yield Wrong(label, good[0], verdict(label, MUST_RAISE))
        if good.ndim > 1:
            yield Wrong("0-d", good.flatten()[0], verdict("0-d", MUST_RAISE))
    for d, dim in enumerate(x for x in mine if x != "*"):
        free = dim.islower() and dim not in others and mine.count(dim) == 1
        index = [min(i, good.shape[d] - 1) for i in range(good.shape[d] + 1)]
        label = f"dimension {d} one longer"
        yield Wrong(
            label, good.index_select(d, torch.tensor(index)), verdict(label, MUST_WORK if free else MUST_RAISE)
        )
        label = f"dimension {d} of size 1"
        if good.shape[d] > 1:
            yield Wrong(label, good.narrow(d, 0, 1), verdict(label, MAY if free else MUST_RAISE))
        label = f"dimension {d} empty"
        yield Wrong(label, good.narrow(d, 0, 0), verdict(label, MAY if free else MUST_RAISE))


def _layouts(good: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensor in torch's layouts without strides, without a shape, or without arithmetic."""
    yield "it sparse", good.to_sparse()
    if good.ndim == 2:
        yield "it in csr", good.to_sparse_csr()
    if good.ndim:
        yield "it nested", torch.nested.nested_tensor(list(good))
    if good.is_floating_point():
        yield "it in mkldnn", good.to_mkldnn()
        yield "it in float8", good.to(FLOAT8)
        yield "it uninitialised", torch.nn.UninitializedParameter()


def names(message: str, argument: str) -> bool:
    """Whether the message contains the argument's name as a word."""
    return re.search(rf"(?<![A-Za-z0-9_]){re.escape(argument)}(?![A-Za-z0-9_])", message) is not None


def tensors_in(result: Any) -> list[Tensor]:
    """Every tensor of a result, also those that a returned module holds."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, torch.nn.Module):
        return list(result.state_dict().values())
    if isinstance(result, (tuple, list)):
        return [t for part in result for t in tensors_in(part)]
    if isinstance(result, dict):
        return tensors_in(list(result.values()))
    return []


def outcome(call: Callable[..., Any], arguments: dict[str, Any]) -> tuple[Any, BaseException | None]:
    """(result, None) or (None, the exception)."""
    try:
        return call(**arguments), None
    except Exception as error:  # the caller judges any exception
        return None, error
