"""A mutant: one change that makes the code wrong, and the tests that ought to fail on it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DoesNotApply", "Mutant"]


class DoesNotApply(Exception):
    """The text that a mutant replaces does not occur exactly once in its file."""


@dataclass(frozen=True)
class Mutant:
    """One way to break the code.

    Args:
        name: the part and what is wrong with it, such as "affine_coupling: log_det has the wrong sign".
        file: from the root of the checkout.
        old: a text that occurs exactly once in the file.
        new: its replacement.
        breaks: the resulting fault, in one plain sentence.
        tests: test files, or functions as "file::name", that ought to fail.
        accepts: the outcomes that count as a detection: "failure" is an assertion or exception inside a test;
            "error", a test that could not start, and "timeout" do not count unless they are named here.
    """

    name: str
    file: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]
    accepts: tuple[str, ...] = ("failure",)

    def applied(self, text: str) -> str:
        """The text of the file with this mutation.

        Raises:
            DoesNotApply: the old text does not occur exactly once, or the new one is the same.
        """
        count = text.count(self.old)
        if count != 1 or self.old == self.new:
            raise DoesNotApply(f"{self.name}: the text to replace occurs {count} times in {self.file}, not once")
        return text.replace(self.old, self.new)
