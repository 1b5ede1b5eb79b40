"""Describes a model's modules as JSON, and rebuilds the model from it on the meta device, without values.

A class keeps each argument of its constructor as an attribute of the same name (``_config_names`` maps an argument
to another name). ``describe`` reads these attributes, and ``build`` calls the constructors with their values.

    {"class": name, "arguments": {...}}             a module; {"same": i} refers to the i-th module described before
    {"tensor": shape, "dtype": ..., "values": ...}  a tensor; values only of integers, for constructors to read
    {"list": [...]}, {"dict": {...}}, {"scale_map": {...}}, and numbers, strings, booleans and null as they are

A file may name only linfast's classes and those given to ``register``: loading runs no code from the file.
``build`` limits the nesting depth, the number of paths to shared modules and the number of torch calls, so that no
file makes constructors create far more tensors than it holds. Constructors check their arguments.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import flows, operators
from .base_distributions import FixedBase, OtherBase
from .checks import with_article
from .density import Density
from .linearizer import Linearizer
from .operators import base
from .scale_maps import ScaleMap

STORED_AS = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "I8": torch.int8,
    "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""The dtypes that a file may hold, by their names in safetensors; ``DTYPES`` has them by their names in torch."""
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORED_AS.values()}
# Python allows 1000 frames. Per level of nesting, an operator takes at most 3 frames, another module at most 10.
_FRAMES, _OPERATOR_FRAMES, _MOST_FRAMES = 10, 3, 750
_MOST_PATHS = 100_000  # from the root to all modules; state_dict() and to() follow every path
_CALLS, _CALLS_PER_TENSOR = 20_000, 100  # torch calls of a build; linfast's modules take up to 15 per tensor

_Class = TypeVar("_Class", bound=type)
_CLASSES: dict[str, type] = {}


def register(cls: _Class) -> _Class:
    """Class decorator: let ``save`` and ``load`` handle modules of this class.

    Each constructor argument must be kept as an attribute of the same name. ``load`` runs the constructor on the
    meta device: it must not read values of tensors that it creates, and must keep them as parameters or buffers.

    Raises:
        TypeError: cls is not a subclass of torch.nn.Module.
        ValueError: another class of this name is registered.
    """
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise TypeError(f"cls must be a subclass of torch.nn.Module; got {cls!r}")
    if _CLASSES.setdefault(cls.__name__, cls) is not cls:
        raise ValueError(f"a class named {cls.__name__!r} is registered already")
    return cls


_ABSTRACT = (flows.Bijection, operators.LatentOperator)
# The arguments, and their types, that files hold of a class of torch, whose constructor takes others too.
_ARGUMENTS: dict[type, dict[str, tuple[type, ...]]] = {
    nn.Embedding: {
        "num_embeddings": (int,),
        "embedding_dim": (int,),
        "padding_idx": (int, type(None)),
        "max_norm": (float, int, type(None)),
        "norm_type": (float, int),
        "scale_grad_by_freq": (bool,),
        "sparse": (bool,),
    },
}
_LAZY = (base.Product, base.Scaled, base.Sum, base.Transposed)
_named = [getattr(package, name) for package in (flows, operators) for name in package.__all__]
for _cls in (Linearizer, Density, FixedBase, nn.Embedding, *_LAZY, *_named):
    if isinstance(_cls, type) and issubclass(_cls, nn.Module) and _cls not in _ABSTRACT:
        register(_cls)


def is_described(module: nn.Module) -> bool:
    """Whether the module's class is registered, so that a file can describe how to construct the module."""
    return _CLASSES.get(type(module).__name__) is type(module)


