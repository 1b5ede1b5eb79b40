"""Modules that hold a torch.distributions distribution, the base of a Density.

A distribution is no module: its tensors would stay behind where a model moves to another device or dtype. For the
distributions listed here, ``FixedBase`` keeps the arguments as buffers, which move and are saved with the model.
``OtherBase`` keeps any other distribution as it is, and moves its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from .checks import check_choice, check_kind

# The arguments of each constructor, which are attributes of the distribution as well.
_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "Normal": ("loc", "scale"),
    "Laplace": ("loc", "scale"),
    "Cauchy": ("loc", "scale"),
    "StudentT": ("df", "loc", "scale"),
    "Uniform": ("low", "high"),
    "Beta": ("concentration1", "concentration0"),
    "Gamma": ("concentration", "rate"),
    "Exponential": ("rate",),
    "VonMises": ("loc", "concentration"),
    "MultivariateNormal": ("loc", "scale_tril"),
    "LowRankMultivariateNormal": ("loc", "cov_factor", "cov_diag"),
    "Categorical": ("logits",),
    "Independent": ("base_distribution", "reinterpreted_batch_ndims"),
    "MixtureSameFamily": ("mixture_distribution", "component_distribution"),
}
_ATTRIBUTES = {
    "base_distribution": "base_dist",
    "mixture_distribution": "_mixture_distribution",
    "component_distribution": "_component_distribution",
}  # where the attribute has another name


class FixedBase(nn.Module):
    """A torch.distributions distribution with fixed arguments; its ``forward()`` returns the distribution.

    Args:
        kind: the name of the class, one of those listed in this file.
        arguments: of its constructor: tensors, which become buffers, numbers, or FixedBases for distributions.
    """

    def __init__(self, kind: str, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.kind = check_choice("kind", kind, tuple(_ARGUMENTS))
        check_kind("arguments", arguments, Mapping)
        if set(arguments) != set(_ARGUMENTS[kind]):
            raise ValueError(f"arguments of a {kind} are {', '.join(_ARGUMENTS[kind])}; got {list(arguments)}")
        for name, value in arguments.items():
            check_kind(f"arguments[{name!r}]", value, (Tensor, FixedBase, int))
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    @property
    def arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _ARGUMENTS[self.kind]}

    def forward(self) -> Distribution:
        values = {name: v() if isinstance(v, FixedBase) else v for name, v in self.arguments.items()}
        return getattr(torch.distributions, self.kind)(**values, validate_args=False)

    def extra_repr(self) -> str:
        return self.kind


class OtherBase(nn.Module):
    """A distribution of another class. It moves with the module, but it is neither saved nor in the state_dict."""

    def __init__(self, distribution: Distribution) -> None:
        super().__init__()
        self.distribution = distribution

    def forward(self) -> Distribution:
        return self.distribution

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OtherBase:
        super()._apply(fn, recurse)
        self.distribution = _mapped(self.distribution, fn)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> OtherBase:
        return OtherBase(
            _mapped(self.distribution, torch.clone)
        )  # deepcopy of an inverse transform loses its inverse

    def extra_repr(self) -> str:
        return type(self.distribution).__name__


def kept(base: Distribution) -> nn.Module:
    """A module whose ``forward()`` returns this distribution; ValueError where its tensors require a gradient."""
    tensors: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    _mapped(base, collect)
    if any(tensor.requires_grad for tensor in tensors):
        raise ValueError(
            f"base, a {type(base).__name__}, has tensors that require a gradient, and it is not a module: give a "
            "torch.nn.Module with these parameters, whose forward() returns the distribution"
        )
    fixed = _fixed(base)
    return OtherBase(base) if fixed is None else fixed


def full_shape(base: Distribution) -> tuple[int, ...]:
    """The shape of one sample of the distribution."""
    return (*base.batch_shape, *base.event_shape)


def _fixed(base: Distribution) -> FixedBase | None:
    kind = type(base).__name__
    if kind not in _ARGUMENTS or type(base) is not getattr(torch.distributions, kind):
        return None
    arguments = {name: getattr(base, _ATTRIBUTES.get(name, name)) for name in _ARGUMENTS[kind]}
    for name, value in arguments.items():
        if isinstance(value, Distribution):
            arguments[name] = value = _fixed(value)
        elif isinstance(value, Tensor):
            arguments[name] = value.detach().clone()
        if value is None:
            return None
    return FixedBase(kind, arguments)


def _mapped(value: Any, fn: Callable[[Tensor], Tensor], known: dict[int, Any] | None = None) -> Any:
    """The value with ``fn`` of each tensor that a distribution, a transform or a list in it holds."""
    known = {} if known is None else known  # an inverse transform and its inverse refer to each other
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(item, fn, known) for item in value)
    if isinstance(value, (Distribution, Transform)) and id(value) not in known:
        known[id(value)] = changed = object.__new__(type(value))  # copy.copy would lose the inverse
        vars(changed).update({name: _mapped(item, fn, known) for name, item in vars(value).items()})
    return known.get(id(value), value)
