"""save and load: weights in a safetensors file, the architecture as JSON in its header, no pickle.

``blueprint`` describes modules and rebuilds them on the meta device: a file's names, shapes and dtypes are compared
with the model's before any tensor is read or computed. ``state`` lists the tensors of a model.

A loaded tensor has the memory order of the saved tensor, such as column-major for a transposed matrix: the BLAS
may round the products of a matrix in another order differently.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import hub, state
from .blueprint import DTYPES, STORED_AS, build, describe, register, size_list
from .checks import check_kind, check_path, with_article
from .dispatch import usable_device
from .flows.bijection import Bijection
from .flows.mix import check_permutation

__all__ = ["load", "register", "save"]

_FORMAT = "linfast-2"
_LARGEST_HEADER = 40_000_000  # characters; safetensors reads up to 100 MB, counted with escaped quotes
_LISTS = ("frozen", "learned", "switched")  # a header's lists of names
# The parts of a header: whether each is a dictionary or a list, and the type of its values.
_ENTRIES = {"aliases": (dict, str), "strides": (dict, list), "shared": (dict, str)} | dict.fromkeys(
    _LISTS, (list, str)
)


def described(model: nn.Module) -> tuple[str, dict[str, Tensor]]:
    """The contents of the model's file: the header as JSON, and the model's tensors by name, each once.

    TypeError or ValueError as for ``save``, except that NaN and infinite weights are not looked for.
    """
    try:
        return _described(model)
    except RecursionError as error:
        raise ValueError("its modules lie too deep inside one another") from error


def _described(model: nn.Module) -> tuple[str, dict[str, Tensor]]:
    architecture = describe(model, {})
    found = state.slots(model)
    tensors, aliases = state.unique(found)
    modes = {path: module.training for path, module in model.named_modules()}
    text = json.dumps({
        "format": _FORMAT,
        "architecture": architecture,
        "aliases": aliases,
        "strides": {key: state.compact(v.shape, v.stride()) for key, v in tensors.items() if not v.is_contiguous()},
        "shared": state.shared_modules(model),
        "frozen": [key for key, slot in found.items() if slot.trained and not slot.tensor.requires_grad],
        "learned": [key for key, slot in found.items() if not slot.trained and slot.tensor.requires_grad],
        "switched": [path for path, mode in modes.items() if mode != modes.get(_parent(path), True)],
    })  # fmt: skip
    if len(text) > _LARGEST_HEADER:
        raise ValueError(f"its description takes {len(text)} characters")
    _planned(json.loads(text), {key: (list(v.shape), str(v.dtype)[6:]) for key, v in tensors.items()}, model)
    return text, tensors


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a Linearizer, flow or operator to a safetensors file that ``load`` reads.

    On the same machine the loaded model's results are bitwise equal. The file keeps dtypes, memory order, shared
    modules and tensors, requires_grad of parameters and buffers, and each module's train or eval mode. A buffer
    that is a view of another tensor becomes a copy. The file appears whole or not at all.

    Raises:
        TypeError: a part whose class or argument cannot be described (see ``register``); a part that was changed
            since it was constructed, such as by pruning, parametrizations or hooks.
        ValueError: what ``load`` would refuse: NaN or infinite values, modules that are not initialised; a path
            that is not UTF-8.
        OSError: the file cannot be written, as on a full disk.

    Examples:
        >>> g = lf.coupling_flow(features=8)
        >>> lf.save(g, "g.safetensors")
        >>> g = lf.load("g.safetensors")
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = check_path("path", path, utf8=True)
    check_kind("model", model)
    try:
        text, tensors = described(model)
        for key, value in tensors.items():
            _check_finite(key, value)
        _check_permutations(model)
    except ValueError as error:
        raise ValueError(f"cannot save {with_article(type(model))}: {error}") from error
    contiguous = {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    with written_whole(path) as partial:
        try:
            save_file(contiguous, partial, metadata={"linfast": text})
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error})") from error


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Any:
    """Read the model that ``save`` wrote to ``path``, onto ``device``, in the dtypes that it was saved in.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a linfast file, an unknown class or arguments that it does not take, tensors that are
            missing, left over or of the wrong shape or dtype, weights that are NaN or infinite; a device that
            cannot be used; a path that is not UTF-8.
    """
    path, place = check_path("path", path, utf8=True), usable_device(device)
    if not path.is_file():
        what = "a folder and no file (from_pretrained reads the folders of save_pretrained)"
        raise FileNotFoundError(f"{path}: {what if path.is_dir() else 'no such file'}")
    try:
        return _loaded(path, place)
    except (RecursionError, ValueError) as error:
        why = error if isinstance(error, ValueError) else "its architecture is nested too deeply"
        raise ValueError(f"{path}: {why}") from error


hub.files.update(save=save, load=load)


def _loaded(path: Path, device: torch.device) -> nn.Module:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = _header((file.metadata() or {}).get("linfast", "{}"))
            stored = {}
            for key in file.keys():  # noqa: SIM118
                part = file.get_slice(key)
                if (dtype := part.get_dtype()) not in STORED_AS:
                    raise ValueError(f"{key} is {dtype}; tensors are {', '.join(DTYPES)}")
                stored[key] = part.get_shape(), str(STORED_AS[dtype]).removeprefix("torch.")
            model, filled = _planned(header, stored)
            values = {}
            for key in stored:
                _check_finite(key, value := file.get_tensor(key))
                values[key] = state.laid_out(value, header["strides"].get(key, value.stride()), device)
    except SafetensorError as error:
        raise ValueError(f"not a safetensors file ({error})") from error
    _fill(model, filled, values, header)
    _check_permutations(model)
    model.load_state_dict(model.state_dict(keep_vars=True), assign=True)  # only to run load hooks
    return model.to(device)


def _header(text: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except ValueError as error:
        raise ValueError(f"its linfast header is not JSON ({error})") from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise ValueError(
            f"not a linfast file of format {_FORMAT!r}, the one that this version reads; its header is {text[:60]}"
        )
    return header


def _planned(header: dict[str, Any], stored: state.Stored, model: Any = None) -> tuple[nn.Module, dict[str, str]]:
    """The model on the meta device, and ``state.match``'s result; when saving, ``model`` must equal that model."""
    try:
        _check_entries(header, stored)
        built, given = build(header["architecture"], len(stored) + len(header["aliases"]))
        state.share_modules(built, header["shared"])
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"the architecture cannot be built ({error!r:.200})") from error
    if model is not None:
        state.check_rebuilt(model, built)
    found = state.slots(built)
    filled = state.match(found, set(map(id, given)), stored, header["aliases"])
    parameters = {key for key, slot in found.items() if slot.trained}
    constants = {key for key in found.keys() - parameters if DTYPES[stored[filled[key]][1]].is_floating_point}
    for name, known in zip(_LISTS, (parameters, constants, dict(built.named_modules())), strict=True):
        if unknown := [entry for entry in header[name] if entry not in known]:
            raise ValueError(f"{name} names {unknown[0]!r:.60}, which the model has not")
    return built, filled


