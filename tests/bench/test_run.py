"""What a run prints and writes: the table, JSON lines, the command line."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch

from linfast.bench.cases import CASES
from linfast.bench.environment import describe
from linfast.bench.harness import Case, Options, Problem, Provider, Size
from linfast.bench.report import json_line, table
from linfast.bench.run import main

from .toy import CPU, run, softplus

# Output.


def test_a_json_line_has_the_promised_fields() -> None:
    result = run()["eager"]
    record = json.loads(json_line(result, describe(CPU)))
    for key in ("case", "provider", "baseline", "dtype", "device", "torch", "numpy", "python", "threads"):
        assert record[key] is not None, key
    for key in ("error", "allowed", "p20_ms", "p50_ms", "p80_ms", "ratio"):
        assert isinstance(record[key], float), key
    assert record["size"] == {"batch": 32}
    assert record["peak_bytes"] >= 32 * 8 * 4
    assert record["refused"] is None
    assert record["threads"] == 1
    assert {"triton", "commit", "linfast", "load"} <= record.keys()


def test_a_json_line_is_strict_where_the_error_is_not_finite() -> None:
    line = json_line(run(wrong=lambda x: x * math.nan)["wrong"], {})
    assert json.loads(line, parse_constant=pytest.fail)["error"] is None


def test_the_table_is_aligned() -> None:
    lines = table(list(run(a_much_longer_name=softplus).values()), {"device": "here"}).splitlines()
    assert lines[0] == "device here"
    header, *rows = lines[2:]
    assert len(rows) == 2
    assert len({len(line) for line in (header, *rows)}) == 1


# The command line.


def test_quick_ends_quickly_and_prints_the_table(tmp_path, capsys) -> None:
    path = tmp_path / "results.jsonl"
    start = time.perf_counter()
    assert main(["--quick", "--device", "cpu", "--budget", "0.05", "--json", str(path)]) == 0
    assert time.perf_counter() - start < 15
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("linearizer ")]
    sizes = [json.loads(line)["size"] for line in path.read_text().splitlines()]
    assert "p50 ms" in out
    assert len(rows) == len(sizes) == sum(len(case.quick) for case in CASES.values())
    assert {size["direction"] for size in sizes} == {"forward", "inverse", "forward+backward"}


def test_compiled_is_added_only_when_asked() -> None:
    size = {"direction": "forward", "batch": 2}
    names = [
        [provider.name for provider in CASES["linearizer"].build(size, Options(CPU, asked)).providers]
        for asked in (False, True)
    ]
    assert names == [["eager"], ["eager", "compiled"]]


def test_batch_replaces_the_sizes_of_a_case(tmp_path) -> None:
    path = tmp_path / "results.jsonl"
    assert main(["--case", "linearizer", "--batch", "3", "--budget", "0.01", "--json", str(path)]) == 0
    assert [json.loads(line)["size"]["batch"] for line in path.read_text().splitlines()] == [3, 3, 3]


def test_a_refused_provider_is_an_exit_status(monkeypatch, capsys) -> None:
    def build(size: Size, options: Options) -> Problem:
        return Problem([(torch.ones(2),)], torch.exp, torch.exp, [Provider("wrong", torch.sin, baseline=True)])

    monkeypatch.setitem(CASES, "wrong", Case("wrong", [{}], [{}], build))
    assert main(["--case", "wrong", "--device", "cpu"]) == 1
    assert "refused: error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--case", "nothing"], "invalid choice: 'nothing' (choose from"),
        (["--batch", "0"], "must be a whole number of at least 1; got '0'"),
        (["--batch", "many"], "got 'many'"),
        (["--budget", "-1"], "must be a positive number of seconds"),
        (["--device", "gpu"], "not a device: 'gpu'"),
        (["--device", "cuda:99"], "'cuda:99' is not on this machine"),
        (["--json", "/nowhere/at/all.jsonl"], "cannot write /nowhere/at/all.jsonl: No such file"),
    ],
)
def test_bad_arguments_are_clear_errors(argv: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
