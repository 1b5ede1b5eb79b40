"""Maps: the invertible classes of a library other than couplings; ``listed``: the members of its chains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .identity import changed_method, defined_as, original_class
from .sides import Affine, Index

Flat = Callable[[Any], Iterator[tuple[str, nn.Module]]]


@dataclass(frozen=True)
class Maps:
    """The invertible classes of one or several libraries, other than couplings.

    Args:
        library: names of the packages that define the classes.
        methods: names of the methods and properties that must be unmodified in the classes that have them.
        of: {class name: module -> its permutation or affine map of vectors, or None to run the library's own code}.
        others: names of the classes that always run by the library's own code.
        initialises: whether a module's next call may set its parameters from the batch, as an ActNorm's first does.
    """

    library: tuple[str, ...]
    methods: tuple[str, ...]
    of: Mapping[str, Callable[[Any], Index | Affine | None]]
    others: tuple[str, ...] = ()
    initialises: Callable[[Any], bool] = lambda module: False

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.of, *self.others)

    def known(self, module: nn.Module) -> bool:
        """Whether the module is of one of these classes, with unmodified methods."""
        cls = original_class(module)
        found = cls.__qualname__ in self.names and cls.__module__.partition(".")[0] in self.library
        return found and changed_method(module, [name for name in self.methods if hasattr(cls, name)]) is None

    def rows_apart(self, modules: Iterable[nn.Module]) -> bool:
        """Whether no row that the next call of these modules gets changes the result of another."""
        return all(self.known(module) and not self.initialises(module) for module in modules)


NO_MAPS = Maps((), (), {})


def listed(attribute: str, *nested: tuple[str, str]) -> Flat:
    """A Flat: the members in a chain's list ``attribute``, and those of chains of the ``nested`` classes in it."""

    def flat(chain: Any, where: str = "") -> Iterator[tuple[str, nn.Module]]:
        for i, member in enumerate(getattr(chain, attribute)):
            name = f"{where}{attribute}[{i}]"
            if nested and any(defined_as(member, *cls) for cls in nested):
                yield from flat(member, f"{name}.")
            else:
                yield name, member

    return flat
