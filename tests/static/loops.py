"""The loops of a compiled kernel: what an iteration issues, and how often it runs.

``python -m tests.static.loops coupling_stack --target sm_90 --triton 3.6.0`` prints the loops of every launch of an
op (a function of tests/static/calls.py). A loop is the code between a branch backwards and its target. The line of
the branch is that of the Python loop, whose bounds, where they are constants of the launch, give the number of
iterations. Iterations that the compiler moved out of an inner loop count where they are: once in the outer one.

All counts are of one warp. A loop over layers that issues n instructions, inner loops with all their iterations,
takes

    n num_warps / ROWS     warp instructions per row of x and layer;

a warp instruction is one instruction of a warp, of which a scheduler issues one per clock.
"""

from __future__ import annotations

import argparse
import ast
import linecache
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_SOURCE = re.compile(r'\s*//## File "(?P<file>[^"]+)", line (?P<line>\d+)')
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?P<if>@!?\w+\s+)?(?P<name>[\w.]+)(?P<operands>[^;]*)")
_KINDS = {
    "mufu": r"MUFU\b",
    "matrix": r"(HGMMA|HMMA|UTCHMMA)\b",
    "wgmma": r"HGMMA\b",
    "copies": r"(LDGSTS|UTMALDG)\b",
    "loads": r"LDG\b",
    "shared": r"(LDS|LDSM|STS|STSM)\b",
    "local": r"(LDL|STL)\b",
}
COUNTS = ("instructions", *_KINDS, "products", "bytes", "shared_bytes")


@dataclass
class Loop:
    """A loop, or with no source the whole kernel.

    Args:
        source: the text of the Python loop.
        trips: its iterations; None where they are not constant.
        own: counts (COUNTS) of an iteration without its inner loops. products: multiply-adds on matrix units, a
            warp's share. bytes: asked of global memory by a thread, conditions taken as true. shared_bytes: read
            and written in shared memory by a thread; matrix units read it besides.
        inner: the loops in it.
        beside: instructions after the first asynchronous copy, up to an inner loop, which run while it is under
            way; and those of the iterations whose copies a wait leaves under way.
    """

    source: str
    trips: int | None
    own: Counter[str] = field(default_factory=Counter)
    inner: list[Loop] = field(default_factory=list)
    beside: int = 0

    def total(self) -> Counter[str]:
        """Counts of one iteration with all iterations of the inner loops.

        Raises:
            ValueError: the iterations of an inner loop are not constant.
        """
        total = Counter(self.own)
        for loop in self.inner:
            if loop.trips is None:
                raise ValueError(f"the iterations of {loop.source!r} are not constant")
            for name, n in loop.total().items():
                total[name] += n * loop.trips
        return total

    def walk(self, depth: int = 0) -> Iterator[tuple[int, Loop]]:
        """(depth, loop): this one and all in it, in the order of the code."""
        yield depth, self
        for loop in self.inner:
            yield from loop.walk(depth + 1)

    def plain(self) -> dict[str, Any]:
        """As JSON; ``loop_of`` reads it."""
        return {**vars(self), "own": dict(self.own), "inner": [loop.plain() for loop in self.inner]}


def loop_of(plain: Mapping[str, Any]) -> Loop:
    inner = [loop_of(each) for each in plain["inner"]]
    return Loop(plain["source"], plain["trips"], Counter(plain["own"]), inner, plain["beside"])


def loops(sass: str, constants: Mapping[str, Any]) -> Loop:
    """The kernel and its loops, from the output of ``nvdisasm -c -g`` and the constants of its launch."""
    counts: list[Counter[str]] = []
    labels: dict[str, int] = {}
    ends: dict[int, tuple[int, str]] = {}
    source = ""
    for line in sass.splitlines():
        if match := _SOURCE.match(line):
            source = linecache.getline(match["file"], int(match["line"])).strip()
        elif match := re.match(r"(\.L_x_\d+):", line):
            labels[match[1]] = len(counts)
        elif match := _INSTRUCTION.match(line):
            start = _branch_target(match, labels)
            if start is not None and start < len(counts):  # not the endless loop after a kernel's end
                ends[start] = (len(counts), source)
            counts.append(_counts(match["name"], match["operands"], (match["if"] or "").startswith("@!PT")))
    kernel = Loop("", 1)
    _fill(kernel, 0, len(counts), counts, ends, constants)
    return kernel


def _branch_target(match: re.Match[str], labels: Mapping[str, int]) -> int | None:
    """Where a branch backwards leads."""
    target = re.search(r"`\((\.L_x_\d+)\)", match["operands"])
    return labels.get(target[1]) if target and match["name"].split(".")[0] == "BRA" else None


