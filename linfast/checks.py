"""Argument checks of public functions: each error names the argument and shows the value that was given.

Checks of tensors read only what the host knows (type, dtype, device, shape), never values, so they do not wait for
a GPU. torch.compile can trace them.
"""

from __future__ import annotations

import numbers
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

_MOST = 2**31 - 1  # a larger size is taken for a mistake
_LARGEST = sys.float_info.max

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""The dtypes that linfast computes in. torch calls float8 floating point, but has no arithmetic for it."""

_TIMES = (*DTYPES, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_PLAIN = (Tensor, nn.Parameter)


def check_dense(name: str, x: object) -> Tensor:
    """Return x; TypeError unless it is a tensor with a shape and strides: not sparse, nested, mkldnn or lazy."""
    dense = isinstance(x, Tensor) and x.layout is torch.strided and not x.is_nested
    if not dense or isinstance(x, UninitializedTensorMixin):
        advice = ": torch.as_tensor makes one of it" if type(x).__module__ == "numpy" else ""
        raise TypeError(
            f"{name} must be a {'dense ' if isinstance(x, Tensor) else ''}tensor; got {_shown(x)}{advice}"
        )
    return x  # type: ignore[return-value]


def check_tensor(name: str, x: Any, like: Tensor | None = None, of: str = "x", same_dtype: bool = False) -> None:
    """TypeError unless x is a dense tensor; ValueError unless its dtype is in ``DTYPES`` and its device like's.

    ``of`` is the name of the argument ``like``. With ``same_dtype``, x must have the dtype of ``like`` too.
    """
    # The common case is tested without a further function call, to save time.
    if type(x) not in _PLAIN or x.dtype not in DTYPES or x.layout is not torch.strided or x.is_nested:
        x = check_dense(name, x)
        if x.dtype not in DTYPES:
            bits = " of at least 16 bits" if x.is_floating_point() else ""
            raise ValueError(f"{name} must be floating point{bits}; got {x.dtype} {tuple(x.shape)}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name} is on {x.device} and {of} on {like.device}")
    if same_dtype and like is not None and x.dtype != like.dtype:
        raise ValueError(f"{name} is {x.dtype} and {of} {like.dtype}")


def check_like(kind: str, name: str, x: Any, parameter: Tensor | None) -> None:
    """Raise as ``check_tensor`` does; ValueError unless x has the device and dtype of ``parameter``.

    Under autocast x may also be float32 or autocast's dtype, except for float64 parameters, which are not cast.
    """
    plain = type(x) in _PLAIN and x.dtype in DTYPES and x.layout is torch.strided and not x.is_nested
    if not plain or (parameter is not None and x.device != parameter.device):
        check_tensor(f"{kind}: {name}", x, parameter, "the parameters are")
    if parameter is not None and x.dtype != parameter.dtype:
        on = not x.is_meta and torch.is_autocast_enabled(x.device.type)
        cast = torch.get_autocast_dtype(x.device.type) if on else None
        if cast is None or parameter.dtype == torch.float64 or x.dtype not in (torch.float32, cast):
            under = "" if cast is None else f" under autocast in {cast}"
            advice = "" if under else f": pass {name}.to({parameter.dtype}), or convert the module"
            raise ValueError(f"{kind}: {name} is {x.dtype} and the parameters are {parameter.dtype}{under}{advice}")


def check_count(name: str, n: Any, least: int = 1, most: float = _MOST) -> int:
    """n as an int; raises unless n is an integer (numpy's too, but no bool) from ``least`` to ``most``."""
    if type(n) is not int:
        if isinstance(n, (bool, Tensor)) or not isinstance(n, numbers.Integral):
            raise TypeError(f"{name} must be a whole number; got {_shown(n)}")
        n = int(n)
    if not least <= n <= most:
        raise ValueError(f"{name} must be at least {least}; got {n}" if n < least else f"{name} is too large")
    return n


def check_counts(name: str, values: Any, length: int | None = None) -> tuple[int, ...]:
    """The values as a tuple; raises unless they are a sequence of integers >= 1, ``length`` of them where given."""
    what = f"{length} whole numbers" if length is not None else "whole numbers"
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(
            f"{name} must be a sequence of {what}, such as {(4,) * (length or 2)}; got {_shown(values)}"
        )
    if length is not None and len(values) != length:
        raise ValueError(f"{name} must hold {what}; got {values!r}")
    return tuple(check_count(f"each of {name}", value) for value in values)


def check_number(
    name: str,
    value: Any,
    least: float = -_LARGEST,
    most: float = _LARGEST,
    above: bool = False,
    below: bool = False,
    what: str = "a number",
) -> float:
    """The value as a float; raises unless it is a real number from ``least`` to ``most``, no NaN and no bool.

    ``above`` and ``below`` exclude the limits; by default any finite number is valid. ``what``: the types in words.
    """
    if type(value) is not float:
        if isinstance(value, (bool, Tensor)) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be {what}; got {_shown(value)}")
        if isinstance(value, numbers.Integral) and not -(2**63) <= int(value) < 2**63:
            raise ValueError(f"{name} is too large")
        value = float(value)
    if not least <= value <= most or (above and value == least) or (below and value == most):
        low = "" if least == -_LARGEST else f" {'above' if above else 'of at least'} {least:g}"
        high = "" if most >= _LARGEST else f"{' and' if low else ''} {'below' if below else 'at most'} {most:g}"
        raise ValueError(f"{name} must be a{'' if most > _LARGEST else ' finite'} number{low}{high}; got {value}")
    return value


def check_factor(name: str, value: Any, like: Tensor | None = None, of: str = "x") -> None:
    """Raise unless the value is a number or a 0-d tensor, and on the meta device exactly if ``like`` is."""
    if not isinstance(value, Tensor):
        check_number(name, value, what="a number or a 0-d tensor")
        return
    check_dense(name, value)
    if value.ndim or value.dtype not in DTYPES:
        raise ValueError(f"{name} must be a number or a 0-d tensor; got {value.dtype} {tuple(value.shape)}")
    if like is not None and value.is_meta != like.is_meta:
        raise ValueError(f"{name} is on {value.device} and {of} on {like.device}")


def check_time(t: Any, like: Tensor | None = None, rows: int | None = None) -> None:
    """Raise unless t is a real number, or a tensor of real numbers, 0-d or [B]; B must be ``rows`` where given."""
    if not isinstance(t, Tensor):
        check_number("t", t)
        return
    check_dense("t", t)
    if t.ndim > 1 or t.dtype not in _TIMES:
        raise ValueError(f"t must be a number, 0-d or [B], of real numbers; got {t.dtype} {tuple(t.shape)}")
    if rows is not None and t.ndim and t.shape[0] != rows:
        raise ValueError(f"t must be a number, 0-d or [{rows}], one per row; got {tuple(t.shape)}")
    if like is not None and t.is_meta != like.is_meta:
        raise ValueError(f"t is on {t.device} and x on {like.device}")


def check_path(name: str, path: Any, utf8: bool = False) -> Path:
    """The path as a Path; ValueError for a name that no file can have, or, with ``utf8``, that is not UTF-8."""
    check_kind(name, path, (str, os.PathLike))
    text = os.fsdecode(path)
    if "\0" in text or (utf8 and any("\ud800" <= letter <= "\udfff" for letter in text)):
        raise ValueError(
            f"{name} must be a name that a file can have{', in UTF-8' if utf8 else ''}; got {text!r:.200}"
        )
    return Path(text)


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    """Return value; ValueError unless it is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {_shown(value)}")
    return value


def check_flag(name: str, value: object) -> None:
    """Raise unless value is True or False."""
    if value is not True and value is not False:
        raise TypeError(f"{name} must be True or False; got {_shown(value)}")


def check_kind(
    name: str, value: object, kind: type | tuple[type, ...] = nn.Module, what: str | None = None
) -> None:
    """TypeError unless value is an instance of ``kind``; ``what`` describes the valid types in the message."""
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        what = " or ".join(map(with_article, kinds)) if what is None else what
        raise TypeError(f"{name} must be {what}; got {_shown(value)}")


def check_function(name: str, value: object) -> None:
    """Raise TypeError unless value is callable and not a class."""
    if not callable(value) or isinstance(value, type):
        raise TypeError(f"{name} must be a function; got {_shown(value)}")


def said_of(name: str, function: Callable[..., Any], x: Any, /, **keywords: Any) -> Any:
    """``function(x, **keywords)``; its errors get ``name``, the caller's name for x, before the message."""
    check_dense(name, x)
    try:
        return function(x, **keywords)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name}: {error}") from error


def is_of_input(error: RuntimeError) -> bool:
    """Whether an error of torch is about an input's shape, dtype or device, and not about memory or a GPU, say."""
    if type(error) is not RuntimeError or str(error).startswith("CUDA error"):
        return False
    return re.search("shape|size|dimension|type|device", str(error)) is not None


def with_article(kind: type) -> str:
    """The class's name for a message, such as "an Identity"."""
    name = {"Tensor": "tensor", "NoneType": "None"}.get(kind.__name__, kind.__name__)
    return name if name == "None" else f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _shown(value: Any) -> str:
    """The value for a message: numbers, strings and short sequences in full, tensors by shape, others by type."""
    if value is None or isinstance(value, (bool, int, float, complex)):
        return repr(value)
    if isinstance(value, str):
        return repr(value[:40])
    if isinstance(value, UninitializedTensorMixin):
        return "one without a shape yet"
    if isinstance(value, Tensor):
        layout = "" if value.layout is torch.strided else f" of layout {value.layout}"
        return "a nested one" if value.is_nested else f"a tensor {tuple(value.shape)}{layout}"
    short = isinstance(value, (list, tuple)) and len(value) <= 4
    return repr(value) if short and all(isinstance(v, (int, float, str)) for v in value) else type(value).__name__
