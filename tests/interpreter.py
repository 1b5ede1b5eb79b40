"""Removes useless work from Triton's interpreter, which is two thirds to four fifths of its time on our kernels.

It checks every sum and product of int32 for overflow and, unless debugging, discards the result; it puts its
own functions into triton.language again at every call of one @triton.jit function by another; it computes
the same few types, shapes and dtypes for every value; and it compares shapes as tuples of constexpr, of which it
makes new ones for each comparison.

Adds what the interpreter lacks: a tf32 product drops the low 13 bits of fp32 operands, as matrix units do.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import numpy as np
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_put_in, _np_dtype_of, _make_block = interpreter._patch_lang, interpreter._get_np_dtype, core.block_type.__init__
_exact_dot = interpreter.InterpreterBuilder.create_dot
_broadcast, _broadcast_to = TritonSemantic.broadcast_impl_value, TritonSemantic.broadcast_impl_shape
_done: set[Any] = set()  # in this launch: modules by id, and the parts of triton.language that they use
_builtins: dict[Any, list[tuple[str, Any]]] = {}
_np_dtypes: dict[str, Any] = {}
_blocks: dict[Any, tuple[Any, int, str]] = {}
_shapes: dict[str, tuple[Any, Any]] = {}


class _Scope:
    """Removes the functions at the end of a launch."""

    def __init__(self, scope: Any) -> None:
        self._scope = scope

    def restore(self) -> None:
        _done.clear()
        self._scope.restore()


def _once_a_launch(function: Any) -> _Scope | None:
    """Put the interpreter's functions in place for this module; None where they are already."""
    module = id(function.__globals__)
    if module in _done:
        return None
    seen = frozenset(id(v) for v in function.__globals__.values() if v is tl or v is core)
    known = seen in _done
    _done.update((module, seen))
    return None if known else _Scope(_put_in(function))


def _patch_builtins(package: Any, builder: Any, scope: Any) -> None:
    if package not in _builtins:
        _builtins[package] = [(name, m) for name, m in inspect.getmembers(package) if core.is_builtin(m)]
    for name, member in _builtins[package]:
        interpreter._patch_attr(package, name, member, builder, scope)


def _np_dtype(dtype: Any) -> Any:
    if dtype.name not in _np_dtypes:
        _np_dtypes[dtype.name] = _np_dtype_of(dtype)
    return _np_dtypes[dtype.name]


def _block(self: Any, element_ty: Any, shape: Any) -> None:
    key = (element_ty.name, *(size.value if isinstance(size, core.constexpr) else size for size in shape))
    if key not in _blocks:
        _make_block(self, element_ty, shape)  # its checks, once
        _blocks[key] = self.shape, self.numel, self.name
    self.element_ty = element_ty
    self.shape, self.numel, self.name = _blocks[key]


def _tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    if type.name not in _shapes:
        shape = [core.constexpr(size) for size in type.shape] if type.is_block() else []
        _shapes[type.name] = core.tuple(shape), core.constexpr(type.numel if shape else 1)
    self.shape, self.numel = _shapes[type.name]


def _sizes(value: Any) -> list[int] | None:
    """The sizes of a block; None for a scalar."""
    return value.type.shape.values if value.type.is_block() else None


def _broadcast_value(self: Any, lhs: Any, rhs: Any) -> Any:
    """Leave values of one shape as they are, and compare sizes as integers."""
    left, right = _sizes(lhs), _sizes(rhs)
    if left == right:
        return lhs, rhs
    if left is None or right is None or len(left) != len(right):
        return _broadcast(self, lhs, rhs)
    if any(a != b and 1 not in (a, b) for a, b in zip(left, right, strict=True)):
        return _broadcast(self, lhs, rhs)  # which raises
    sizes = [b if a == 1 else a for a, b in zip(left, right, strict=True)]
    return tuple(_spread(self, value, sizes) for value in (lhs, rhs))


def _spread(self: Any, value: Any, sizes: list[int]) -> Any:
    if _sizes(value) == sizes:
        return value
    return self.tensor(self.builder.create_broadcast(value.handle, sizes), core.block_type(value.dtype, sizes))


def _broadcast_shape(self: Any, value: Any, shape: Any) -> Any:
    return value if _sizes(value) == list(shape) else _broadcast_to(self, value, shape)


def _truncated(operand: Any) -> Any:
    """The operand as tf32 matrix units read it."""
    if operand.data.dtype != np.float32:
        return operand
    bits = np.ascontiguousarray(operand.data).view(np.int32) & -0x2000
    return interpreter.TensorHandle(bits.view(np.float32), operand.dtype)


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    if input_precision == interpreter._ir.INPUT_PRECISION.TF32:
        a, b = _truncated(a), _truncated(b)
    return _exact_dot(self, a, b, d, input_precision, max_num_imprecise_acc)


def install() -> None:
    """Apply this to the whole process."""
    builder = interpreter.interpreter_builder
    interpreter.InterpreterBuilder.create_dot = _dot
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang, interpreter._patch_builtin = _once_a_launch, _patch_builtins
    interpreter._get_np_dtype = _np_dtype
    core.block_type.__init__, core.tensor.__init__ = _block, _tensor
    TritonSemantic.broadcast_impl_value, TritonSemantic.broadcast_impl_shape = _broadcast_value, _broadcast_shape
