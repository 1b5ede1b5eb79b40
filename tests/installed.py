"""Use an installed linfast with its required packages only: ``python installed.py``, away from the checkout.

``tests/test_packaging.py`` runs it on the wheel, and .github/workflows/ci.yml on the wheel and the sdist.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import linfast as lf
from linfast.info import info

torch.manual_seed(0)
x = torch.randn(8, 4)
p = lf.Density(lf.coupling_flow(4, depth=2, hidden=(8,), transform="spline"))
(-p(x).mean()).backward()
assert p.sample(3).shape == (3, 4)

g = lf.coupling_flow(4, depth=2, hidden=(8,), time_features=4)
f = lf.Linearizer(g.at(t=1.0), lf.TimeLowRank(4, rank=2), g.at(t=0.0))
folder = Path(tempfile.mkdtemp())
for number, model in enumerate((p, f)):
    lf.save(model, folder / f"{number}.safetensors")
assert torch.equal(lf.load(folder / "0.safetensors")(x), p(x))
command = [str(Path(sys.executable).with_name("linfast")), "sample", "--checkpoint", str(folder / "1.safetensors")]
subprocess.run([*command, "--count", "5", "--out", str(folder / "x.npy")], check=True, stdout=subprocess.DEVNULL)
assert (folder / "x.npy").stat().st_size > 5 * 4 * 4
for name in ("bench.run", "cli", "compat.linearizer", "examples", "kernels"):
    importlib.import_module(f"linfast.{name}")
assert "precision" in info()
print(Path(lf.__file__).parent)
