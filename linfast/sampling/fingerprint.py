"""The digest by which a file of samples knows its model: of all that ``linfast.save`` would write of it.

Every argument of every constructor and every tensor count, and the settings of registered classes; the code of a
registered class counts by its name. The device, the train mode and ``requires_grad`` do not count: they do not
change what is sampled.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from typing import Any

import torch
from torch import Tensor, nn

from ..io import described
from ..state import is_foreign, settings, slots

__all__ = ["digest", "fingerprint"]


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the model; of one that ``save`` cannot describe, a text that no other call returns."""
    model = getattr(model, "_orig_mod", model)  # compiled or not
    try:
        architecture = json.loads(described(model)[0])["architecture"]
    except (TypeError, ValueError, AttributeError, RecursionError) as reason:
        return f"{secrets.token_hex(8)}, cannot be told from another model, for no file can describe it: {reason}"
    kept = sorted(pair for module in model.modules() if is_foreign(module) for pair in settings(module))
    tensors = {name: slot.tensor for name, slot in sorted(slots(model).items())}
    return digest([json.dumps(architecture, sort_keys=True), kept, tensors])


def digest(value: Any) -> str:
    """SHA-256 of tensors, numbers, strings and None, and of lists, tuples and dictionaries of them.

    Raises:
        TypeError: anything else.
    """
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        found = hashlib.sha256(f"tensor {plain.dtype} {tuple(plain.shape)} ".encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else b"")
        return found.hexdigest()
    if isinstance(value, (dict, list, tuple)):
        kind, items = ("dict", [*value.items()]) if isinstance(value, dict) else ("list", value)
        return hashlib.sha256(" ".join((kind, *map(digest, items))).encode()).hexdigest()
    if value is not None and not isinstance(value, (bool, int, float, complex, str, bytes)):
        raise TypeError(f"a {type(value).__name__} cannot be told from another")
    return hashlib.sha256(f"{type(value).__name__} {value!r}".encode()).hexdigest()
