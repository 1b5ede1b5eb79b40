"""bench/gpu.sh: its stages, their limits, and its files when it is killed or a disk is full.

A stand-in for Python prints the output of the stages' processes; the script itself is the real one.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from linfast.bench.cases import CASES, sizes, words
from linfast.bench.gpu import stages as gpu_stages
from linfast.bench.gpu.report import Report
from linfast.bench.gpu.runner import Job, run_jobs
from linfast.bench.gpu.stages import MOST_GIB, TOTAL, Given, Machine, plan
from linfast.bench.run import parser

from linfast.precision import PRECISIONS

ROOT = Path(__file__).resolve().parents[2]
PROBE = {"ops": ["op:low_rank", "models"], "cases": ["coupling_flow", "linearizer", "low_rank"]}
RESULT = {"case": "low_rank", "size": {"N": 8}, "provider": "eager", "refused": None, "p50_ms": 2.0}
# Records its arguments, and prints what the script needs to continue.
STAND_IN = f"""#!/usr/bin/env bash
case "$*" in "-m bench.gpu "*) exec {sys.executable} "$@" ;; esac
printf '%s\\n' "$*" >> "$NOTES"
case "$*" in
    *tests.gpu.probe*) echo '{json.dumps({"probe": PROBE})}'; echo 'device: none' ;;
    *tests.gpu.smoke*)
        echo '{{"smoke": "one", "wrong": null}}'; echo '{{"smoke": "two", "wrong": "error 1, allowed 0"}}'
        [ -z "${{HANGS:-}}" ] || sleep 60
        echo '1 right, 1 wrong'; exit 1 ;;
    *"-m pytest "*) echo 'FAILED a.py::b - no'; echo 'COUNTS 7 passed, 1 failed, 2 skipped'; exit 1 ;;
    *bench.report*) echo the table ;;
    *"linfast.bench "*--json*)
        echo 'measuring low_rank 8'; echo '{json.dumps(RESULT)}'
        case "$*" in *--case=linearizer*) exit 139 ;; esac
        echo 'x base: time' ;;
esac
"""

# The real Python; of the benchmark cases that the probe found it passes on a few.
FEW = ("affine_coupling", "collapse", "linearizer", "reversible")
KEEP_FEW = f"""
import json, sys
for line in sys.stdin:
    if line.startswith("{{"):
        line = json.loads(line)
        line["probe"]["cases"] = [name for name in line["probe"]["cases"] if name in {FEW}]
        line = json.dumps(line) + "\\n"
    print(line, end="")
"""
OF_FEW = f"""#!/usr/bin/env bash
set -o pipefail
case "$*" in
    *tests.gpu.probe*) {sys.executable} "$@" | {sys.executable} "$(dirname "$0")/keep_few.py" ;;
    *) exec {sys.executable} "$@" ;;
