"""docs/roofline.md shows what the model makes of layers.tsv, and layers.tsv is of what is launched."""

from __future__ import annotations

import re

import pytest
from linfast.bench.cases import CASES
from linfast.bench.harness import Result, Size
from linfast.bench.report import json_line

from tests.static import layers, roofline, roofline_ops, roofline_text
from tests.static.model import H100, START, Gpu, Prediction

# A program of 64 rows and 4 warps, two of which fit a multiprocessor.
_ROW = {
    "rows": "64", "warps": "4", "registers": "200", "shared": "90000", "instructions": "256", "mufu": "16",
    "products": "32768", "wgmma": "0", "shared_bytes": "4096", "waits": "2", "beside": "100", "weights": "64000",
    "type": "bf16", "around": "0",
}  # fmt: skip
_GPU = Gpu("", memory=1e12, sms=10, clock=1e9, l2=5e11, bf16=1e14)


def test_the_page_shows_the_tables() -> None:
    page = roofline.PAGE.read_text()
    assert set(re.findall(r"<!-- (\w+) -->", page)) == roofline.TABLES.keys()
    assert page == roofline.with_tables(page), "run python -m tests.static.roofline --write"


def test_what_was_measured_fills_the_last_columns(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In milliseconds, and in microseconds for latent products."""
    monkeypatch.setattr(roofline_text, "RESULTS", tmp_path / "gpu.jsonl")
    flagship: Size = {
        "direction": "forward",
        "precision": "fast",
        "D": 64,
        "depth": 8,
        "hidden": 128,
        "batch": 2**20,
    }
    latent: Size = {"direction": "forward", "dtype": "float32", "K": 8, "N": 64, "batch": 8192}
    times = [
        ("linearizer", flagship, "linfast frozen", 2.5),
        ("linearizer", flagship, "eager", 20.0),
        ("linearizer", {**flagship, "precision": "tf32"}, "linfast frozen", None),
        ("linearizer", {**flagship, "D": 128, "hidden": 256}, "linfast frozen", 15.0),
        ("latent_matmul", latent, "linfast", 0.031),
        ("latent_matmul", {**latent, "direction": "forward+backward"}, "linfast", 0.001),
    ]
    results = [
        Result(case, size, who, False, "eager", "float32", None, None, p50_ms=ms) for case, size, who, ms in times
    ]
    (tmp_path / "gpu.jsonl").write_text("\n".join(json_line(result, {"device": "here"}) for result in results))

    def last(table: str, start: str) -> str:
        [row] = [row for row in roofline.TABLES[table]().splitlines() if row.startswith(f"| {start}")]
        return row.rstrip(" |").rpartition("| ")[2]

    assert last("flagship", "fast") == "2.5, eager 20 (8.0 times)"
    assert last("flagship", "tf32") == "not measured yet"
    assert last("batches", "1,048,576") == "2.5 / - / - / -"
    assert last("batches", "64 ") == "not measured yet"
    assert last("large", "fast") == "15"
    assert last("latent", "latent_matmul, K = 8, ") == "31"


def test_what_a_column_asks_for_is_timed_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Size]] = []
    for module in (roofline, roofline_ops):
        monkeypatch.setattr(module, "measured", lambda case, provider, **size: asked.append((case, size)))
    for name in ("flagship", "large", "layers", "latent"):
        roofline.TABLES[name]()
    timed = {case: CASES[case].sizes["gpu"] for case, _ in asked if case}
    assert {"linearizer", "coupling_flow", "latent_matmul", "depthwise_conv"} == timed.keys()
    for case, size in asked:
        assert not case or any(other.items() >= size.items() for other in timed[case]), (case, size)


def test_what_is_counted_is_what_is_launched() -> None:
    now = {(launch.call, launch.target, launch.digest) for launch in layers.launches()}
    for triton in layers.table.VERSIONS:
        kept = {(row["call"], row["target"], row["digest"]) for row in layers.kept() if row["triton"] == triton}
        assert kept == now, "run python -m tests.static.layers"


def test_the_bounds_of_a_full_gpu() -> None:
    """1280 rows are two programs on each of ten multiprocessors: 128 rows each, at 1e9 clocks per second."""
    found = Prediction(_ROW, _GPU, 1280, layers=1).bounds
    assert found == pytest.approx(
        {
            "memory": 1280 * 512 / 1e12,
            "issue": 128 * 256 / 4 / 1e9,
            "MUFU": 128 * 16 * 32 / 16 / 1e9,
            "matrix": 2 * 1280 * 32768 / (0.6 * 1e14),
            "shared": 128 * 4096 / 128 / 1e9,
            "L2": 20 * 64000 / 5e11,
        }
    )


# One program takes 4096 clocks to issue, and 2048 for shared memory, of which half is added; and twice it waits for
# 500 and half of the weights at 64 bytes per clock, less 100. Two at once add a half of that each.
@pytest.mark.parametrize(
    ("programs", "clocks"), [(10, 4096 + 2824), (20, 2 * 4096 + 2824), (21, 3 * 4096 + 1.5 * 2824)]
)
def test_what_does_not_overlap_is_added(programs: int, clocks: float) -> None:
    found = Prediction(_ROW, _GPU, 64 * programs, layers=1)
    assert found.time == pytest.approx(START + clocks / 1e9)


def test_an_idle_multiprocessor_does_not_help() -> None:
    few, full = Prediction(_ROW, H100, 64), Prediction(_ROW, H100, 132 * 64)
    assert few.time <= full.time
    assert few.bounds["issue"] == full.bounds["issue"]