def _fill(
    loop: Loop, start: int, end: int, counts: list[Counter[str]], ends: Mapping[int, tuple[int, str]],
    constants: Mapping[str, Any],
) -> None:  # fmt: skip
    """Sort the instructions from ``start`` up to ``end`` into this loop and those in it."""
    at = start
    while at < end:
        if at in ends and (at, ends[at][0] + 1) != (start, end):
            last, source = ends[at]
            inner = Loop(source, _trips(source, constants))
            _fill(inner, at, last + 1, counts, ends, constants)
            loop.inner.append(inner)
            at = last + 1
        else:
            loop.beside += loop.own["copies"] > 0 and not loop.inner
            loop.own.update(counts[at])
            at += 1
    ahead = loop.own.pop("left", 0) // max(loop.own.pop("groups", 0), 1)  # iterations
    loop.beside += ahead * loop.own["instructions"] if loop.own["copies"] else 0


def _counts(name: str, operands: str, never: bool) -> Counter[str]:
    """Of one instruction; one that is ``never`` executed is issued all the same."""
    counts = Counter({"instructions": 1})
    if never:
        return counts
    counts.update(kind for kind, pattern in _KINDS.items() if re.match(pattern, name))
    if shape := re.match(r"HMMA\.16(8)(\d+)\b", name):
        counts["products"] = 16 * math.prod(map(int, shape.groups()))
    elif shape := re.match(r"HGMMA\.64x(\d+)x(\d+)\b", name):  # of four warps
        counts["products"] = 64 // 4 * math.prod(map(int, shape.groups()))
    if re.match(r"LDG(STS)?\b", name):
        counts["bytes"] = _width(name)
    if counts["shared"]:
        counts["shared_bytes"] = _width(name)
    if match := re.search(r"SB0, 0x([0-9a-f]+)", operands) if name == "DEPBAR.LE" else None:
        counts["left"] = int(match[1], 16)  # groups of copies that a wait leaves under way
    counts["groups"] = int(name == "LDGDEPBAR")
    return counts


def _width(name: str) -> int:
    """The bytes that a thread reads or writes."""
    if match := re.search(r"\.M88(?:\.([24]))?$", name):  # one to four matrices of 8 x 8 values of 16 bits
        return 4 * int(match[1] or 1)
    width = re.search(r"\.(128|64|[US]16|[US]8)\b", name)
    return int(width[1].strip("US")) // 8 if width else 4


def _trips(source: str, constants: Mapping[str, Any]) -> int | None:
    """The iterations of ``for i in tl.range(...)``."""
    try:
        match ast.parse(f"{source} pass").body:
            case [ast.For(iter=ast.Call(args=bounds))]:
                return len(range(*(eval(ast.unparse(bound), {}, dict(constants)) for bound in bounds)))
    except (SyntaxError, NameError):
        pass
    return None


def rows(kernel: Loop) -> Iterable[tuple[str, ...]]:
    """Lines of a table: each loop's source, iterations and counts of an iteration without its inner loops."""
    for depth, loop in kernel.walk():
        trips = "n" if loop.trips is None else str(loop.trips)
        counts = (str(loop.own[name]) for name in COUNTS)
        yield "  " * depth + (loop.source or "kernel"), trips, *counts, str(loop.beside)


def main() -> None:
    from linfast.tables import aligned
    from tests.static import table

    parser = argparse.ArgumentParser(prog="python -m tests.static.loops", description=__doc__)
    parser.add_argument("op", nargs="+", help="functions of tests/static/calls.py")
    parser.add_argument("--target", action="append", help="sm_80, sm_90, sm_100")
    parser.add_argument("--triton", choices=table.VERSIONS)
    parser.add_argument("--match", default="", help="only launches whose kernel and call match this expression")
    chosen = parser.parse_args()
    targets = chosen.target or ["sm_90"]
    for launch in table.launches(*chosen.op):
        if launch.target in targets and re.search(chosen.match, f"{launch.kernel} {launch.call}"):
            reading = table.readings([launch], chosen.triton)[0]
            kernel = loop_of(reading["loops"])
            print(f"{launch.kernel}, {launch.call}, {launch.target}:", end=" ")
            print(", ".join(f"{name} {reading[name]}" for name in ("registers", "spills", "shared")), end=", ")
            print(f"{launch.options.get('num_warps', 4)} warps, ROWS {launch.constants.get('ROWS')}")
            print(aligned([("loop", "trips", *COUNTS, "beside"), *rows(kernel)]), flush=True)
            print(per_row_and_layer(kernel, launch.constants, launch.options) or "", "\n")


def per_row_and_layer(kernel: Loop, constants: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """Of each loop over n_layers."""
    rows = constants.get("ROWS")
    layers = [loop for _, loop in kernel.walk() if "n_layers" in loop.source]
    if not rows or not layers:
        return ""
    share = options.get("num_warps", 4) / rows
    said = []
    for loop in layers:
        total = loop.total()
        said.append(", ".join(f"{name} {total[name] * share:.4g}" for name in COUNTS))
    return "warp instructions per row and layer: " + "; ".join(said)


if __name__ == "__main__":
    main()
