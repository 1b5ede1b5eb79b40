"""save and load: weights by safetensors, the architecture as JSON in its header, no pickle.

The architecture is read off the modules themselves: every class keeps each argument
of its constructor as an attribute of the same name (``_config_names`` renames one that
would clash). What was constructed that way is constructed that way again, so a file
can name only classes that linfast, or ``register``, knows: loading runs no foreign code.

A tensor lies in memory as it did, a transposed matrix by its columns: a product of the
same numbers in another order of memory is another product of the BLAS, and rounds otherwise.
"""

from __future__ import annotations

import inspect
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import flows, operators
from .checks import check_kind
from .device import usable_device
from .linearizer import Linearizer
from .scale_maps import ScaleMap

__all__ = ["load", "register", "save"]

_FORMAT = "linfast-1"
_Class = TypeVar("_Class", bound=type)
_CLASSES: dict[str, type] = {}


def register(cls: _Class) -> _Class:
    """Class decorator: let ``save`` and ``load`` handle modules of this class.

    Each constructor argument must be kept as an attribute of the same name.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls must be a class of modules; got {cls!r:.60}")
    if _CLASSES.setdefault(cls.__name__, cls) is not cls:
        raise ValueError(f"a class named {cls.__name__!r} is registered already")
    return cls


for _cls in (
    flows.ActNorm, flows.AdditiveCoupling, flows.AffineCoupling, flows.Conditioned, flows.ConvNet,
    flows.Flow, flows.Householder, flows.Inverse, flows.MLP, flows.Mix, flows.Permute, flows.Squeeze,
    flows.UNet,
    operators.BlockDiagonal, operators.Dense, operators.DepthwiseConv, operators.Diagonal,
    operators.LowRank, operators.Projection, operators.TimeDepthwiseConv, operators.TimeDiagonal,
    operators.TimeLowRank,
    operators.lazy.Product, operators.lazy.Scaled, operators.lazy.Sum, operators.lazy.Transposed,
    Linearizer,
):  # fmt: skip
    register(_cls)


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a Linearizer, flow or operator to a safetensors file that ``load`` rebuilds.

    On the same machine the loaded model computes the same bits. The file appears whole or not at all.

    Raises:
        TypeError: a part whose class or argument cannot be described (see ``register``).
    """
    from safetensors.torch import save_file

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module; got {type(model).__name__}")
    check_kind("path", path, (str, os.PathLike))
    described: dict[int, int] = {}
    architecture = _describe(model, described)
    tensors, aliases = _unique(model.state_dict())
    orders = {key: _order(value) for key, value in tensors.items() if not value.is_contiguous()}
    header = {"format": _FORMAT, "architecture": architecture, "aliases": aliases, "orders": orders}
    contiguous = {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    with written_whole(Path(path)) as partial:
        save_file(contiguous, partial, metadata={"linfast": json.dumps(header)})


@contextmanager
def written_whole(path: Path) -> Iterator[str]:
    """The name of a file to write, which takes the place of ``path`` where nothing was raised."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    os.close(handle)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Any:
    """The model that ``save`` wrote, on this device, in the dtypes it was saved in.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a linfast file, an unknown class, tensors that are missing, left
            over or of the wrong shape, or weights that are NaN or infinite.
    """
    check_kind("path", path, (str, os.PathLike))
    device = usable_device(device)
    tensors, header = _read(Path(path))
    for key, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{path}: {key} {tuple(value.shape)} has NaN or infinite values")
    try:
        with torch.random.fork_rng(devices=[]):
            model = _build_module(header["architecture"], [])
        for key, order in header.get("orders", {}).items():
            tensors[key] = _laid_out(tensors[key], order)
        tensors.update({alias: tensors[key] for alias, key in header["aliases"].items()})
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: the architecture cannot be built ({error!r})") from error
    _fill(model, tensors, str(path))
    return model.to(device)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            header = _header(path, (file.metadata() or {}).get("linfast", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from error
    return tensors, header


def _header(path: Path, text: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: its linfast header is not JSON ({error})") from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise ValueError(f"{path}: not a linfast file of format {_FORMAT!r}; its header is {text[:60]}")
    return header


def _unique(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """State with each tensor once, and which other keys are the same tensor."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for key, value in state.items():
        identity = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and identity in first:
            aliases[key] = first[identity]
        else:
            first[identity] = key
            tensors[key] = value.detach()
    return tensors, aliases


def _order(value: Tensor) -> list[int]:
    """The dimensions as they lie in memory, the innermost last."""
    return sorted(range(value.ndim), key=lambda d: -value.stride()[d])


def _laid_out(value: Tensor, order: list[int]) -> Tensor:
    """The same tensor with its dimensions in this order in memory."""
    if sorted(order) != list(range(value.ndim)):
        raise IndexError(f"{order} is no order of the dimensions of {tuple(value.shape)}")
    back = sorted(range(value.ndim), key=order.__getitem__)
    return value.permute(order).contiguous().permute(back)


def _describe(value: Any, seen: dict[int, int]) -> Any:
    """JSON of a constructor argument; a module seen before becomes a reference to it."""
    if isinstance(value, nn.ModuleList):
        return {"list": [_describe(item, seen) for item in value]}
    if isinstance(value, nn.Module):
        return _describe_module(value, seen)
    if isinstance(value, Tensor):
        return _describe_tensor(value)
    if isinstance(value, ScaleMap):
        return {"scale_map": asdict(value)}
    if isinstance(value, (tuple, list)):
        return {"list": [_describe(item, seen) for item in value]}
    if isinstance(value, dict):
        return {"dict": {str(key): _describe(item, seen) for key, item in value.items()}}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"cannot save an argument of type {type(value).__name__}")


