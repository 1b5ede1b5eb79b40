"""Plots, profiles, bench/gpu.sh and its summary, the README's figures, pytest bench."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from linfast.bench.arguments import parser
from linfast.bench.plots import draw
from linfast.bench.report import json_line
from linfast.bench.run import main
from linfast.bench.summary import summary

from tests.marks import long

from .test_run import TINY
from .toy import run

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"device": "here", "copy_bytes_per_s": 1e10, "matmul_float32_per_s": 1e11, "date": "2026-01-01"}


def _results() -> list:
    base = replace(run()["eager"], p50_ms=1.0, ratio=0.5, peak_bytes=2**20, case="coupling_flow")
    sizes = [{"batch": b, "depth": d} for b, d in ((64, 8), (512, 8), (64, 2))]
    return [replace(base, size=s, provider=p) for s in sizes for p in ("eager", "linfast", "never heard of")]


def test_plots_are_written_as_png_and_svg(tmp_path: Path) -> None:
    paths = draw(_results(), ENVIRONMENT, tmp_path)
    names = ("throughput", "roofline", "memory")
    assert [p.name for p in paths] == [f"{name}.{suffix}" for name in names for suffix in ("png", "svg")]
    for path in paths:
        content = path.read_bytes()
        if path.suffix == ".png":
            assert content.startswith(b"\x89PNG")
        else:
            assert b"here" in content, "the device is in the title"
            assert b"2026-01-01" in content
    assert b"never heard of" in (tmp_path / "throughput.svg").read_bytes()
    assert b"copy, 10 GB/s" in (tmp_path / "roofline.svg").read_bytes()


def test_nothing_to_plot_writes_nothing(tmp_path: Path) -> None:
    refused = replace(run()["eager"], refused="wrong", p50_ms=None)
    assert draw([refused], ENVIRONMENT, tmp_path) == []


def test_a_profile_is_a_trace_with_ranges_and_a_summary(tmp_path: Path, capsys) -> None:
    assert main([*TINY, "--case", "linearizer", "--profile", str(tmp_path)]) == 0
    with gzip.open(tmp_path / "linearizer.trace.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"eager", "Linearizer.forward", "AffineCoupling.inverse"} <= names
    text = (tmp_path / "kernels.txt").read_text()
    assert "aten::" in text
    assert text.strip() in capsys.readouterr().out


# bench/gpu.sh.


def test_the_summary_is_short_and_says_what_failed(tmp_path: Path) -> None:
    wrong = replace(run()["eager"], provider="linfast", refused="error 1, allowed 0", p50_ms=None)
    lines = [json_line(result, ENVIRONMENT) for result in [*_results(), wrong]]
    (tmp_path / "results.jsonl").write_text("\n".join(lines))
    (tmp_path / "tests.log").write_text("FAILED tests/ops/test_x.py::y\n3 failed, 4 passed in 2s\n")
    (tmp_path / "sanitizer.log").write_text("noise\n========= ERROR SUMMARY: 0 errors\n")
    text = summary(tmp_path)
    for expected in (
        "FAILED tests/ops/test_x.py::y",
        "3 failed, 4 passed",
        "ERROR SUMMARY: 0 errors",
        "refused: softplus batch32 linfast: error 1, allowed 0",
        "1.000 never heard of",
    ):
        assert expected in text
    assert len([line for line in text.splitlines() if line.startswith("coupling_flow")]) == 3
    assert summary(tmp_path / "nothing").strip() == "no results"


STEPS = (
    "install",
    "environment",
    "tests",
    "memcheck",
    "racecheck",
    "bench low_rank",
    "bench linearizer",
    "profile",
)
# Stands in for Python: notes its arguments, and leaves what the script goes on with.
NOTES = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$CALLS"
case "$*" in
    *'import CASES'*) echo low_rank linearizer ;;
    *linfast.bench.summary*) echo the table ;;
esac
while [ $# -gt 0 ]; do
    [ "$1" != --json ] || echo '{}' > "$2"
    [ "$1" != --profile ] || { mkdir -p "$2" && touch "$2/kernels.txt" "$2/coupling_flow.trace.json.gz"; }
    shift
done
"""


def _dry_run(script: Path, out: Path, **environment: str) -> tuple[str, dict[str, str]]:
    """What the script printed, and its steps and how they ended."""
    command = ["bash", str(script), str(out), "--dry"]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    steps = dict(line.split(":", 1) for line in (out / "summary.txt").read_text().splitlines()[: len(STEPS)])
    assert all(" ok," in how for how in steps.values()), done.stdout
    return done.stdout, steps


