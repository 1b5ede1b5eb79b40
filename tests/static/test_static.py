"""No configuration spills or outgrows its target; what the kept table says is what compiles today."""

from __future__ import annotations

import pytest

from tests.static.cases import TARGETS, all_cases
from tests.static.table import Row, compiled, kept, pinned_version, stale, triton_version

SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
# Register differences between two compilations of the same source; more is a change to look at.
REGISTER_SLACK = 8


@pytest.fixture(scope="module", params=TARGETS)
def target_rows(request: pytest.FixtureRequest) -> tuple[str, list[Row], list[Row]]:
    """(target, every row, the rows compiled now): those that changed, and one of each kernel as a smoke set.

    With another Triton than the table's: the smoke set is compiled, and nothing is said of the rest.
    """
    target, table, cases = request.param, kept(), all_cases()
    smoke = {case.kernel: n for n, case in reversed(list(enumerate(cases))) if target in case.targets}
    if triton_version() != pinned_version():
        compiled(sorted(smoke.values()), target)
        pytest.skip(f"every kernel compiles; the table is of Triton {pinned_version()}, this is {triton_version()}")
    now = compiled(sorted({*stale(target, table), *smoke.values()}), target)
    current = {**{key: row for key, row in table.items() if key[2] == target}, **now}
    wanted = [(case.kernel, case.config, target) for case in cases if target in case.targets]
    return target, [current[key] for key in wanted], list(now.values())


def test_nothing_spills(target_rows: tuple[str, list[Row], list[Row]]) -> None:
    assert [row for row in target_rows[1] if int(row["spills"])] == []


def test_shared_memory_fits(target_rows: tuple[str, list[Row], list[Row]]) -> None:
    target, rows, _ = target_rows
    assert [row for row in rows if int(row["shared"]) > SHARED_LIMIT[target]] == []


def test_long_contiguous_rows_are_read_sixteen_bytes_at_a_time(
    target_rows: tuple[str, list[Row], list[Row]],
) -> None:
    contiguous = [row for row in target_rows[1] if {"contiguous", "fp32"} <= set(row["config"].split())]
    narrow = [row for row in contiguous if not int(row["wide_loads"])]
    if target_rows[0] == "gfx942":  # 512 columns are two for each of 256 lanes: eight bytes, and whole lines
        narrow = [row for row in narrow if "x512" not in row["config"].split()]
    assert narrow == []


def test_products_meant_for_matrix_units_run_on_them(target_rows: tuple[str, list[Row], list[Row]]) -> None:
    meant = {
        (case.kernel, case.config) for case in all_cases() if case.matrix_units and target_rows[0] in case.targets
    }
    rows = [row for row in target_rows[1] if (row["kernel"], row["config"]) in meant]
    assert len(rows) == len(meant) > 0
    assert [row for row in rows if not int(row["matrix"])] == []


def test_stacks_load_weights_ahead(target_rows: tuple[str, list[Row], list[Row]]) -> None:
    stacks = ("_coupling_stack_kernel", "_linearizer_stack_kernel")
    rows = [row for row in target_rows[1] if row["kernel"] in stacks]
    assert rows
    if target_rows[0] != "gfx942":  # whose loads go through registers
        assert [row for row in rows if not int(row["async_copies"])] == []


def test_kept_table_is_what_compiles_today(target_rows: tuple[str, list[Row], list[Row]]) -> None:
    table = kept()
    for row in target_rows[2]:
        before = table.get((row["kernel"], row["config"], row["target"]))
        assert before is not None, f"not in the kept table: run python -m tests.static ({row['config']})"
        assert abs(int(row["registers"]) - int(before["registers"])) <= REGISTER_SLACK, row
        assert (row["spills"], row["shared"]) == (before["spills"], before["shared"]), row