def _describe_tensor(value: Tensor) -> dict[str, Any]:
    """Shape and dtype, which the constructor may check; of integers, which it may use, the values too."""
    described = {
        "tensor": list(value.shape),
        "dtype": str(value.dtype).removeprefix("torch."),
        "parameter": isinstance(value, nn.Parameter),
    }
    return described if value.is_floating_point() else {**described, "values": value.tolist()}


def _describe_module(module: nn.Module, seen: dict[int, int]) -> Any:
    if id(module) in seen:
        return {"same": seen[id(module)]}
    cls = type(module)
    if _CLASSES.get(cls.__name__) is not cls:
        raise TypeError(f"cannot save a {cls.__name__}: register its class with linfast.io.register")
    rename: Mapping[str, str] = getattr(module, "_config_names", {})
    names = list(inspect.signature(cls.__init__).parameters)[1:]
    arguments = {name: _describe(getattr(module, rename.get(name, name)), seen) for name in names}
    seen[id(module)] = len(seen)
    return {"class": cls.__name__, "arguments": arguments}


def _build(node: Any, built: list[nn.Module]) -> Any:
    """The object that ``_describe`` described; modules in the order they were described."""
    if not isinstance(node, dict):
        return node
    for kind, make in _NODES.items():
        if kind in node:
            return make(node, built)
    raise ValueError(f"unknown entry in the architecture: {sorted(node)}")


def _build_module(node: dict[str, Any], built: list[nn.Module]) -> nn.Module:
    if node["class"] not in _CLASSES:
        raise ValueError(f"unknown class {node['class']!r}: register it with linfast.io.register first")
    arguments = {name: _build(value, built) for name, value in node["arguments"].items()}
    module = _CLASSES[node["class"]](**arguments)
    built.append(module)
    return module


def _build_tensor(node: dict[str, Any], built: list[nn.Module]) -> Tensor:
    dtype = getattr(torch, node["dtype"])
    if "values" in node:
        return torch.tensor(node["values"], dtype=dtype).reshape(node["tensor"])
    value = torch.zeros(node["tensor"], dtype=dtype)
    return nn.Parameter(value) if node["parameter"] else value


_NODES: dict[str, Callable[[dict[str, Any], list[nn.Module]], Any]] = {
    "class": _build_module,
    "same": lambda node, built: built[node["same"]],
    "list": lambda node, built: [_build(item, built) for item in node["list"]],
    "dict": lambda node, built: {key: _build(item, built) for key, item in node["dict"].items()},
    "tensor": _build_tensor,
    "scale_map": lambda node, built: ScaleMap(**node["scale_map"]),
}


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], path: str) -> None:
    """Check keys and shapes, then put the tensors in, in their own dtypes and orders of memory."""
    state = model.state_dict()
    missing, extra = state.keys() - tensors.keys(), tensors.keys() - state.keys()
    if missing or extra:
        raise ValueError(f"{path}: missing tensors {sorted(missing)}, left over {sorted(extra)}")
    for key, value in state.items():
        if value.shape != tensors[key].shape:
            raise ValueError(f"{path}: {key} is {tuple(tensors[key].shape)}, expected {tuple(value.shape)}")
    for key, value in model.state_dict(keep_vars=True).items():
        value.data = torch.empty_like(tensors[key], device=value.device)
    model.load_state_dict(dict(tensors))