def test_gpu_sh_takes_its_steps_with_arguments_that_are_understood(tmp_path: Path) -> None:
    python, calls, out = tmp_path / "python", tmp_path / "calls", tmp_path / "out"
    python.write_text(NOTES)
    python.chmod(0o755)
    printed, steps = _dry_run(ROOT / "bench/gpu.sh", out, PYTHON=str(python), CALLS=str(calls))
    assert set(steps) == set(STEPS)
    assert printed.splitlines()[-1] == "the table"
    assert (out / "results.jsonl").read_text() == "{}\n{}\n"
    assert {"environment.txt", "tests.log", "sanitizer.log", "bench.log", "kernels.txt", "trace.json.gz"} <= {
        path.name for path in out.iterdir()
    }
    noted = [line.split() for line in calls.read_text().splitlines()]
    benches = [parser().parse_args(line[2:]) for line in noted if line[:2] == ["-m", "linfast.bench"]]
    assert [args.case for args in benches if args.json] == [["low_rank"], ["linearizer"]]
    assert [bool(args.profile) for args in benches] == [False, False, True]
    [tests] = [line for line in noted if line[:2] == ["-m", "pytest"]]
    [path] = [argument for argument in tests if argument.startswith("tests/")]
    assert (ROOT / path).exists()


@pytest.mark.long
def test_gpu_sh_dry_runs(tmp_path: Path) -> None:
    """Every step but the kernels' tests, which run here anyway and take the longest."""
    script = (ROOT / "bench/gpu.sh").read_text()
    quick = script.replace(
        '(tests/ops/test_low_rank_kernel.py -k "half_precision or opcheck")', "(tests/test_import.py)"
    )
    assert quick != script
    copy = ROOT / "bench" / f"gpu_test_{os.getpid()}.sh"
    copy.write_text(quick.replace("cases=$(", "cases='low_rank linearizer' #"))
    try:
        printed, steps = _dry_run(copy, tmp_path / "out", PYTHON=sys.executable, OMP_NUM_THREADS="1")
    finally:
        copy.unlink()
    assert set(steps) == set(STEPS)
    out = {
        path.name: path.read_text(errors="replace") for path in (tmp_path / "out").iterdir() if path.suffix != ".gz"
    }
    expected = {
        "environment.txt",
        "tests.log",
        "sanitizer.log",
        "bench.log",
        "results.jsonl",
        "kernels.txt",
        "summary.txt",
    }
    assert set(out) == expected
    assert (tmp_path / "out/trace.json.gz").stat().st_size < 2**24
    assert [json.loads(line)["case"] for line in out["results.jsonl"].splitlines()][-1] == "linearizer"
    assert printed.splitlines()[-1].startswith("linearizer")
    assert len(printed) < 12000


# The README's figures, and pytest bench.


def test_the_readme_is_written_between_its_marks_and_only_there(tmp_path: Path) -> None:
    from linfast.bench.readme import main as readme

    (tmp_path / "bench/results").mkdir(parents=True)
    lines = [json_line(result, ENVIRONMENT) for result in _results()]
    (tmp_path / "bench/results/here.jsonl").write_text("\n".join(lines))
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- bench:here -->\nold\n<!-- /bench -->\nafter\n")
    root = ["--root", str(tmp_path)]
    assert readme([*root, "--check"]) == 1
    assert readme(root) == 0
    text = path.read_text()
    assert text.startswith("before\n<!-- bench:here -->\n```\ndevice here")
    assert text.endswith("<!-- /bench -->\nafter\n")
    assert "old" not in text
    assert len([line for line in text.splitlines() if line.startswith("coupling_flow")]) == 3
    for name in ("throughput", "roofline", "memory"):
        assert f"docs/bench/here/{name}.png" in text
        assert (tmp_path / f"docs/bench/here/{name}.png").exists()
    assert readme([*root, "--check"]) == 0


@pytest.mark.parametrize(
    ("argument", "status", "says"),
    [*long(("right", 0, "2 passed")), ("wrong", 1, "1 failed, 1 passed")],
)
def test_pytest_bench_times_every_provider_and_fails_a_wrong_one(argument: str, status: int, says: str) -> None:
    pytest.importorskip("pytest_benchmark")
    code = """
import sys, torch, pytest
import linfast.ops.low_rank as module
from linfast.bench.cases import low_rank
if "wrong" in sys.argv:
    low_rank._materialised = lambda x, U, V: 1.001 * torch.bmm(x[:, None], torch.bmm(V, U.mT))[:, 0]
sys.exit(pytest.main(["bench", "-k", "low_rank", "--benchmark-max-time=0.01", "--benchmark-min-rounds=1", "-rfp"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, argument],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stdout
    assert says in done.stdout
