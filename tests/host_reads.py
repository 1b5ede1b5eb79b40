"""A stand-in for a device: inside ``forbidden`` every operation that would make the host wait for it raises.

It checks torch's own operations, also inside linfast's ops, whose implementation runs under it, and Python methods
of tensors that read memory without an operation. Triton's interpreter acts as the device and may read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from linfast.ops.register import RAW_OPS

_aten = torch.ops.aten
# Operations that read a value, allocate by values, or check whether a factorisation succeeded.
_READS = {
    _aten._local_scalar_dense, _aten.item, _aten.is_nonzero, _aten.equal, _aten.nonzero, _aten.masked_select,
    _aten.bincount, _aten.unique_dim, _aten._unique, _aten._unique2, _aten.unique_consecutive, _aten.histc,
    _aten._linalg_check_errors, _aten._linalg_svd, _aten._linalg_eigh, _aten.linalg_eig, _aten.linalg_lstsq,
    _aten._linalg_eigvals, _aten.linalg_eigvals, _aten.linalg_pinv, _aten.linalg_matrix_rank, _aten.allclose,
}  # fmt: skip
_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
_METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")


class HostRead(AssertionError):
    """The host read, or waited for, the device."""


_on_device = False  # while Triton's interpreter runs a kernel


class _Forbidden(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if _on_device:
            return func(*args, **(kwargs or {}))
        if packet in _READS or (packet in _INDEXED and _has_mask(args[1])):
            raise HostRead(f"{func.name()} of {[tuple(a.shape) for a in args if isinstance(a, Tensor)]}")
        if func is _aten.repeat_interleave.Tensor and "output_size" not in (kwargs or {}):
            raise HostRead("repeat_interleave by a tensor, whose sum is read")
        if func.namespace == "linfast":  # operations inside it are checked too
            with self:
                return RAW_OPS[func._opname]._run("cpu", *args)
        return func(*args, **(kwargs or {}))


def _has_mask(indices: Any) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


def _raising(name: str) -> Callable[..., Any]:
    method = getattr(Tensor, name)

    def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if _on_device or self.dtype == torch.uint8:  # the state of a random generator is on the host
            return method(self, *args, **kwargs)
        raise HostRead(f"Tensor.{name} of {tuple(self.shape)}")

    return read


def _launched(call: Callable[..., Any]) -> Callable[..., Any]:
    def launch(*args: Any, **kwargs: Any) -> Any:
        global _on_device
        _on_device = True
        try:
            return call(*args, **kwargs)
        finally:
            _on_device = False

    return launch


@contextlib.contextmanager
def forbidden() -> Iterator[None]:
    """Inside the block a read of the device raises ``HostRead``."""
    with contextlib.ExitStack() as stack:
        for name in _METHODS:
            stack.enter_context(mock.patch.object(Tensor, name, _raising(name)))
        for place in ("flows.actnorm", "operators.spectral", "flows.remembered", "accelerate.adapter"):
            stack.enter_context(mock.patch(f"linfast.{place}.read_at_once", return_value=False))
        stack.enter_context(mock.patch.object(GridExecutor, "__call__", _launched(GridExecutor.__call__)))
        stack.enter_context(_Forbidden())
        yield
