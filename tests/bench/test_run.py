"""The output of a run: the table and JSON lines; the command line."""

from __future__ import annotations

import importlib
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from linfast.bench.cases import CASES
from linfast.bench.environment import ceilings, describe
from linfast.bench.harness import SCALES, Case, Options, Problem, Provider, Size, judged
from linfast.bench.report import beside_the_fastest, json_line, parse, shares, table
from linfast.bench.run import main, too_large

from .toy import COST, CPU, Clock, run, softplus

TINY = ["--sizes", "tiny", "--no-compile", "--device", "cpu", "--budget", "0.01"]

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
    header, *rows = lines[2:5]
    assert len(rows) == 2
    assert lines[5] == ""
    assert len({len(line) for line in (header, *rows)}) == 1


def test_shares_are_of_the_ceilings() -> None:
    result = replace(run()["eager"], p50_ms=2.0, bytes=1000, operations=4000)
    assert shares(result, {"copy_bytes_per_s": 1e6, "matmul_float32_per_s": 1e7}) == (0.5, 0.2)
    assert shares(result, {}) == (None, None)
    line = table([result], {"copy_bytes_per_s": 1e6, "matmul_float32_per_s": 1e7}).splitlines()[3]
    assert "50.0*  " in line
    assert "20.0*  " in line


def test_lines_are_read_back() -> None:
    result = run()["eager"]
    [(again, environment)] = parse([json_line(result, describe(CPU))])
    assert again == result
    assert environment["threads"] == 1


def test_ours_is_set_beside_the_fastest_of_the_others() -> None:
    base = replace(run()["eager"], size={"batch": 64}, ratio=1.0, cpu_ratio=1.0)
    others = [
        replace(base, provider=name, ratio=clock, cpu_ratio=cpu)
        for name, clock, cpu in (("a", 0.5, 2.0), ("b", 3.0, 0.8))
    ]
    again = replace(base, provider="again", ratio=0.1, cpu_ratio=0.1)
    [line] = beside_the_fastest([base, again, *others])
    assert line.endswith("batch64: our fastest takes 2.00 of a's time by the clock, 1.25 of b's time by CPU time")
    assert beside_the_fastest([base, again]) == []
    assert beside_the_fastest([base, replace(others[0], size={"batch": 1})]) == []


def test_sizes_that_would_take_too_long_or_too_much_are_left_out() -> None:
    slow = replace(run()["eager"], size={"direction": "forward", "batch": 64}, p50_ms=100.0, peak_bytes=2**20)
    assert too_large({"direction": "forward", "batch": 128}, [slow], 20.0, CPU) is None
    reason = too_large({"direction": "forward", "batch": 1024}, [slow], 20.0, CPU)
    assert reason is not None
    assert "over the limit of 20" in reason
    assert too_large({"direction": "inverse", "batch": 1024}, [slow], 20.0, CPU) is None
    assert too_large({"direction": "forward", "batch": 1}, [slow], 1e-3, CPU) is None
    large = replace(slow, p50_ms=1e-9, peak_bytes=2**40)
    assert "GiB" in (too_large({"direction": "forward", "batch": 1024}, [large], 20.0, CPU) or "")


def test_the_ceilings_are_the_best_rates_but_for_the_first_call(clock: Clock, monkeypatch) -> None:
    calls = clock.taking(lambda x: x, [0.125, 0.5, *[0.25] * 24])  # 26 of each kind
    monkeypatch.setattr(torch.Tensor, "copy_", lambda target, source: calls(source))
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: calls(a))
    assert ceilings(CPU) == {"copy_bytes_per_s": 2 * 2**26 * 4, "matmul_float32_per_s": 2 * 512**3 * 4}


# The command line.


def test_every_case_runs_at_its_tiny_size(tmp_path, capsys) -> None:
    path = tmp_path / "results.jsonl"
    assert main([*TINY, "--json", str(path)]) == 0
    out = capsys.readouterr().out
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert list(dict.fromkeys(record["case"] for record in records)) == list(CASES)
    assert "p50 ms" in out
    assert "neither is timed twice" in out
    for record in records:
        assert record["bytes"] > 0, record["case"]
        assert record["operations"] > 0, record["case"]
        assert record["p50_ms"] > 0, record["case"]
        assert record["copy_bytes_per_s"] > 0


def test_every_size_of_every_scale_is_of_one_kind() -> None:
    """Every size has the fields that ``build`` reads; the sizes of a scale differ from each other."""
    for name, case in CASES.items():
        assert case.name == name
        assert set(case.sizes) == set(SCALES), name
        keys = {tuple(sorted(size)) for sizes in case.sizes.values() for size in sizes}
        assert len(keys) == 1, name
        for scale, sizes in case.sizes.items():
            assert sizes, (name, scale)
            assert len({tuple(sorted(size.items())) for size in sizes}) == len(sizes), (name, scale)


def test_all_directions_are_timed() -> None:
    for name in ("linearizer", "coupling_flow"):
        sizes = [size for scale in ("gpu", "full") for size in CASES[name].sizes[scale]]
        assert len({size["direction"] for size in sizes}) == 3
    assert {size["batch"] for size in CASES["coupling_flow"].sizes["full"]} >= {2**6, 2**22}


