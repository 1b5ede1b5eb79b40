"""Modules that hold a torch.distributions distribution, the base of a Density.

A distribution is no module: its tensors would stay behind where a model moves to another device or dtype. For the
distributions listed here, ``FixedBase`` keeps the arguments as buffers, which move and are saved with the model.
``OtherBase`` keeps any other distribution as it is, and moves its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, constraints

from .checks import check_choice, check_kind

# The arguments of each constructor, which are attributes of the distribution as well.
_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "Normal": ("loc", "scale"),
    "Laplace": ("loc", "scale"),
    "Cauchy": ("loc", "scale"),
    "StudentT": ("df", "loc", "scale"),
    "Uniform": ("low", "high"),
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

    def forward(self, dtype: torch.dtype | None = None) -> Distribution:
        """The distribution; ``dtype``: that of its arguments, by default as they are kept."""
        values = {}
        for name, value in self.arguments.items():
            values[name] = value(dtype) if isinstance(value, FixedBase) else value
            if dtype is not None and isinstance(value, Tensor):
                values[name] = value.to(dtype)
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
        # copy.deepcopy of an inverse transform would lose what it is the inverse of.
        return OtherBase(_mapped(self.distribution, torch.clone))

    def __repr__(self) -> str:
        return f"a base of class {type(self.distribution).__name__}"


def kept(base: Distribution) -> nn.Module:
    """A module whose ``forward()`` returns this distribution.

    ValueError where it is discrete, or has tensors that require a gradient.
    """
    if base.support is not None and base.support.is_discrete:
        raise ValueError(f"base must be a distribution of real numbers; got a {type(base).__name__}")
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


def check_fits(base: Any, shape: Sequence[int]) -> None:
    """Raise unless ``base`` is a distribution over one z of this shape, or over each of its values."""
    if not isinstance(base, Distribution):
        raise TypeError(f"base must return a torch.distributions distribution; got a {type(base).__name__}")
    full, event = (*base.batch_shape, *base.event_shape), len(base.event_shape)
    same_event = event == 0 or tuple(base.event_shape) == tuple(shape[len(shape) - event :])
    same_batch = all(mine in (1, theirs) for mine, theirs in zip(full[::-1], tuple(shape)[::-1], strict=False))
    if len(full) > len(shape) or not same_event or not same_batch:
        raise ValueError(f"base is over values of shape {full}, and one z has shape {tuple(shape)}")


def log_density(base: Distribution, z: Tensor) -> Tensor:
    """``base.log_prob(z)``; minus infinity outside the support, also where the distribution does not look."""
    values, support = base.log_prob(z), base.support
    of_one_value = support
    while isinstance(of_one_value, constraints.independent):
        of_one_value = of_one_value.base_constraint
    if support is None or of_one_value is constraints.real:
        return values
    return torch.where(support.check(z), values, -torch.inf)


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
