"""Two processes compute what one computes with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from .distributed_script import train

_ROOT = Path(__file__).parent.parent.parent


def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    done = subprocess.run(
        [*command, "tests.training.distributed_script", str(tmp_path / "two.pt")],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two, one = torch.load(tmp_path / "two.pt", weights_only=True), train()
    for name, expected in one.items():
        for key, value in expected.items():
            torch.testing.assert_close(two[name][key], value, rtol=1e-5, atol=1e-5, msg=f"{name}: {key}")
