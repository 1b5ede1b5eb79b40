"""Objective, the base class of what a Trainer trains, and what objectives share: data and argument checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..checks import check_function, check_number, check_tensor
from ..dispatch import check_values
from ..flows.bijection import Bijection
from ..linearizer import Linearizer


class Objective(nn.Module):
    """A training task: a model, the random draw of a batch, and named loss terms.

    Attributes:
        model: the module that is trained, averaged and returned.
    """

    model: nn.Module

    def begin_step(self, progress: float) -> None:
        """Called before each step with the share of the steps done, in [0, 1); override it to change settings."""

    def draw(self, rng: torch.Generator, batch: int) -> dict[str, Tensor]:
        """The data and random numbers of one step for the whole batch, each [batch, ...], from ``rng`` alone."""
        raise NotImplementedError

    def forward(self, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss terms by name, each 0-d and a mean over the rows drawn; their sum is minimised."""
        raise NotImplementedError


class DataObjective(Objective):
    """A loss of a Linearizer, with its options, on data [N, ...] on the Linearizer's device.

    A subclass sets ``_loss``, a function that returns a NamedTuple of terms, and ``_optional``, the name of a term
    that is left out where the option of this name is 0.
    """

    _loss: Callable[..., Any]
    _optional: str
    model: Linearizer

    def __init__(self, f: Linearizer, data: Tensor, distance: object, **options: float) -> None:
        super().__init__()
        check_tensor("data", data, next(f.parameters(), None), "f", same_dtype=True)
        check_values("data", data)
        if data.ndim < 2 or not data.numel():
            raise ValueError(f"data must be [N, ...], and not empty; got {tuple(data.shape)}")
        if data[0].numel() != f.A.n_in:
            raise ValueError(f"data must have {f.A.n_in} numbers per row, as f.A takes; got {tuple(data.shape)}")
        if isinstance(f.g_x, Bijection):
            f.g_x._check("data", data, f.g_x.features)
        check_options(distance, **options)
        self.model, self.data, self.distance, self.options = f, data, distance, options

    def _rows(self, rng: torch.Generator, batch: int) -> Tensor:
        """The indices of ``batch`` rows of the data, drawn with replacement."""
        return torch.randint(len(self.data), (batch,), generator=rng, device=self.data.device)

    def forward(self, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        terms = self._loss(self.model, **drawn, **self.options, distance=self.distance)._asdict()
        if not self.options[self._optional]:
            del terms[self._optional]
        return terms


def no_such_term(terms: tuple[Tensor, ...], name: str) -> NoReturn:
    """Raise the AttributeError of a loss's terms; it names ``total`` to those who look for a tensor's attribute."""
    kind = type(terms).__name__
    advice = f": it holds the terms of a loss; use its total.{name}" if hasattr(Tensor, name) else ""
    raise AttributeError(f"{kind!r} object has no attribute {name!r}{advice}")


def check_batch(name: str, x: Tensor) -> None:
    """Raise unless x is a batch [B, ...] with at least one row."""
    check_tensor(name, x)
    if x.ndim < 2 or not len(x):
        raise ValueError(f"{name} must be [B, ...] and have at least one row; got {tuple(x.shape)}")


def check_given(of: str, x: Tensor, shape: torch.Size, **values: Tensor | None) -> None:
    """Raise unless each value, None aside, has this shape, and the dtype and device of x, the argument ``of``."""
    for name, value in values.items():
        if value is not None:
            check_tensor(name, value, x, of, same_dtype=True)
            if value.shape != shape:
                wanted = f"{tuple(shape)} for {of} {tuple(x.shape)}"
                raise ValueError(f"{name} must be {wanted}; got {tuple(value.shape)}")


def check_options(distance: object, **numbers: float) -> None:
    """Raise unless ``distance`` is a function and each of the numbers is finite and at least 0."""
    check_function("distance", distance)
    for name, value in numbers.items():
        check_number(name, value, 0.0)


def distance_of(distance: Callable[[Tensor, Tensor], Tensor], output: Tensor, target: Tensor) -> Tensor:
    """``distance(output, target)``; ValueError unless it is a 0-d tensor."""
    value = distance(output, target)
    if not isinstance(value, Tensor) or value.ndim:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"distance must return a 0-d tensor, a mean over the rows; got {got}")
    return value
