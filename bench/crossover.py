"""Where a provider starts to win: along each axis, the size from which on it beats the baseline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .harness import Result

__all__ = ["Crossover", "crossovers"]

MARGIN = 0.97  # a ratio above this is no win: two runs of one program differ by a few per cent


@dataclass(frozen=True)
class Crossover:
    """``at``: the first value of ``axis`` from which on every ratio is below ``MARGIN``; None where it loses at
    the largest. ``ratio``: time over the baseline's at the largest value. ``base``: what is the same."""

    case: str
    provider: str
    baseline: str
    base: tuple[tuple[str, int | str], ...]
    axis: str
    values: tuple[int, ...]
    at: int | None
    ratio: float

    def __str__(self) -> str:
        fixed = " ".join(f"{key}={value}" for key, value in self.base)
        largest = f"{self.ratio:.2f}x its time at {self.values[-1]}"
        where = (
            f"from {self.axis} = {self.at} on" if self.at is not None else f"not by {self.axis} = {self.values[-1]}"
        )
        return f"{self.case} ({fixed}): {self.provider} beats {self.baseline} {where}; {largest}"


def crossovers(results: Sequence[Result]) -> list[Crossover]:
    """One for every case, provider and axis along which at least two sizes were timed."""
    return [crossover for group in _groups(results) for crossover in [_crossover(*group)]]


def _groups(results: Sequence[Result]) -> Iterator[tuple[str, list[Result]]]:
    """(axis, results along it in order), of one case and provider, all else equal."""
    groups: dict[tuple[object, ...], dict[int, Result]] = {}
    for result in results:
        for axis, value in result.size.items():
            if isinstance(value, int) and not result.baseline and result.ratio is not None:
                rest = tuple(pair for pair in result.size.items() if pair[0] != axis)
                groups.setdefault((result.case, result.provider, rest, axis), {})[value] = result
    for key, by_value in groups.items():
        if len(by_value) > 1:
            yield str(key[-1]), [by_value[value] for value in sorted(by_value)]


def _crossover(axis: str, along: list[Result]) -> Crossover:
    values = tuple(int(result.size[axis]) for result in along)
    ratios = [result.ratio for result in along if result.ratio is not None]
    losses = [i for i, ratio in enumerate(ratios) if ratio >= MARGIN]
    first = losses[-1] + 1 if losses else 0
    return Crossover(
        case=along[0].case,
        provider=along[0].provider,
        baseline=along[0].against,
        base=tuple(pair for pair in along[0].size.items() if pair[0] != axis),
        axis=axis,
        values=values,
        at=values[first] if first < len(values) else None,
        ratio=ratios[-1],
    )
