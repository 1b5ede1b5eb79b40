"""Plots, profiles, the short table, the documentation's figures."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path

from linfast.bench import measurements
from linfast.bench.plots import draw, draw_gains
from linfast.bench.report import json_line, parse, short_table
from linfast.bench.run import main

from .test_run import TINY
from .toy import run

ROOT = Path(__file__).parent.parent.parent
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
    assert {"eager", "Linearizer.forward", "Flow.inverse"} <= names
    text = (tmp_path / "kernels.txt").read_text()
    assert "aten::" in text
    assert text.strip() in capsys.readouterr().out


# The summary of a call on a GPU.


def test_the_short_table_has_a_line_a_size() -> None:
    text = short_table(parse(json_line(result, ENVIRONMENT) for result in _results()))
    assert "1.000 never heard of" in text
    assert len([line for line in text.splitlines() if line.startswith("coupling_flow")]) == 3


# The documentation's figures.


def test_the_page_of_measurements_is_only_changed_between_its_marks(tmp_path: Path) -> None:
    (tmp_path / "bench/results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    lines = [json_line(result, ENVIRONMENT) for result in _results()]
    (tmp_path / "bench/results/here.jsonl").write_text("\n".join(lines))
    page = tmp_path / "docs/measurements.md"
    page.write_text("before\n<!-- bench:here -->\nold\n<!-- /bench -->\nafter\n")
    root = ["--root", str(tmp_path)]
    assert measurements.main([*root, "--check"]) == 1
    assert measurements.main(root) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- bench:here -->\n```text\ndevice here")
    assert text.endswith("<!-- /bench -->\nafter\n")
    assert "old" not in text
    assert len([line for line in text.splitlines() if line.startswith("coupling_flow")]) == 3
    for name in ("throughput", "roofline", "memory"):
        assert f"(bench/here/{name}.png)" in text
        assert (tmp_path / f"docs/bench/here/{name}.png").exists()
    assert measurements.main([*root, "--check"]) == 0


def test_the_page_of_measurements_is_up_to_date() -> None:
    assert measurements.main(["--root", str(ROOT), "--check"]) == 0


def test_the_picture_of_gains_is_of_times_in_the_tables() -> None:
    gains = measurements.gains(ROOT / "bench/results/gains.tsv")
    assert len(gains) > 5
    for gain in gains:
        rows = (line for line in (ROOT / "docs" / gain.page).read_text().splitlines() if line.startswith("|"))
        times = re.compile(rf"\b{re.escape(gain.before)}\D+{re.escape(gain.after)} ?({gain.unit})? ?[,|]")
        assert any(times.search(row) for row in rows), gain


def test_the_picture_of_gains_is_drawn(tmp_path: Path) -> None:
    draw_gains(measurements.gains(ROOT / "bench/results/gains.tsv"), tmp_path / "gains.png")
    assert (tmp_path / "gains.png").read_bytes().startswith(b"\x89PNG")
