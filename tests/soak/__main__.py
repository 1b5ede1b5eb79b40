"""``python -m tests.soak --minutes 30``: train, kill, resume, sample, kill, resume, and compare.

Each cycle trains a tiny model through the command line and samples it. Both are killed at random moments (SIGKILL,
and sometimes SIGINT and SIGTERM), meet second processes that try to write the same files, and resume until they
end by themselves. Their files must then equal those of the same commands uninterrupted. Ends at the first
difference with status 1, and prints where the files are.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import tempfile
import time
from pathlib import Path

from .soak import Failed, Soak, tally


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="after which no cycle begins (default: 30)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the signals (default: the time)")
    parser.add_argument("--kills", type=int, default=8, help="most a command (default: %(default)s)")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    folder = Path(tempfile.mkdtemp(prefix="linfast-soak-"))
    soak, start, cycles = Soak(folder, options.seed, options.kills), time.monotonic(), 0
    try:
        while time.monotonic() < start + 60 * options.minutes:
            cycles += 1
            line = soak.cycle(cycles)
            print(f"cycle {cycles}, {(time.monotonic() - start) / 60:.1f} min: {line}", flush=True)
    except Failed as error:
        print(f"FAILED in cycle {cycles} of seed {options.seed}: {error}")
        return 1
    shutil.rmtree(folder)
    minutes = (time.monotonic() - start) / 60
    print(f"{minutes:.1f} minutes, {cycles} cycles, {tally(soak.done)}: nothing lost, nothing different")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
