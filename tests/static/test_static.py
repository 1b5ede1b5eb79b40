"""No configuration spills or outgrows its target; what the kept table says is what compiles today.

The rows whose source, configuration or compiler changed are compiled at every run, and one more of each
target whatever the digests say. A long run compiles every kernel for every target.
"""

from __future__ import annotations

import pytest

from tests.static.cases import TARGETS, all_cases
from tests.static.sources import files_of
from tests.static.table import Key, Row, compiled, kept, pinned_version, stale, triton_version

SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
# Register differences between two compilations of the same source; more is a change to look at.
REGISTER_SLACK = 8
COUNTED = ("mufu", "wide_loads", "matrix", "async_copies")
TargetRows = tuple[str, list[Row], dict[Key, Row]]


def _from_smallest(target: str) -> dict[int, Row]:
    """Kept rows by the number of their case, from the fewest instructions up."""
    table = kept()
    numbers = {
        (case.kernel, case.config, target): n for n, case in enumerate(all_cases()) if target in case.targets
    }
    rows = {n: table[key] for key, n in numbers.items() if key in table}
    return dict(sorted(rows.items(), key=lambda item: int(item[1]["instructions"])))


def _with_every_instruction(target: str) -> tuple[str, int]:
    """(target, number) of the smallest case whose machine code has each kind of instruction that is counted."""
    names = [name for name in COUNTED if target != "gfx942" or name != "async_copies"]  # it has none
    return target, next(n for n, row in _from_smallest(target).items() if all(int(row[name]) for name in names))


def _one_of_each_kernel(target: str) -> list[tuple[str, int]]:
    """(target, number) of each kernel's smallest case."""
    smallest: dict[str, int] = {}
    for n, row in _from_smallest(target).items():
        smallest.setdefault(row["kernel"], n)
    assert smallest.keys() == {case.kernel for case in all_cases() if target in case.targets}
    return [(target, n) for n in smallest.values()]


def _compiled_with_the_tables_triton(wanted: list[tuple[str, int]]) -> dict[Key, Row]:
    """These rows, compiled now. With another Triton than the table's, nothing more is said of them."""
    rows = compiled(wanted)
    if triton_version() != pinned_version():
        pytest.skip(f"they compile; the table is of Triton {pinned_version()}, this is {triton_version()}")
    return rows


def _assert_as_kept(rows: dict[Key, Row]) -> None:
    table = kept()
    for key, row in rows.items():
        assert key in table, f"not in the kept table: run python -m tests.static ({row['config']})"
        before = table[key]
        assert abs(int(row["registers"]) - int(before["registers"])) <= REGISTER_SLACK, row
        assert (row["spills"], row["shared"]) == (before["spills"], before["shared"]), row
        assert [row[name] != "0" for name in COUNTED] == [before[name] != "0" for name in COUNTED], row


@pytest.fixture(scope="module")
def one_of_each_target() -> dict[Key, Row]:
    return _compiled_with_the_tables_triton([_with_every_instruction(target) for target in TARGETS])


@pytest.fixture(scope="module", params=TARGETS)
def target_rows(request: pytest.FixtureRequest, one_of_each_target: dict[Key, Row]) -> TargetRows:
    """(target, every row, the rows compiled now)."""
    target, table = request.param, kept()
    changed = stale(target, table)
    now = {key: row for key, row in one_of_each_target.items() if key[2] == target}
    now |= compiled((target, n) for n in changed) if changed else {}
    wanted = [(case.kernel, case.config, target) for case in all_cases() if target in case.targets]
    return target, [now.get(key) or table[key] for key in wanted], now


def test_nothing_spills(target_rows: tuple[str, list[Row], dict[Key, Row]]) -> None:
    assert [row for row in target_rows[1] if int(row["spills"])] == []


def test_shared_memory_fits(target_rows: tuple[str, list[Row], dict[Key, Row]]) -> None:
    target, rows, _ = target_rows
    assert [row for row in rows if int(row["shared"]) > SHARED_LIMIT[target]] == []


def test_long_contiguous_rows_are_read_sixteen_bytes_at_a_time(
    target_rows: tuple[str, list[Row], dict[Key, Row]],
) -> None:
    contiguous = [row for row in target_rows[1] if {"contiguous", "fp32"} <= set(row["config"].split())]
    narrow = [row for row in contiguous if not int(row["wide_loads"])]
    if target_rows[0] == "gfx942":  # 512 columns are two for each of 256 lanes: eight bytes, and whole lines
        narrow = [row for row in narrow if "x512" not in row["config"].split()]
    assert narrow == []


def test_products_meant_for_matrix_units_run_on_them(target_rows: tuple[str, list[Row], dict[Key, Row]]) -> None:
    meant = {
        (case.kernel, case.config) for case in all_cases() if case.matrix_units and target_rows[0] in case.targets
    }
    rows = [row for row in target_rows[1] if (row["kernel"], row["config"]) in meant]
    assert len(rows) == len(meant) > 0
    assert [row for row in rows if not int(row["matrix"])] == []


def test_stacks_load_weights_ahead(target_rows: tuple[str, list[Row], dict[Key, Row]]) -> None:
    stacks = ("_coupling_stack_kernel", "_linearizer_stack_kernel")
    rows = [row for row in target_rows[1] if row["kernel"] in stacks]
    assert rows
    if target_rows[0] != "gfx942":  # whose loads go through registers
        assert [row for row in rows if not int(row["async_copies"])] == []


def test_kept_table_is_what_compiles_today(target_rows: TargetRows) -> None:
    assert target_rows[2]
    _assert_as_kept(target_rows[2])


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_to_its_kept_row(target: str) -> None:
    _assert_as_kept(_compiled_with_the_tables_triton(_one_of_each_kernel(target)))


def test_digests_are_of_every_source_that_a_kernel_is_made_of() -> None:
    """Else a row would stay as it is where its kernel changed."""
    for case in {(case.op, case.kernel): case for case in all_cases()}.values():
        assert files_of(case.op, case.kernel) <= set(case.files), case.kernel
