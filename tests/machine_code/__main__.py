"""Every op's machine code for sm_80 and sm_90 on a CPU, with sanitizers, against float64.

    python -m tests.machine_code                       all sizes, modes, directions and dtypes, on both targets
    python -m tests.machine_code --smoke               every kernel at one size, a direction a target, for CI
    python -m tests.machine_code --only coupling_stack --target sm_90
    python -m tests.machine_code --write               keeps the table in docs/machine_code.md

Prints one line per variant: its largest error over its allowance, that output's error and allowance, and what the
sanitizers report. Tensor cores sum as they were measured to, truncating, or with --mma exact round each sum once.
One process per target. Needs the folder ../shared/tools/ptx beside the checkout, or LINFAST_PTX.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tests.machine_code.target import CAPABILITIES, as_on_gpu, emulator, folder

NOT_THERE = 77  # the exit status where the folder is missing
DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "machine_code.md"


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m tests.machine_code", description=__doc__.partition("\n\n")[0])
    options.add_argument("--smoke", action="store_true", help="every kernel at one size, a direction a target")
    options.add_argument("--only", default="", help="variants whose name has this in it")
    options.add_argument("--target", choices=CAPABILITIES, action="append", help="default: each in a process")
    options.add_argument("--worst", action="store_true", help="approximate instructions at their documented bounds")
    options.add_argument("--mma", choices=("exact", "hardware"), default="hardware", help="how tensor cores sum")
    options.add_argument("--write", action="store_true", help="keep the table in docs/machine_code.md")
    options.add_argument("--results", type=Path, help="a JSON file for what the last --target came to")
    return options


def run_target(target: str, options: argparse.Namespace) -> int:
    """Run one target's variants in this process, with one line for each; returns the exit status."""
    launch, settings = emulator("launch"), emulator("numerics").settings
    from tests.machine_code.cases import all_cases
    from tests.machine_code.check import checked
    from tests.machine_code.kernels import entry_kernels
    from tests.machine_code.variants import in_short_run, uncovered, variants

    settings.mma, settings.worst_approx = options.mma, options.worst
    start, results, cases = time.monotonic(), [], all_cases()
    with launch.installed(capability=CAPABILITIES[target], raise_faults=False), as_on_gpu(target):
        for variant in variants(cases, options.smoke):
            if options.only in variant.name and (not options.smoke or in_short_run(variant, target)):
                results.append(checked(variant, launch))
                print(f"{target} {results[-1]}", flush=True)
    missing = uncovered(cases, options.smoke)
    missing += [] if options.only else sorted(entry_kernels() - launch.STATISTICS.launches.keys())
    failed = sum(not result.passed for result in results)
    print(f"{target}: {len(results)} variants, {failed} failed, {time.monotonic() - start:.0f} s", flush=True)
    if missing:
        print(f"{target}: never run: {', '.join(missing)}", flush=True)
    if options.results:
        options.results.write_text(json.dumps([asdict(result) | {"margin": result.margin} for result in results]))
    return int(bool(failed or missing or not results))


def run_targets(targets: Sequence[str], arguments: Sequence[str], write: bool) -> int:
    """Run one process per target, all at once; returns the exit status."""
    with tempfile.TemporaryDirectory() as temporary:
        files = [Path(temporary, f"{target}.json") for target in targets]
        command = [sys.executable, "-m", "tests.machine_code", *arguments]
        processes = [
            subprocess.Popen([*command, "--target", target, "--results", str(file)])
            for target, file in zip(targets, files, strict=True)
        ]
        statuses = [process.wait() for process in processes]
        results = {t: json.loads(f.read_text()) if f.exists() else [] for t, f in zip(targets, files, strict=True)}
    from tests.machine_code.report import document, table

    print(table(results))
    if write:
        DOCUMENT.write_text(document(results, arguments))
    return int(any(statuses))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command's exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    if folder() is None:
        print("machine code was not run: ptx is neither in ../shared/tools beside the checkout nor in LINFAST_PTX")
        return NOT_THERE
    if options.results:
        return run_target(options.target[-1], options)
    return run_targets(options.target or list(CAPABILITIES), arguments, options.write)


if __name__ == "__main__":
    sys.exit(main())