def test_providers_on_a_cpu_and_on_a_gpu() -> None:
    """On a CPU linfast is the eager reference, and is not timed under two names."""
    from linfast.bench.cases.common import providers, run

    def names(device: str, compile: bool) -> list[str]:
        options = Options(torch.device(device), compile)
        return [provider.name for provider in providers(torch.exp, options, run("forward"))]

    assert names("cpu", False) == ["eager"]
    assert names("cpu", True) == ["eager", "torch.compile"]
    assert names("cuda", True) == ["eager", "torch.compile", "linfast", "linfast compiled"]


@pytest.mark.parametrize(("mode", "least", "most"), [("exact", 0.0, 2e-6), ("fast", 5e-6, 5e-2)])
def test_a_linearizer_is_timed_in_a_mode_and_frozen(mode: str, least: float, most: float) -> None:
    """Also plain torch: an error of a mode's size says that it ran in it."""
    size = {"direction": "forward", "precision": mode, "D": 6, "depth": 2, "hidden": 8, "batch": 4}
    verdicts = judged(CASES["linearizer"].build(size, Options(CPU, kernels=True)))
    assert list(verdicts) == ["eager", "linfast", "linfast frozen"]
    for verdict in verdicts.values():
        assert verdict.refused is None
        assert least <= verdict.error <= most
    gradients = CASES["linearizer"].build({**size, "direction": "forward+backward"}, Options(CPU, kernels=True))
    assert [provider.name for provider in gradients.providers] == ["eager", "linfast"]


def test_a_copy_without_history_is_told_its_commit(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linfast.__file__", str(tmp_path / "linfast/__init__.py"))
    assert describe(CPU)["commit"] is None
    monkeypatch.setenv("LINFAST_COMMIT", "0123456789ab")
    assert describe(CPU)["commit"] == "0123456789ab"


def test_eager_runs_the_reference_and_linfast_the_kernels() -> None:
    backend = importlib.import_module("linfast.dispatch")  # linfast.backend is the function
    from linfast.bench.cases.common import providers, run

    def choice(x: torch.Tensor) -> torch.Tensor:
        return x + ("reference", "auto").index(backend.chosen_backend())

    eager, ours = providers(choice, Options(torch.device("cuda"), False), run("forward"))
    assert [float(p.call(torch.zeros(()))[0]) for p in (eager, ours)] == [0.0, 1.0]


def test_batch_replaces_the_sizes_of_a_case(tmp_path) -> None:
    path = tmp_path / "results.jsonl"
    assert main([*TINY, "--case", "linearizer", "--batch", "3", "5", "--json", str(path)]) == 0
    assert [json.loads(line)["size"]["batch"] for line in path.read_text().splitlines()] == [3, 5]


def test_a_refused_provider_is_an_exit_status(monkeypatch, capsys) -> None:
    def build(size: Size, options: Options) -> Problem:
        providers = [Provider("wrong", torch.sin, baseline=True)]
        return Problem([(torch.ones(2),)], torch.exp, torch.exp, providers, COST)

    monkeypatch.setattr("linfast.bench.run.CASES", {"affine_coupling": Case("wrong", build, {"tiny": [{}]})})
    assert main([*TINY, "--case", "affine_coupling"]) == 1
    assert "refused: error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--case", "nothing"], "invalid choice: 'nothing' (choose from"),
        (["--batch", "0"], "must be a whole number from 1 to 999999999; got '0'"),
        (["--batch", "9" * 30], "must be a whole number from 1 to 999999999"),
        (["--batch", "9" * 5000], "must be a whole number from 1 to 999999999"),
        (["--batch", "many"], "got 'many'"),
        (["--budget", "-1"], "must be a positive number of seconds"),
        (["--device", "gpu"], "not a device: 'gpu'"),
        (["--device", "cuda:99"], "'cuda:99' is not on this machine"),
        (["--compare", "nonsense", "--case", "low_rank"], "--compare: git worktree add: fatal: invalid reference"),
        (["--json", "/nowhere/at/all.jsonl"], "cannot write /nowhere/at/all.jsonl: No such file"),
    ],
)
def test_bad_arguments_are_clear_errors(argv: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_an_earlier_runs_files_are_replaced_only_on_request(tmp_path, capsys, monkeypatch) -> None:
    path, folder = tmp_path / "results.jsonl", tmp_path / "folder"
    folder.mkdir()
    small = [*TINY, "--case", "low_rank"]
    for name in ("roofline.svg", "kernels.txt", "low_rank.trace.json.gz"):
        (folder / name).write_text("earlier")
    path.write_text("earlier")
    with monkeypatch.context() as patch:
        patch.setattr("linfast.bench.run._measure_all", None)  # before any work
        patch.setattr("linfast.bench.trace._profile_case", None)
        for options in (["--json", str(path)], ["--plots", str(folder)], ["--profile", str(folder)]):
            with pytest.raises(SystemExit):
                main([*small, *options])
            error = capsys.readouterr().err
            assert re.search(r"error: \S+ exists: --overwrite replaces it", error)
            assert error.count("\n") == 1
    assert {file.read_text() for file in (path, *folder.iterdir())} == {"earlier"}
    assert main([*small, "--json", str(path), "--plots", str(folder), "--overwrite"]) == 0
    assert json.loads(path.read_text().splitlines()[0])["case"] == "low_rank"
    assert "earlier" not in (folder / "roofline.svg").read_text()