esac
"""


@pytest.fixture
def started(tmp_path: Path):
    """Starts the script with the stand-in, and kills it at the end if it still runs."""
    python, notes, running = tmp_path / "python", tmp_path / "notes", list[subprocess.Popen]()
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def start(*arguments: str, **environment: str) -> subprocess.Popen:
        command = ["bash", str(ROOT / "bench/gpu.sh"), str(tmp_path / "out"), *arguments]
        environment = {**os.environ, "PYTHON": str(python), "NOTES": str(notes), **environment}
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()


def _ran(started, tmp_path: Path, *arguments: str) -> tuple[str, list[list[str]]]:
    """The summary, which is also the last output, and the arguments of every process."""
    process = started("--dry", *arguments)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    summary = (tmp_path / "out/summary.txt").read_text()
    assert printed.endswith(summary)
    return summary, [line.split() for line in (tmp_path / "notes").read_text().splitlines()]


def test_every_stage_has_its_turn_and_its_line(started, tmp_path: Path) -> None:
    summary, noted = _ran(started, tmp_path)
    for expected in (
        "linfast, a dry run on the CPU (as asked)",
        "smoke: ok",
        "2 right, 2 wrong",
        "wrong: two: error 1, allowed 0",
        "tests: FAILED",
        "7 passed, 1 failed, 2 skipped",
        "FAILED a.py::b - no",
        "memcheck: nothing to do here",
        "bench: FAILED",
        "status 139: linearizer",
        "profile: ok",
    ):
        assert expected in summary
    assert summary.endswith("the table\n")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"summary.txt", "smoke.jsonl", "tests.log", "results.jsonl"} <= files
    assert len(files) <= 8
    assert [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()] == 3 * [RESULT]
    benches = [parser().parse_args(line[2:]) for line in noted if line[:2] == ["-m", "linfast.bench"]]
    assert [args.case for args in benches if args.json] == [["linearizer"], ["coupling_flow"], ["low_rank"]]
    [tests] = [line for line in noted if line[:2] == ["-m", "pytest"]]
    assert all((ROOT / argument).exists() for argument in tests if argument.startswith("tests/"))


@pytest.mark.long
def test_a_dry_run_of_the_cheap_stages(tmp_path: Path) -> None:
    """With the real processes, and few cases: .ci/run runs them all, in one process."""
    python, out = tmp_path / "python", tmp_path / "out"
    (tmp_path / "keep_few.py").write_text(KEEP_FEW)
    python.write_text(OF_FEW)
    python.chmod(0o755)
    command = ["bash", str(ROOT / "bench/gpu.sh"), str(out), "--dry", "--only", "tests,bench,profile,table"]
    environment = {**os.environ, "PYTHON": str(python)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stderr
    for stage in ("environment", "tests", "bench", "profile", "table"):
        assert f"\n{stage}: ok" in done.stdout
    assert "passed, 0 failed" in done.stdout
    assert "refused" not in done.stdout
    first_words = {line.partition(" ")[0] for line in done.stdout.splitlines()}
    assert set(FEW) <= first_words  # the table is whole
    assert len(done.stdout) < 12000  # shown in the machine's reply
    assert 0 < (out / "trace.json.gz").stat().st_size < 2**24
    assert len(list(out.iterdir())) <= 8


GIVEN = Given(Machine("cuda", "a card", 79, 78, True, ["op:low_rank"], list(CASES)), {}, Path(), Path())


def test_a_real_call_times_every_case_but_peers_and_the_second_one_the_flagship() -> None:
    for compile, cases in ((False, CASES.keys() - {"peers"}), (True, {"linearizer", "coupling_flow"})):
        jobs = next(stage for stage in plan(compile) if stage.name == "bench").jobs(GIVEN)
        asked = [
            parser().parse_args(["cpu" if word == "cuda" else word for word in job.command[3:]]) for job in jobs
        ]
        assert sorted(name for args in asked for name in args.case) == sorted(cases)
        timed = {words(size) for args in asked for size in sizes(CASES[args.case[0]], args)}
        for mode in PRECISIONS:
            assert f"forward {mode} 64 8 128 {2**20}" in timed
    assert len(timed) == 5


def test_ncu_ends_the_process_once_it_has_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its report is printed when the process ends, and would be lost if it were stopped at its limit."""
    monkeypatch.setattr(gpu_stages, "which", lambda tool: f"/bin/{tool}")
    _, *counted = gpu_stages._profile(GIVEN)
    assert len(counted) == len(gpu_stages.COUNTED)
    for job in counted:
        assert job.command[job.command.index("--kill") + 1] == "yes"
        args = parser().parse_args(
            ["cpu" if w == "cuda" else w for w in job.command[job.command.index("-m") + 2 :]]
        )
        assert sizes(CASES[args.case[0]], args)
        assert re.match(job.done, "    Duration                         us        12.3")


def test_the_tests_of_a_real_call_exist() -> None:
    [tests] = next(stage for stage in plan(compile=False) if stage.name == "tests").jobs(GIVEN)
    paths = [argument for argument in tests.command if argument.startswith("tests/")]
    assert len(paths) > 3
    assert all((ROOT / path).exists() for path in paths)


def test_slow_checks_of_a_real_call_are_shared_by_processes() -> None:
    smoke = next(stage for stage in plan(compile=False) if stage.name == "smoke")
    names = ["op:low_rank", "op:linearizer_stack"]
    jobs = smoke.jobs(replace(GIVEN, machine=replace(GIVEN.machine, ops=names)))
    assert [job.command[-3:] for job in jobs] == [
        *(["op:linearizer_stack", "--part", f"{i}/3"] for i in range(3)), ["op:low_rank", "--part", "0/1"],
    ]  # fmt: skip
    assert len({job.name for job in jobs}) == 4  # a failed job is reported by its name


