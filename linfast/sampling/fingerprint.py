"""The digest of a model: equal for two models only if they give the same samples.

Of a model that ``linfast.save`` accepts, the digest covers what its file would hold, that is the description with
every argument of every constructor and all tensors, and the attributes of modules whose classes are neither
linfast's nor torch's. Of any other model it covers everything that can be reached from it: attributes, hooks, and
functions and classes by their code and all that they refer to. Code of installed packages counts by its name. An
object without readable contents (a lock, a handle of a C library) cannot be told from another: no digest is made.

The device, the train flag and ``requires_grad`` do not count: they do not change what is sampled.
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
from collections.abc import Callable, Collection, Iterable, Iterator
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


def _parts(value: Any) -> Iterable[Any]:
    """What an object is made of, beginning with its kind; a memoryview is bytes as they are."""
    if type(value) in (list, tuple):
        return ("sequence", len(value), *value)
    if type(value) in (dict, OrderedDict):
        return ("mapping", *chain.from_iterable(value.items()))
    take_apart = next((parts for kinds, parts in _KINDS if isinstance(value, kinds)), _pickled_parts)
    return take_apart(value)


def _module_parts(module: nn.Module) -> Iterator[Any]:
    module = getattr(module, "_orig_mod", module)  # compiled or not
    yield from ("module", getattr(type(module), "_linfast_original", type(module)))  # accelerated or not
    yield from _kept(module)


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


_KINDS: tuple[tuple[Any, Callable[[Any], Iterable[Any]]], ...] = (
    (Tensor, _tensor_parts),
    (nn.Module, _module_parts),
    (types.CodeType, lambda code: ("code", code.co_code, code.co_names, code.co_consts)),
    (types.FunctionType, _function_parts),
    (types.CellType, lambda cell: ("cell", *([cell.cell_contents] if cell != types.CellType() else []))),
    (types.MethodType, lambda method: ("method", method.__func__, method.__self__)),
    (types.ModuleType, lambda module: ("import", module.__name__)),
    (type, _class_parts),
    (property, lambda attribute: ("property", attribute.fget)),
    (functools.cached_property, lambda attribute: ("property", attribute.func)),
    ((staticmethod, classmethod), lambda method: (type(method).__name__, method.__func__)),
    ((set, frozenset), lambda values: ("set", type(values), len(values))),
    (torch.device, lambda device: ("device",)),
    (weakref.ref, lambda reference: ("reference", reference())),
)
"""How an object of each kind is taken apart; any other is taken apart as pickle would."""
