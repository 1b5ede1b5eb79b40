"""The mutants apply to the current code, and the runner distinguishes failed tests from other outcomes."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

from tests.mutants import MUTANTS
from tests.mutants.mutant import DoesNotApply, Mutant
from tests.mutants.run import ROOT, _first_not_passed


def test_every_mutant_is_a_change_of_the_present_code_and_still_python() -> None:
    texts = {name: (ROOT / name).read_text() for name in {mutant.file for mutant in MUTANTS}}
    for mutant in MUTANTS:
        ast.parse(mutant.applied(texts[mutant.file]), mutant.name)


def test_names_are_unique_and_say_something() -> None:
    assert [name for name, count in Counter(mutant.name for mutant in MUTANTS).items() if count > 1] == []
    assert [mutant.name for mutant in MUTANTS if ": " not in mutant.name or not mutant.breaks.endswith(".")] == []


def test_the_tests_that_are_named_exist() -> None:
    for test in {test for mutant in MUTANTS for test in mutant.tests}:
        file, _, function = test.partition("::")
        assert f"def {function.partition('[')[0] or 'test_'}" in (ROOT / file).read_text(), test


def test_a_mutant_whose_text_does_not_occur_once_does_not_apply() -> None:
    mutant = Mutant("a: b", "file.py", "x = 1", "x = 2", "It is wrong.", ("tests",))
    assert mutant.applied("x = 1\n") == "x = 2\n"
    for text in ("", "x = 1\nx = 1\n"):
        with pytest.raises(DoesNotApply, match="a: b"):
            mutant.applied(text)


@pytest.mark.parametrize(
    ("inside", "kind"),
    [
        ('<failure message="assert 1 == 2"/>', "failure"),
        ('<failure message="NameError: name is not defined"/>', "error"),
        ('<error message="collection failure"/>', "error"),
        ("", "error"),
    ],
)
def test_only_a_failure_inside_a_test_counts(inside: str, kind: str, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(f'<testsuites><testcase file="tests/a.py" name="test_b[c]">{inside}</testcase></testsuites>')
    outcome = _first_not_passed(report, "boom", 1.0)
    assert outcome.kind == kind
    assert outcome.where == ("tests/a.py::test_b[c]" if inside else "")
