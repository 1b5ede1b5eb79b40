"""``python -m tests.fuzz``: the options, the processes that do the work, and the report."""

from __future__ import annotations

import argparse
import ast
import collections
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .worker import KINDS, run_one

WORKER = [sys.executable, "-m", "tests.fuzz.worker"]
_SLICE = 300.0  # seconds of one process, so that memory and compiled code of the libraries do not accumulate
_EVERY = 30.0  # seconds between two lines of progress
_MOST_FINDINGS = 20


class Campaign:
    """Counts, findings and rounds of all processes."""

    def __init__(self, seed: int, seconds: float, calls: float) -> None:
        self.seed, self.calls_wanted = seed, calls
        self.start = self.said = time.monotonic()
        self.end = self.start + seconds
        self.first: collections.Counter[str] = collections.Counter()
        self.calls: collections.Counter[str] = collections.Counter()
        self.by_name: collections.Counter[str] = collections.Counter()
        self.findings: dict[str, str] = {}

    def over(self) -> bool:
        total = sum(self.calls.values())
        return time.monotonic() >= self.end or total >= self.calls_wanted or len(self.findings) >= _MOST_FINDINGS

    def run(self, kinds: list[str], seconds: float) -> None:
        """Run one process. A crash is a finding, and the kind continues with its next round."""
        with tempfile.TemporaryDirectory() as folder:
            draw_file = Path(folder) / "draw"
            options = {
                "kinds": kinds, "seed": self.seed, "first": {k: self.first[k] for k in kinds},
                "seconds": min(seconds, self.end - time.monotonic()),
                "calls": min(self.calls_wanted - sum(self.calls.values()), 1e12), "draw_file": str(draw_file),
            }  # fmt: skip
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            if kinds == ["kernels"]:
                environment["TRITON_INTERPRET"] = "1"
            process = subprocess.Popen(
                [*WORKER, json.dumps(options)],
                stdout=subprocess.PIPE, stderr=(Path(folder) / "errors").open("w"), env=environment, text=True,
            )  # fmt: skip
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    self._heard(json.loads(line))
                if len(self.findings) >= _MOST_FINDINGS:
                    process.kill()
                    process.wait()
                    return
            if process.wait():
                self._crashed(process.returncode, draw_file, (Path(folder) / "errors").read_text(), kinds)

    def _crashed(self, code: int, draw_file: Path, errors: str, kinds: list[str]) -> None:
        if not draw_file.exists():
            raise SystemExit(f"the process of {kinds} did not start:\n{errors[-3000:]}")
        kind, number, recipe = draw_file.read_text().split("\n", 2)
        self.first[kind] = int(number) + 1
        self._found(f"{kind}: the process ended with {code}", kind, recipe, errors[-1500:])

    def _heard(self, event: dict[str, Any]) -> None:
        if "finding" in event:
            self._found(event["finding"], event["kind"], event["recipe"], event["message"])
            return
        self.first[event["kind"]] = event["round"]
        self.calls[event["kind"]] += sum(event["calls"].values())
        self.by_name.update(event["calls"])
        if time.monotonic() - self.said > _EVERY:
            self.say()

    def _found(self, name: str, kind: str, recipe: str, message: str) -> None:
        if name in self.findings:
            return
        self.findings[name] = f'{name}\n    {message}\n    python -m tests.fuzz --only {kind} --try "{recipe}"'
        print(f"FINDING {self.findings[name]}", flush=True)

    def say(self) -> None:
        self.said = time.monotonic()
        kinds = ", ".join(f"{k} {n}" for k, n in self.calls.items())
        print(
            f"{sum(self.calls.values())} calls ({kinds}) in {self.said - self.start:.0f} s, "
            f"{len(self.findings)} findings",
            flush=True,
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=None)
    parser.add_argument("--seconds", type=float, default=None)
    parser.add_argument("--calls", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", action="append", choices=sorted(KINDS), help="a kind; may be given more than once"
    )
    parser.add_argument("--try", dest="recipe", help="one recipe, as a finding's line has it")
    parser.add_argument("--names", action="store_true", help="also say the calls by name")
    return parser.parse_args()


def main() -> int:
    options = _options()
    if options.recipe is not None:
        if options.only == ["kernels"] and os.environ.get("TRITON_INTERPRET") != "1":
            os.environ["TRITON_INTERPRET"] = "1"
            os.execv(sys.executable, [sys.executable, "-m", "tests.fuzz", *sys.argv[1:]])
        judge = run_one(options.only[0], ast.literal_eval(options.recipe))
        print(f"{sum(judge.calls.values())} calls, nothing found")
        return 0
    seconds = options.seconds if options.seconds is not None else 60 * (options.minutes or float("inf"))
    if seconds == options.calls == float("inf"):
        seconds = 60.0
    campaign = Campaign(options.seed, seconds, options.calls)
    kinds = options.only or list(KINDS)
    plain, share = [k for k in kinds if k != "kernels"], KINDS["kernels"] / sum(KINDS[k] for k in kinds)
    length = min(_SLICE, seconds)
    print(f"seed {options.seed}, kinds {', '.join(kinds)}", flush=True)
    while not campaign.over():
        if plain:
            campaign.run(plain, length * (1 - share) if len(plain) < len(kinds) else length)
        if len(plain) < len(kinds) and not campaign.over():
            campaign.run(["kernels"], length * share if plain else length)
    if options.names:
        for name, count in sorted(campaign.by_name.items()):
            print(f"{count:8d}  {name}")
    for number, text in enumerate(campaign.findings.values(), 1):
        print(f"\n{number}. {text}")
    campaign.say()
    return 1 if campaign.findings else 0


if __name__ == "__main__":
    sys.exit(main())