def _check_entries(header: dict[str, Any], stored: state.Stored) -> None:
    """KeyError, TypeError or IndexError where a dictionary or list of the header is missing or invalid."""
    for name, (kind, item) in _ENTRIES.items():
        entries = header[name]
        held = entries.values() if isinstance(entries, dict) else entries
        if not isinstance(entries, kind) or not all(isinstance(entry, item) for entry in held):
            raise TypeError(f"{name} is {entries!r:.60}")
    for alias, key in header["aliases"].items():
        if alias in stored or key not in stored:
            raise KeyError(f"{alias}, an alias of {key}")
    for key, strides in header["strides"].items():
        if len(size_list(strides)) != len(stored[key][0]):
            raise IndexError(f"{strides} are no strides of {key}, which is {tuple(stored[key][0])}")


def _fill(model: nn.Module, filled: dict[str, str], values: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Put the values into the model; a tensor with several names is one object, or a parameter and views of it."""
    parameters: dict[str, nn.Parameter] = {}
    constants: dict[tuple[str, bool], Tensor] = {}
    frozen, learned, switched = (set(header[name]) for name in _LISTS)
    for name, slot in state.slots(model).items():
        key, value = filled[name], values[filled[name]]
        if not slot.tensor.is_meta and not torch.equal(value.cpu(), slot.tensor):
            raise ValueError(f"{name} is not what the architecture says it is")
        if slot.trained and key not in parameters:
            parameters[key] = nn.Parameter(value, name not in frozen and value.is_floating_point())
        constant = value.detach().requires_grad_() if name in learned else value
        put = parameters[key] if slot.trained else constants.setdefault((key, name in learned), constant)
        setattr(slot.module, slot.name, put)
    modes: dict[str | None, bool] = {None: True}
    for path, module in model.named_modules():
        modes[path] = module.training = modes[_parent(path)] != (path in switched)


def _parent(path: str) -> str | None:
    return path.rpartition(".")[0] if path else None


def _check_finite(key: str, value: Tensor) -> None:
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise ValueError(f"{key} {tuple(value.shape)} has NaN or infinite values")


def _check_permutations(model: nn.Module) -> None:
    """ValueError where a bijection's ``permutation`` does not permute its features."""
    for key, (module, name, value) in state.slots(model).items():
        if name == "permutation" and isinstance(module, Bijection):
            check_permutation(value, module.features, key)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[str]:
    """Yield the name of a temporary file to write, which replaces ``path`` at the end unless an error was raised.

    It has the mode of the file that it replaces, or of any new file (0666 less the umask). Where ``path`` is a
    link, the file that it points to is replaced.
    """
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a file that could be replaced")
    partial = path.parent / f"{path.name[:100]}.{secrets.token_hex(8)}.partial"
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600 if path.exists() else 0o666))
    try:
        mode = (path if path.exists() else partial).stat().st_mode & 0o777
        yield str(partial)
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        partial.chmod(mode)
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:
            raise OSError(error.errno, error.strerror, str(path)) from error  # that of a full disk names no file
        raise
