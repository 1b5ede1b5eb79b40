"""``linfast bench --profile DIR``: a Chrome trace a case, and where its time goes, kernel by kernel.

DIR/NAME.trace.json.gz opens in https://ui.perfetto.dev or chrome://tracing. DIR/kernels.txt
has the kernels (on a CPU: operators) of each provider by time. Ranges are on: see docs/profiling.md.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from linfast.ranges import ranges
from linfast.tables import aligned

from .cases import CASES
from .harness import Case, Options, Problem, Provider, Size
from .report import number
from .run import sizes

__all__ = ["run_profile"]

CALLS = 3  # profiled, after as many that are not
MOST_ROWS = 8

Profile = profile


def run_profile(args: argparse.Namespace) -> int:
    """The first size of every case asked for."""
    folder = Path(args.profile)
    folder.mkdir(parents=True, exist_ok=True)
    summaries = []
    for name in args.case:
        for size in sizes(CASES[name], args.sizes, args.batch)[:1]:
            text = _profile_case(CASES[name], size, Options(args.device, args.compile), folder)
            summaries.append(text)
            (folder / "kernels.txt").write_text("\n\n".join(summaries) + "\n", encoding="utf-8")
            print(text, end="\n\n", flush=True)
    return 0


def _profile_case(case: Case, size: Size, options: Options, folder: Path) -> str:
    problem = case.build(size, options)
    cuda = options.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    sections = []
    for provider in problem.providers:
        _call(problem, provider, cuda)
    with ranges(), profile(activities=activities) as whole:
        for provider in problem.providers:
            with record_function(provider.name):
                _call(problem, provider, cuda)
    whole.export_chrome_trace(str(folder / f"{case.name}.trace.json.gz"))
    for provider in problem.providers:  # apart from each other: a kernel does not say who launched it
        with profile(activities=activities) as one:
            _call(problem, provider, cuda)
        sections.append(f"  {provider.name}\n{_summary(one, cuda)}")
    about = " ".join(f"{key}={value}" for key, value in size.items())
    return "\n".join([f"{case.name} {about}: microseconds a call, mean of {CALLS}", *sections])


def _call(problem: Problem, provider: Provider, cuda: bool) -> None:
    for i in range(CALLS):
        provider.call(*problem.inputs[i % len(problem.inputs)])
    if cuda:
        torch.cuda.synchronize()


def _summary(one: Profile, cuda: bool) -> str:
    """The kernels, or a CPU's operators, that took longest by themselves, and their share of the whole."""
    times: dict[str, list[float]] = defaultdict(list)
    for event in one.events() or []:
        if cuda and event.device_type == DeviceType.CUDA:
            times[event.name].append(event.device_time_total)
        elif not cuda:
            times[event.name].append(event.self_cpu_time_total)
    total = sum(map(sum, times.values())) or 1.0
    ordered = sorted(times.items(), key=lambda pair: -sum(pair[1]))[:MOST_ROWS]
    rows = [_row(name, values, total) for name, values in ordered]
    return _indent(aligned([["", "kernel" if cuda else "operator", "us", "%", "launches"], *rows], 2))


def _row(name: str, values: Sequence[float], total: float) -> list[str]:
    share = f"{100 * sum(values) / total:.0f}"
    return ["", name[:72], number(sum(values) / CALLS), share, f"{len(values) / CALLS:.0f}"]


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
