"""``linfast bench --profile DIR``: a Chrome trace per case, and the time of each provider by kernel.

DIR/NAME.trace.json.gz opens in https://ui.perfetto.dev or chrome://tracing. DIR/kernels.txt lists the kernels of
each provider by time; on a CPU it lists operators. Named ranges are on: see docs/profiling.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from linfast.ranges import ranges

from .cases import CASES, sizes
from .harness import Case, Options, Problem, Provider, Size

CALLS = 3  # that are profiled, after as many for warm-up
MOST_ROWS = 8


def run_profile(args: argparse.Namespace) -> int:
    """Profile the first size of every case in ``args.case``; returns 0."""
    folder = Path(args.profile)
    folder.mkdir(parents=True, exist_ok=True)
    summaries = []
    for name in args.case:
        for size in sizes(CASES[name], args)[:1]:
            summaries.append(_profile_case(CASES[name], size, Options(args.device, args.compile), folder))
            (folder / "kernels.txt").write_text("\n\n".join(summaries) + "\n", encoding="utf-8")
            print(summaries[-1], end="\n\n", flush=True)
    return 0


def _profile_case(case: Case, size: Size, options: Options, folder: Path) -> str:
    problem, kind = case.build(size, options), options.device.type
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if kind == "cuda" else [])]
    for provider in problem.providers:
        _call(problem, provider)
    with ranges(), profile(activities=activities) as whole:
        for provider in problem.providers:
            with record_function(provider.name):
                _call(problem, provider)
    whole.export_chrome_trace(str(folder / f"{case.name}.trace.json.gz"))
    parts = [f"{case.name} {' '.join(f'{key}={value}' for key, value in size.items())}: {CALLS} calls"]
    for provider in problem.providers:  # one at a time: a trace does not say who launched a kernel
        with profile(activities=activities) as one:
            _call(problem, provider)
        table = one.key_averages().table(f"self_{kind}_time_total", row_limit=MOST_ROWS, max_name_column_width=72)
        parts.append(f"{provider.name}\n{table}")
    return "\n".join(parts)


def _call(problem: Problem, provider: Provider) -> None:
    for i in range(CALLS):
        provider.call(*problem.inputs[i % len(problem.inputs)])
    if problem.device.type == "cuda":
        torch.cuda.synchronize()