def test_an_unknown_stage_is_reported_and_the_others_run(started, tmp_path: Path) -> None:
    summary, noted = _ran(started, tmp_path, "--only", "smoke,tset")
    assert "unknown stage: 'tset'; there are environment, smoke, tests, memcheck, bench, profile, table" in summary
    assert "smoke: ok" in summary
    assert "tests:" not in summary
    assert not [line for line in noted if "pytest" in line]


def test_killed_it_leaves_a_summary_and_no_process(started, tmp_path: Path) -> None:
    process, out = started("--dry", HANGS="yes"), tmp_path / "out"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and "2 right, 2 wrong" not in _read(out / "summary.txt"):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    summary = _read(out / "summary.txt")
    assert "environment: ok" in summary
    assert "smoke: running" in summary
    assert "2 right, 2 wrong" in summary
    assert len(_read(out / "smoke.jsonl").splitlines()) == 4
    while time.monotonic() < deadline and _of_this_call(tmp_path):
        time.sleep(0.05)
    assert not _of_this_call(tmp_path)


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _of_this_call(tmp_path: Path) -> list[str]:
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if str(tmp_path / "python") in line]


def test_a_full_disk_is_reported_and_the_rest_runs(started, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/tests.log").symlink_to("/dev/full")
    summary, _ = _ran(started, tmp_path)
    assert "cannot write tests.log: No space left on device" in summary
    assert "7 passed, 1 failed, 2 skipped" in summary
    assert summary.endswith("the table\n")


def test_a_summary_that_cannot_be_written_is_printed(tmp_path: Path, capsys) -> None:
    (tmp_path / "summary.txt").symlink_to("/dev/full")
    report = Report(tmp_path, [])
    report.title = "here"
    report.close()
    assert "cannot write summary.txt: No space left on device" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = ["bash", str(ROOT / "bench/gpu.sh"), str(tmp_path / "file/out")]
    done = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "cannot make" in done.stderr


def _jobs(*scripts: str, **options) -> tuple[dict[str, str], list[str]]:
    lines: list[str] = []
    jobs = [Job(str(i), ["bash", "-c", script], **options) for i, script in enumerate(scripts)]
    failed = run_jobs(jobs, 2, 5.0, lambda line: lines.append(line.strip()))
    return failed, lines


def test_a_job_that_fails_or_hangs_costs_itself() -> None:
    failed, lines = _jobs("echo a", "echo b; exit 3", "echo c; kill -SEGV $$", "echo d; sleep 60", "echo e")
    assert failed == {"1": "status 3", "2": "killed by SIGSEGV", "3": "stopped at its limit"}
    assert sorted(lines) == ["a", "b", "c", "d", "e"]


def test_a_job_is_stopped_at_its_own_limit() -> None:
    for script in ("sleep 60", "while true; do echo a; sleep 0.1; done"):
        assert _jobs(script, limit=0.3)[0] == {"0": "stopped at its limit"}


def test_a_status_is_no_failure_of_a_job_that_came_to_its_end() -> None:
    assert _jobs("echo 3 right; exit 1", done=r"\d+ right")[0] == {}


@pytest.mark.parametrize("free", [139.0, 78.0, 20.0, 3.0, 0.5])
def test_a_call_keeps_to_60_gib_of_the_card(free: float) -> None:
    machine = Machine("cuda", "a card", total_gib=max(79.0, free), free_gib=free, capped=True)
    assert 1 <= machine.at_once(14) <= 14
    for most in (1, 8, 14):
        processes = machine.at_once(most)
        fraction = float(machine.share(processes)["PYTORCH_CUDA_ALLOC_CONF"].rpartition(":")[2])
        used = processes * (0.7 + fraction * machine.total_gib)
        assert used <= min(MOST_GIB, free) + 0.5 or processes == 1
    assert machine.at_once(14) == (14 if free > 60 else max(1, int(0.9 * free / 2)))


def test_a_call_ends_in_time() -> None:
    for stages, most in ((plan(compile=False), TOTAL), (plan(compile=True), 170)):
        ends = [stage.until for stage in stages]
        assert ends == sorted(ends)
        assert ends[-1] == most <= 570 - 15
