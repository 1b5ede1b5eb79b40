"""``bench/gpu.sh``: run every stage until its time limit, even where the previous stage failed."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from .report import Entry, Report, record
from .runner import run_jobs
from .stages import FILES, MOST_GIB, Given, Machine, Stage, plan

ROOT = Path(__file__).resolve().parents[2]
# Where linfast is not installed, linfast.kernels, .bench and .examples exist only through these links.
FOLDERS = ("kernels", "bench", "examples")
LINKS = {ROOT / "linfast" / name: Path("..") / name for name in FOLDERS}
DRY_PATIENCE = 10  # a CPU may be slow or busy: there limits are so many times as long
MISSING = {
    **dict.fromkeys(("torch", "numpy", "safetensors"), "nothing runs"),
    "triton": "no kernel runs",
    "pytest": "no tests",
    "pytest_timeout": "no test has a limit of its own",
    "xdist": "the tests run in one process",
    **dict.fromkeys(("normflows", "nflows", "zuko", "FrEIA", "glasflow", "memcnn"), "not timed beside ours"),
}


class Call:
    """One run of the stages. ``given`` is the input of the next stage's jobs."""

    def __init__(self, out: Path, dry: bool, work: Path) -> None:
        self.report = Report(out, [name for name in FILES if name not in ("summary.txt", "trace.json.gz")])
        self.dry, self.given = dry, Given(Machine(), {}, out, work)

    def run(self, stage: Stage) -> None:
        """Run the stage until its limit; an error in this script ends only that stage."""
        entry = self.report.entries[stage.name] = Entry(self.report.seconds())
        self.report.write()
        try:
            entry.status = self._run(stage, entry)
        except Exception as error:
            entry.status = f"FAILED: {type(error).__name__}: {error}"
        self.report.write()

    def _run(self, stage: Stage, entry: Entry) -> str:
        machine, report = self.given.machine, self.report
        if stage.problem:
            report.problem(stage.problem)
        at_once = machine.at_once(stage.most)
        self.given = replace(self.given, share=machine.share(at_once))
        jobs = stage.jobs(self.given) if machine.cases or stage.name == "environment" else []
        if not jobs:
            return "nothing to do here" if machine.cases else "nothing to do: the environment is not known"
        patience = DRY_PATIENCE if self.dry else 1
        seconds = patience * stage.until - report.seconds()
        jobs = [replace(job, limit=patience * job.limit) for job in jobs]
        failed = run_jobs(jobs, at_once, seconds, lambda line: self._take(stage, line, entry), report.write)
        took = f"{report.seconds() - entry.start:.0f} s"
        reasons = {why: [name for name in failed if failed[name] == why] for why in failed.values()}
        told = "; ".join(f"{why}: {', '.join(names)}" for why, names in reasons.items())
        return f"FAILED, {took} ({told})" if failed else f"ok, {took}"

    def _take(self, stage: Stage, line: str, entry: Entry) -> None:
        """Write a line of the stage's output to the file it belongs in, and count it in the summary."""
        found = record(line) or {}
        if "probe" in found:
            self.given = replace(self.given, machine=Machine(**found["probe"]))
        elif stage.name == "table":
            self.report.tail += line
        else:
            self.report.append("results.jsonl" if "provider" in found else stage.log, line)
            entry.take(stage.name, line)

    def run_all(self, stages: Sequence[Stage], only: Sequence[str] | None) -> None:
        """Run the first stage, which describes the machine, and the stages that were asked for."""
        report, names = self.report, [stage.name for stage in stages]
        for name, costs in MISSING.items():
            if find_spec(name) is None:
                report.problem(f"missing: {name} ({costs})")
        for name in only or ():
            if name not in names:
                report.problem(f"unknown stage: {name!r}; there are {', '.join(names)}")
        self.run(stages[0])
        report.title = self._title()
        for stage in stages[1:]:
            if only is None or stage.name in only:
                self.run(stage)
        trace = self.given.work / "profile" / "coupling_flow.trace.json.gz"
        with report.noting("trace.json.gz"):
            if trace.exists():
                shutil.copy(trace, self.given.out / "trace.json.gz")
        for entry in report.entries.values() if report.tail else ():
            entry.timings.clear()  # the table has them
        report.close()

    def _title(self) -> str:
        machine = self.given.machine
        if not machine.on_gpu:
            return f"linfast, a dry run on the CPU ({'as asked' if self.dry else machine.name})"
        if machine.gib < MOST_GIB:
            self.report.problem(
                f"{machine.free_gib:.1f} of {machine.total_gib:.1f} GiB of the card are free: {machine.gib:.1f} "
                f"are used, by at most {machine.at_once(14)} processes; what needs more says out of memory"
            )
        if not machine.capped:
            self.report.problem("torch holds no process to its share of the memory: 4 processes at once")
        return f"linfast on {machine.name}"


def _links_needed() -> list[Path]:
    """The links that importing this checkout's folders from linfast needs; none where it is installed."""
    names = [f"linfast.{name}" for name in FOLDERS]
    code = f"import {', '.join(names)}; print({', '.join(f'*{name}.__path__' for name in names)}, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if [Path(path).resolve() for path in done.stdout.splitlines()] == [ROOT / name for name in FOLDERS]:
        return []
    return [link for link in LINKS if not link.exists()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages and return 0; the summary says what went wrong in them."""
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description="See bench/gpu.sh and docs/gpu.md.")
    parser.add_argument("out", type=Path, help="a folder for at most 8 files")
    parser.add_argument("--dry", action="store_true", help="on the CPU, at tiny sizes")
    parser.add_argument("--compile", action="store_true", help="torch.compile's column of the flows alone")
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="STAGE,STAGE", help="these stages")
    options = parser.parse_args(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"cannot make {options.out}: {error.strerror}")
    os.chdir(ROOT)
    threads = "14" if options.compile else "4"  # per process; --compile runs one process
    os.environ |= {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": threads}
    if options.dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    made = _links_needed()
    work = Path(tempfile.mkdtemp(prefix="linfast-gpu-"))
    call = Call(options.out, options.dry, work)
    try:
        for link in made:
            link.symlink_to(LINKS[link])
        call.run_all(plan(options.compile), options.only)
    finally:
        for link in made:
            link.unlink(missing_ok=True)
        shutil.rmtree(work, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
