"""The table of docs/one_step.md: one step against many, for every method, and the reference repository's formula.

python -m linfast.bench.one_step > docs/one_step.md
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor

import linfast as lf
from linfast.sampling.integrate import METHODS

_BATCH = 64

_HEAD = """# One step against many

The collapsed operator is compared with the multi-step sampler in float64, for {batch} standard normal latents and
random smooth A_t: `TimeLowRank(N, r)`, its default initialisation plus 0.02 randn on every weight.

- error: relative L2 error of `collapse` in float64
- dB: peak signal-to-noise ratio of `collapse` in float32, with the largest latent as the peak
- formula, dB: the same ratio, in float64, for the Runge-Kutta formula by which the paper's repository collapses
  A_t. It sets k3 = k2 and adds the stages' matrices without composing them (M = I + h/6 (K1 + 4 K2 + K4),
  K = (A_t - I) / (1 - t)). Its formula for euler is exact.

Made by `python -m linfast.bench.one_step > docs/one_step.md` on {device}.
"""


def main() -> None:
    print(_HEAD.format(batch=_BATCH, device=f"{torch.get_num_threads()} CPU thread(s), torch {torch.__version__}"))
    columns = [f"{name}: {what}" for name in METHODS for what in ("error", "dB")]
    print("|".join(["| N | r | steps ", *(f" {c} " for c in columns), " formula, dB |"]))
    print("|" + "---|" * (4 + len(columns)))
    for n in (4, 64, 1024):
        for rank in (1, 8):
            for steps in (2, 5, 100, 1000):
                print(_row(n, rank, steps), flush=True)


@torch.no_grad()
def _row(n: int, rank: int, steps: int) -> str:
    torch.manual_seed(0)
    A = lf.TimeLowRank(n, rank)
    for parameter in A.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    z, wide = torch.randn(_BATCH, n), deepcopy(A).double()
    f = lf.Linearizer(lf.Flow([], features=n), wide)
    cells = [str(n), str(rank), str(steps)]
    for method in METHODS:
        many = lf.sample(f, z.double(), steps, method, one_step=False)
        one = lf.collapse(wide, steps, method)(z.double())
        narrow = lf.collapse(A, steps, method)(z)
        cells += [f"{float((one - many).norm() / many.norm()):.0e}", f"{_psnr(narrow, many):.0f}"]
    return "| " + " | ".join([*cells, f"{_psnr(_repository(wide, z.double(), steps), many):.0f}"]) + " |"


def _repository(A: lf.TimeLowRank, z: Tensor, steps: int) -> Tensor:
    """Apply the formula's M step by step to latents, without forming N x N matrices."""
    h = 1.0 / steps
    for i in range(steps - 1):
        k1, k2, k4 = ((A(z, t=t) - z) / (1 - t) for t in (i * h, (i + 0.5) * h, (i + 1) * h))
        z = z + h / 6 * (k1 + 4 * k2 + k4)
    return z


def _psnr(value: Tensor, truth: Tensor) -> float:
    return float(-20 * torch.log10((value - truth).square().mean().sqrt() / truth.abs().max()))


if __name__ == "__main__":
    main()
