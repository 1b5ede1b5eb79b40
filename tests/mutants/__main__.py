"""``python -m tests.mutants [NAME ...]``: break the code in one way at a time and report which test fails.

Fails where more than three mutants survive, where one no longer applies, and where the tests do
not pass without mutants.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from linfast.tables import aligned
from tests.mutants import MUTANTS
from tests.mutants.mutant import DoesNotApply, Mutant
from tests.mutants.run import ROOT, Outcome, baseline, copies, on_copies, try_mutant

_MOST_UNSEEN = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """The command's exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants whose name contains this; default: all")
    parser.add_argument("--list", action="store_true", help="say which mutants there are, and run none")
    parser.add_argument("-n", type=int, default=2, metavar="N", help="processes (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        chosen = _chosen(options.names)
        for mutant in chosen:
            mutant.applied((ROOT / mutant.file).read_text())
    except (DoesNotApply, LookupError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.list:
        print(aligned([("mutant", "file", "tests"), *((m.name, m.file, " ".join(m.tests)) for m in chosen)]))
        return 0
    return _run(chosen, options.n)


def _chosen(names: Sequence[str]) -> list[Mutant]:
    for name in names:
        if not any(name in mutant.name for mutant in MUTANTS):
            raise LookupError(f"no mutant's name contains {name!r}: see --list")
    return [mutant for mutant in MUTANTS if not names or any(name in mutant.name for name in names)]


def _run(mutants: Sequence[Mutant], processes: int) -> int:
    with copies(min(processes, len(mutants))) as free:
        red = baseline(free, mutants)
        if red:
            print("the tests are not green without a mutant, so that a table would say nothing:", file=sys.stderr)
            for outcome in red:
                print(f"  {outcome.kind} {outcome.where}: {outcome.message}", file=sys.stderr)
            return 2
        outcomes = []
        for mutant, outcome in zip(mutants, on_copies(free, try_mutant, mutants), strict=True):
            outcomes.append(outcome)
            print(f"{len(outcomes)} of {len(mutants)}  {mutant.name}: {_seen_by(mutant, outcome)}", file=sys.stderr)
    rows = [_row(mutant, outcome) for mutant, outcome in zip(mutants, outcomes, strict=True)]
    print(aligned([("mutant", "file", "what it breaks", "seen by", "seconds"), *rows], numeric=4))
    unseen = sum(outcome.kind not in mutant.accepts for mutant, outcome in zip(mutants, outcomes, strict=True))
    print(f"\n{len(mutants) - unseen} of {len(mutants)} mutants are seen")
    return int(unseen > _MOST_UNSEEN)


def _row(mutant: Mutant, outcome: Outcome) -> tuple[str, ...]:
    return mutant.name, mutant.file, mutant.breaks, _seen_by(mutant, outcome), f"{outcome.seconds:.1f}"


def _seen_by(mutant: Mutant, outcome: Outcome) -> str:
    if outcome.kind in mutant.accepts:
        return outcome.where or outcome.kind
    return "UNSEEN" if outcome.kind == "passed" else f"UNSEEN ({outcome.kind}: {outcome.message})"


if __name__ == "__main__":
    sys.exit(main())