def describe(value: Any, seen: dict[int, int], name: str = "the model") -> Any:
    """JSON of a model or of its argument ``name``, modules in ``seen`` as references; TypeError if impossible."""
    if isinstance(value, nn.Module) and not isinstance(value, nn.ModuleList):
        return {"same": seen[id(value)]} if id(value) in seen else _describe_module(value, seen)
    if isinstance(value, (tuple, list, nn.ModuleList)):
        return {"list": [describe(item, seen, name) for item in value]}
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"cannot save {name}, a dictionary whose keys are not strings: {list(value)}")
        return {"dict": {key: describe(item, seen, name) for key, item in value.items()}}
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        described = {"tensor": list(value.shape), "dtype": dtype, "parameter": isinstance(value, nn.Parameter)}
        readable = dtype in DTYPES and value.layout is torch.strided and not value.is_meta
        return described | ({"values": value.tolist()} if readable and not value.is_floating_point() else {})
    if isinstance(value, ScaleMap):
        return {"scale_map": asdict(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"cannot save {name}, an argument of type {type(value).__name__}")


def _how_to_save(module: nn.Module) -> str:
    """What to do about a module whose class is not registered."""
    if not type(module).__module__.startswith("torch."):
        return "register its class with linfast.io.register"
    for inside in ("_orig_mod", "module"):  # of torch.compile, and of DDP and others
        if isinstance(getattr(module, inside, None), nn.Module):
            return f"give what is inside it, its .{inside}"
    return "make it in a class of your own, registered with linfast.io.register"


def _describe_module(module: nn.Module, seen: dict[int, int]) -> Any:
    cls, kind, shown = type(module), type(module).__name__, with_article(type(module))
    if not is_described(module):
        parametrized = hasattr(module, "parametrizations")
        advice = "; remove its parametrizations (torch.nn.utils.parametrize) first" if parametrized else ""
        if isinstance(module, OtherBase):
            raise TypeError(f"cannot save {module}: give Density a module of a registered class that returns it")
        raise TypeError(f"cannot save {shown}: {_how_to_save(module)}{advice}")
    renamed: Mapping[str, str] = getattr(module, "_config_names", {})
    # The signature of __init__, not of the class: a module without its own constructor takes no arguments.
    own = cls.__init__ is not nn.Module.__init__
    names = _ARGUMENTS.get(cls) or (list(inspect.signature(cls.__init__).parameters)[1:] if own else ())
    arguments = {}
    for name in names:
        if not hasattr(module, renamed.get(name, name)):
            raise TypeError(f"cannot save {shown}: it keeps no attribute {name!r}, an argument of its constructor")
        arguments[name] = describe(getattr(module, renamed.get(name, name)), seen, f"{kind}: {name}")
    seen[id(module)] = len(seen)
    return {"class": kind, "arguments": arguments}


_FILLED = {"_parameters", "_buffers", "_modules", "_flat_weights"}  # filled by ``load``; the last is an LSTM's


def build(architecture: Any, tensors: int) -> tuple[nn.Module, list[Tensor]]:
    """The described model, built on the meta device, and the tensors that its constructors were given.

    ValueError for unknown classes, invalid arguments, or far more tensors than the file's number of ``tensors``.
    """
    builder = _Builder()
    try:
        with torch.device("meta"), _CallLimit(_CALLS + _CALLS_PER_TENSOR * tensors):
            model = builder.module(architecture, 0)
    except _Refused:
        raise
    except Exception as error:  # a constructor may raise any error for invalid arguments
        expected = isinstance(error, (ValueError, TypeError))
        why = str(error).partition("\n")[0] if expected else f"{error!r:.200}"
        raise ValueError(f"the architecture cannot be built ({why})") from error
    if _paths(model, {}) > _MOST_PATHS:
        raise ValueError(f"the architecture shares modules: more than {_MOST_PATHS} paths lead to them")
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in _FILLED and _holds_meta(value):
                raise ValueError(
                    f"{type(module).__name__}{f' {path}' if path else ''} keeps {name!r}, a tensor that is neither "
                    "a parameter nor a buffer: register it as one"
                )
    return model, builder.given


def _paths(module: nn.Module, known: dict[nn.Module, int]) -> int:
    """The number of paths from a module to itself and to all modules in it."""
    if module not in known:
        known[module] = 1
        for child in module._modules.values():  # a sum would take one more of Python's 1000 frames
            known[module] += 0 if child is None else _paths(child, known)
    return known[module]


def _holds_meta(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return any(map(_holds_meta, value.values() if isinstance(value, dict) else value))
    return isinstance(value, Tensor) and value.is_meta


class _Refused(ValueError):
    """An error with a complete message, which ``build`` passes on unchanged."""


class _CallLimit(TorchFunctionMode):
    """Limits the torch calls that return a tensor, so that a single number in a file cannot create 10^5 layers."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):  # other calls restore settings, as at the end of torch.no_grad
            self.calls -= 1
            if self.calls < 0:
                raise _Refused("the architecture makes far more tensors than the file holds")
        return result


class _Builder:
    """Builds modules from JSON nodes; ``parts``: those built so far; ``given``: tensors among arguments."""

    def __init__(self) -> None:
        self.parts: list[nn.Module] = []
        self.given: list[Tensor] = []

    def module(self, node: Any, depth: int) -> nn.Module:
        name = _of_type(dict, node)["class"]
        cls = _CLASSES.get(name) if isinstance(name, str) else None
        if cls is None:
            raise _Refused(f"unknown class {name!r:.60}: register it with linfast.io.register first")
        depth += _OPERATOR_FRAMES if issubclass(cls, operators.LatentOperator) else _FRAMES
        if depth > _MOST_FRAMES:
            raise _Refused("its modules lie too deep inside one another")
        arguments = {}
        for key in _of_type(dict, node["arguments"]):  # a comprehension would take one more of Python's 1000 frames
            arguments[key] = self._value(node["arguments"][key], depth, f"{name}: {key}")
        for key, value in arguments.items() if cls in _ARGUMENTS else ():
            if type(value) not in _ARGUMENTS[cls].get(key, ()):
                raise _Refused(f"{name} takes no {key} {value!r:.60}")
        try:
            self.parts.append(cls(**arguments))
        except RuntimeError as error:
            if isinstance(error, RecursionError):
                raise
            why = str(error).partition("\n")[0]
            raise _Refused(f"a {name} cannot be constructed on the meta device ({why})") from error
        return self.parts[-1]

    def _value(self, node: Any, depth: int, name: str) -> Any:
        """The value that the node describes; messages call it ``name``."""
        if isinstance(node, float) and not math.isfinite(node):
            raise _Refused(f"{name} must be finite; got {node}")
        if isinstance(node, int) and abs(node) >= 2**63:
            raise _Refused(f"{name} must be an integer of 64 bits at most")
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        if not isinstance(node, dict) or not node.keys() & {"class", "same", "tensor", "scale_map", "list", "dict"}:
            raise _Refused(f"unknown entry in the architecture: {name} is {node!r:.60}")
        if "class" in node:
            return self.module(node, depth)
        if "same" in node:
            index = node["same"]
            if type(index) is not int or not 0 <= index < len(self.parts):
                raise _Refused(f"the architecture refers to module {index!r:.60}, which was not built before")
            return self.parts[index]
        if "tensor" in node:
            return self._tensor(node)
        if "scale_map" in node:
            return ScaleMap(**self._value({"dict": node["scale_map"]}, depth, name))
        items = dict(enumerate(_of_type(list, node["list"]))) if "list" in node else _of_type(dict, node["dict"])
        built = {}
        for key in items:
            built[key] = self._value(items[key], depth, name)
        return list(built.values()) if "list" in node else built

    def _tensor(self, node: dict[str, Any]) -> Tensor:
        """A tensor on the meta device, or a tensor of integers on the CPU, which a constructor may read."""
        shape, dtype = size_list(node["tensor"]), DTYPES.get(node["dtype"])
        if dtype is None:
            raise TypeError(f"tensors of dtype {node['dtype']!r:.60} are not saved")
        if "values" in node:
            value = torch.tensor(node["values"], dtype=dtype, device="cpu")
            if value.numel() != math.prod(shape) or value.reshape(shape).tolist() != node["values"]:
                got = f"{node['values']!r:.60}"
                raise ValueError(f"values of another shape or type for a tensor of {dtype} and {shape}: {got}")
            value = value.reshape(shape)
        else:
            value = torch.empty(shape, dtype=dtype)
        self.given.append(nn.Parameter(value) if node.get("parameter", False) else value)
        return self.given[-1]


def _of_type(cls: type, value: Any) -> Any:
    if not isinstance(value, cls):
        raise TypeError(f"expected a {cls.__name__}, got {value!r:.60}")
    return value


def size_list(value: Any) -> list[int]:
    """The value, a list of integers from 0 to 2^63 - 1; TypeError for anything else."""
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 2**63 for item in value):
        raise TypeError(f"expected a list of sizes, got {value!r:.60}")
    return value
