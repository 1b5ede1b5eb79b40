"""The results of a run on machine code, as a table and as docs/machine_code.md."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from linfast.bench.environment import describe

from linfast.tables import aligned

__all__ = ["document", "table"]

Results = Mapping[str, Sequence[Mapping[str, Any]]]
_HEADINGS = ("op", "mode", "direction", "target", "variants", "fp32", "fp16", "bf16", "failed")


def _rows(results: Results) -> list[tuple[str, ...]]:
    """For each op, mode, direction and target: the largest error over its allowance by dtype, and failures."""
    groups: dict[tuple[str, str, str, str], list[Mapping[str, Any]]] = {}
    for target, found in results.items():
        for each in found:
            groups.setdefault((each["op"], each["mode"], each["direction"], target), []).append(each)
    rows = []
    for key, group in sorted(groups.items()):
        worst = [max((e["margin"] for e in group if e["dtype"] == d), default=None) for d in _HEADINGS[5:8]]
        failed = sum(e["margin"] > 1 or bool(e["reports"]) for e in group)
        margins = ("" if margin is None else f"{margin:.2f}" for margin in worst)
        rows.append((*key, str(len(group)), *margins, str(failed or "")))
    return rows


def table(results: Results) -> str:
    """The table in aligned columns."""
    return aligned([_HEADINGS, *_rows(results)], numeric=4, rule=True)


def document(results: Results, arguments: Sequence[str]) -> str:
    """docs/machine_code.md."""
    about = describe(torch.device("cpu"))
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "triton", "numpy", "python"))
    failures = [
        "; ".join((f"- {target} {each['name']}: {each['margin']:.2f}", *map(_first_line, each["reports"])))
        for target, found in results.items()
        for each in found
        if each["margin"] > 1 or each["reports"]
    ]
    lines = ["| " + " | ".join(row) + " |" for row in (_HEADINGS, ("---",) * len(_HEADINGS), *_rows(results))]
    return f"""# The kernels' machine code

The PTX of each op for sm_80 and sm_90, as Triton compiles it, runs on a CPU and is compared with float64.
Sanitizers report accesses outside tensors, reads of unwritten memory and races. An entry is the largest error of an
output or gradient divided by its allowance for rounding ([testing.md](testing.md)), by dtype of the input. An entry
above 1 is a failure, and so is a report of a sanitizer.

`python -m tests.machine_code {shlex.join(arguments)}`

Commit {about["commit"]}, {about["date"]}, {about["device"]}, {versions}.

{chr(10).join(lines)}

{chr(10).join(["Failed:", "", *failures]) if failures else "Nothing failed, and no sanitizer reported anything."}
"""


def _first_line(report: str) -> str:
    return report.partition("\n")[0]
