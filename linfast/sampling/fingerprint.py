"""What a model is, as a digest: equal for two models only if they give the same samples.

A model that ``linfast.save`` takes is known by what its file would hold: the description, with every argument of
every constructor, and all tensors; and by all that modules keep whose classes are not linfast's or torch's. Any
other is known by everything that can be reached from it: attributes, hooks, functions and classes by their code
and all that they refer to. Code of installed packages is known by its name. What has no contents that can be read
(a lock, a handle of a C library) cannot be told from another, and the digest is refused.

Neither the device nor the train flag nor ``requires_grad`` counts: they do not change what is sampled.
"""

from __future__ import annotations

import copyreg
import functools
import hashlib
import json
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..flows.actnorm import ActNorm
from ..io import described
from ..state import is_foreign

__all__ = ["digest", "fingerprint"]

_HOOKS = {"_forward_hooks", "_forward_pre_hooks"}
_CONTENTS = _HOOKS | {"_parameters", "_buffers", "_modules"}
_BOOKKEEPING = (
    vars(nn.Module()).keys() | {"_compiled_call_impl", "_is_torch_compile", "_linfast_plan"}
) - _CONTENTS
_ATOMS: set[type] = {type(None), type(...), bool, int, float, complex, str, bytes}
_ATOMS |= {torch.dtype, torch.layout, torch.memory_format}


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of all that the model's samples depend on.

    Raises:
        TypeError: a part that cannot be told from another.
    """
    model = getattr(model, "_orig_mod", model)  # compiled or not
    return digest(_described(model) or model)


def digest(value: Any) -> str:
    """SHA-256 of an object by its contents; TypeError as for ``fingerprint``."""
    try:
        return _Digest().of(value).hex()
    except RecursionError as error:
        raise TypeError("its parts are nested too deep") from error


def _described(model: nn.Module) -> list[Any] | None:
    """What its file would hold, and what other modules keep; None where ``save`` refuses it."""
    try:
        architecture = json.loads(described(model)[0])["architecture"]
    except (TypeError, ValueError, AttributeError):
        return None
    named = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    classes = [(name, type(module)) for name, module in model.named_modules(remove_duplicate=False)]
    kept = [list(_kept(module, _CONTENTS)) for module in model.modules() if is_foreign(module)]
    return [json.dumps(architecture, sort_keys=True), sorted(named, key=lambda pair: pair[0]), classes, kept]


class _Digest:
    """Digests of objects by their contents; what is met twice is read once."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[object, bytes]] = {}  # with the object, whose id is taken as long as it lives
        self.open: list[int] = []  # those whose parts are being read

    def of(self, value: Any) -> bytes:
        if type(value) in _ATOMS:
            return hashlib.sha256(f"{type(value).__name__} {value!r}".encode()).digest()
        if id(value) in self.known:
            return self.known[id(value)][1]
        if id(value) in self.open:  # a circle: so many steps back
            return self.of(f"back {len(self.open) - self.open.index(id(value))}")
        self.open.append(id(value))
        digest = hashlib.sha256()
        if isinstance(value, (set, frozenset)):  # which have no order
            digest.update(b"".join(sorted(map(self.of, value))))
        for part in _parts(value):
            digest.update(part if isinstance(part, memoryview) else self.of(part))
        self.open.pop()
        self.known[id(value)] = value, digest.digest()
        return digest.digest()


def _parts(value: Any) -> Iterator[Any]:
    """What an object is made of, beginning with its kind; a memoryview is bytes as they are."""
    if isinstance(value, Tensor):
        yield from _tensor_parts(value)
    elif isinstance(value, nn.Module):
        value = getattr(value, "_orig_mod", value)  # compiled or not
        yield from ("module", getattr(type(value), "_linfast_original", type(value)))  # accelerated or not
        yield from _kept(value)
    elif isinstance(value, types.CodeType):
        yield from ("code", value.co_code, value.co_names, value.co_consts)
    elif isinstance(value, types.FunctionType):
        yield from _function_parts(value)
    elif isinstance(value, types.CellType):
        yield from ("cell", *([value.cell_contents] if value != types.CellType() else []))
    elif isinstance(value, types.MethodType):
        yield from ("method", value.__func__, value.__self__)
    elif isinstance(value, types.ModuleType):
        yield from ("import", value.__name__)
    elif isinstance(value, type):
        yield from _class_parts(value)
    elif isinstance(value, property):
        yield from ("property", value.fget)
    elif isinstance(value, functools.cached_property):
        yield from ("property", value.func)
    elif isinstance(value, (staticmethod, classmethod)):
        yield from (type(value).__name__, value.__func__)
    elif type(value) in (list, tuple):
        yield from ("sequence", len(value), *value)
    elif type(value) in (dict, OrderedDict):
        yield from ("mapping", *chain.from_iterable(value.items()))
    elif isinstance(value, (set, frozenset)):
        yield from ("set", type(value), len(value))
    elif isinstance(value, torch.device):
        yield "device"
    elif isinstance(value, weakref.ref):
        yield from ("reference", value())
    else:
        yield from _pickled_parts(value)


