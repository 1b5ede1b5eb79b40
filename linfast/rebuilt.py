"""Whether a model is what its file would say: ``save`` refuses one that ``load`` would make into another."""

from __future__ import annotations

from typing import Any

from torch import nn

from .state import slots

__all__ = ["check_rebuilt"]

_ADVICE = (
    "a file says how a model is constructed: undo what was changed since (parametrizations, pruning, spectral or "
    "weight norms, parts that were added or exchanged), or register a class that constructs it so"
)
_HOOKS = {
    "_forward_hooks": "a forward hook",
    "_forward_pre_hooks": "a forward pre-hook",
    "forward": "a forward of its own",
}


def check_rebuilt(model: nn.Module, built: nn.Module) -> None:
    """Raise where a model has other modules, tensors, settings or hooks than the one built from its description.

    Raises:
        TypeError: naming the module, and what to do.
    """
    for path, module in model.named_modules():
        what = f"{type(module).__name__}{f' at {path}' if path else ''}"
        for name, thing in _HOOKS.items():
            if found := vars(module).get(name):
                kinds = {type(hook).__name__ for hook in found.values()} if isinstance(found, dict) else {"forward"}
                raise TypeError(
                    f"cannot save {what}: it has {thing} ({', '.join(kinds)}), which no file holds; remove it"
                )
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise TypeError(f"cannot save {what}: it keeps an extra state; make it of parameters and buffers")
    mine, theirs = _parts(model), _parts(built) | _settings(built)
    mine |= {name: value for name, value in _settings(model).items() if name in theirs}  # others are notes
    for name in [*mine, *theirs]:
        if mine.get(name) != theirs.get(name):
            raise TypeError(
                f"cannot save a {type(model).__name__}: {name} is {mine.get(name, 'missing')} and would be "
                f"{theirs.get(name, 'missing')} in the loaded one; {_ADVICE}"
            )


def _parts(model: nn.Module) -> dict[str, str]:
    """Of each module its class; of each tensor if it is trained."""
    classes = {path or "the model": f"a {type(module).__name__}" for path, module in model.named_modules()}
    return classes | {key: f"a {'parameter' if slot.trained else 'buffer'}" for key, slot in slots(model).items()}


def _settings(model: nn.Module) -> dict[str, str]:
    """The settings of torch's and linfast's modules."""
    return {
        f"{path}.{name}" if path else name: repr(value)
        for path, module in model.named_modules()
        if type(module).__module__.partition(".")[0] in ("torch", "linfast")
        for name, value in vars(module).items()
        if _is_setting(name, value)
    }


def _is_setting(name: str, value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_setting(name, item) for item in value)
    plain = value is None or isinstance(value, (bool, int, float, str))
    return plain and not name.startswith("_") and name not in ("training", "truncation_error")