def _kept(module: nn.Module, beside: Collection[str] = ()) -> Iterator[Any]:
    """A module's attributes by name, without what it remembers of earlier calls."""
    remembered = {"_seen"} if isinstance(module, ActNorm) else set()
    for name in sorted(vars(module).keys() - _BOOKKEEPING - remembered - set(beside)):
        part = vars(module)[name]
        yield from (name, list(part.values()) if name in _HOOKS else part)  # under numbers that count up


def _tensor_parts(value: Tensor) -> Iterator[Any]:
    if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided or value.is_quantized:
        raise TypeError(f"a {type(value).__name__} of layout {value.layout} and {value.dtype} in it cannot be read")
    try:
        data = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        raw = memoryview(data.reshape(-1).view(torch.uint8).numpy().data if data.numel() else b"")
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise TypeError(f"a tensor in it cannot be read ({error})") from error
    yield from ("tensor", str(data.dtype), tuple(data.shape), raw)


def _function_parts(function: types.FunctionType) -> Iterator[Any]:
    """Its name; and its code and all that it refers to, but for what an installed package has under that name."""
    yield from ("function", function.__module__, function.__qualname__)
    home = function.__globals__.get("__name__")
    installed = _is_installed(home)
    if installed and function.__module__ == home and "<" not in function.__qualname__:  # no decorator's, no closure
        return
    yield from (function.__code__, function.__defaults__, function.__kwdefaults__, function.__closure__)
    if not installed:
        yield from _reached(function.__globals__, set(_names(function.__code__)), [])


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _reached(space: dict[str, Any], names: set[str], within: list[str]) -> Iterator[Any]:
    """What these names stand for, also in modules that are not installed."""
    for name in sorted(names & space.keys()):
        value = space[name]
        if not isinstance(value, types.ModuleType) or _is_installed(value.__name__):
            yield from (name, value)
        elif value.__name__ not in within:
            yield name
            yield from _reached(vars(value), names, [*within, value.__name__])


def _class_parts(cls: type) -> Iterator[Any]:
    yield from ("class", cls.__module__, cls.__qualname__, *cls.__bases__)
    if _is_installed(cls.__module__):
        return
    for name, value in sorted(vars(cls).items()):
        is_ours = not name.startswith("_abc_") and not isinstance(value, types.MemberDescriptorType)
        if is_ours and (not name.startswith("__") or isinstance(value, types.FunctionType)):
            yield from (name, value)


def _pickled_parts(value: Any) -> Iterator[Any]:
    """As pickle would take it apart."""
    try:
        by_type = copyreg.dispatch_table.get(type(value))
        reduced = value.__reduce_ex__(4) if by_type is None else by_type(value)
    except Exception as error:
        raise TypeError(f"a {type(value).__name__} in it cannot be told from another ({error})") from error
    if not isinstance(reduced, str):
        build, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        yield from ("object", build, arguments, state, list(items or ()), list(pairs or ()))
    elif hasattr(value, "__wrapped__"):
        yield from ("wrapped", type(value), value.__wrapped__)
    elif _is_installed(getattr(value, "__module__", None)):
        yield from ("name", value.__module__, reduced)
    else:
        raise TypeError(f"a {type(value).__name__} in it is known by its name alone, {reduced}")


def _is_installed(module: str | None) -> bool:
    """Whether code of this module is a package's: of Python's library, linfast, or what is installed beside it."""
    top = (module or "__main__").partition(".")[0]
    if top in sys.stdlib_module_names or top in ("linfast", "torch"):
        return top != "__main__"
    path = getattr(sys.modules.get(top), "__file__", None) or ""
    return "site-packages" in path or "dist-packages" in path
