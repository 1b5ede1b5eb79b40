"""Tables of docs/roofline.md that tests/static/model.py does not cover: they are of counts that are given here.

A latent product takes START for each launch, one after another, and the largest of: each tensor once from and to
device memory at 0.9 of its rate; L2; and products and issue, of which half of the shorter is added to the longer. A
coupling in a launch per linear layer is predicted likewise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.static.flagship import MODES
from tests.static.model import FLAGSHIP, FP32, H100, H200, IN_TURN, MMA_SYNC, START, eager
from tests.static.roofline_text import NOT_YET, measured, ms, or_not_yet, table, us

__all__ = ["backward", "latent", "layers"]

# Instructions of a warp per row of a coupling of D = 256 and H = 512, all three launches, as loops.py counts them.
_LAYERS_ISSUE = {"fast": 710, "tf32": 1240, "high": 2390, "exact": 3000}


def layers() -> str:
    """One coupling of D = 256, H = 512, n = 3 in a launch per linear layer, and by the library, in milliseconds."""
    D, H, B = 256, 512, FLAGSHIP
    shapes = ((H, D // 2), (H, H), (D, H))  # (out, in)

    def cells(mode: str) -> Iterator[str]:
        parts = {"high": 2, "exact": 2}.get(mode, 1)
        size, part = (2 if mode == "fast" else 4), (4 if mode == "tf32" else 2)  # bytes of a number of h, of a part
        columns = 128 if parts == 2 else 256
        products, library = 0.0, 0.0
        memory, l2 = B * 4 * (D // 2 + D), B * 4 * D  # k is read, m read and written
        for i, (n_out, n_in) in enumerate(shapes):
            flop = 2 * B * n_out * n_in
            rate = {"fast": H100.bf16, "tf32": H100.bf16 / 2}.get(mode, FP32)
            moved = B * size * (n_in + n_out)
            library += moved
            products += max(flop / rate, moved / H100.memory / 0.9)
            tiles = n_out // (columns if i < 2 else 128)
            hidden = B * size * ((n_in if i else 0) + (n_out if i < 2 else 0))
            memory += hidden
            l2 += B * ((4 if i == 0 else size) * n_in * tiles + part * parts * n_out * n_in / 128)
            l2 += B * size * n_out if i < 2 else 0
        # Two activations; casts of k in "fast"; the coupling reads parameters and x, and writes y.
        elementwise = B * (4 * H * size + (6 * D // 2 if mode == "fast" else 0) + D * (size + 8))
        flop = 2 * B * sum(n_out * n_in for n_out, n_in in shapes) * (1 if parts == 1 else 3)
        bounds = {
            "memory": memory / H100.memory / 0.9,
            "matrix": flop / (H100.bf16 / (2 if mode == "tf32" else 1)),
            "L2": l2 / H100.l2,
            "issue": B * _LAYERS_ISSUE[mode] / (4 * H100.sms * H100.clock),
        }
        slow = elementwise / H100.memory / 0.9
        yield from (mode, f"{(library + elementwise) / 1e9:.1f}", ms(products), ms(slow), ms(products + slow))
        yield from (f"{memory / 1e9:.1f}", *map(ms, bounds.values()))
        on_chip = sorted((bounds["matrix"], bounds["issue"]))
        time = len(shapes) * START + max(bounds["memory"], bounds["L2"], on_chip[1] + IN_TURN * on_chip[0])
        # Eight couplings of an eighth of the rows are as much work as one of all.
        size_of = {"direction": "forward", "D": D, "depth": 8, "hidden": H, "batch": B // 8}
        found = measured("coupling_flow", "linfast", **size_of) if mode == "exact" else None
        yield from (ms(max(bounds.values())), f"**{ms(time)}**", or_not_yet(found))

    head = (
        "mode, library: GB, products, elementwise, sum, fused: GB, memory, matrix, L2, issue, floor, prediction, "
        "measured"
    )
    return table(head, map(cells, MODES))


class BackwardCounts(NamedTuple):
    """Of the flagship's backward, per row and layer: a warp's instructions, bytes of L2, products of a product."""

    instructions: float
    l2: float
    products: int


# Counted in the code for sm_90 by Triton 3.7.1; bytes of S, of h and act', of d and of dW.
_BACKWARD = {
    "fast": BackwardCounts(15_000 * 8 / 128, 2600 + 3100 + 2800 + 3700, 1),
    "exact": BackwardCounts(35_000 * 8 / 128, 4500 + 5600 + 5200 + 5700, 6),
}


def backward() -> str:
    """The backward of a stack of 8 couplings: bounds in milliseconds, and twice plain torch's forward."""
    work = 8 * FLAGSHIP

    def cells(mode: str) -> Iterator[str]:
        n = _BACKWARD[mode]
        memory = 13.1e3 * FLAGSHIP / H100.memory  # inputs and gradients of steps, x, dx, dL/dy, sums of gradients
        matrix = n.products * 2 * 122_880 * work / H100.bf16  # multiply-adds, with 9% of padding
        issue = n.instructions * work / (4 * H100.sms * H100.clock)
        yield from (mode, f"{n.instructions:,.0f}", f"{n.l2:,.0f}")
        yield from map(ms, (memory, matrix, issue, n.l2 * work / H100.l2))
        yield from (ms(eager(mode, H100)), NOT_YET)  # half of the 16 couplings' forward, twice

    head = "mode, instructions, bytes of L2, memory, matrix, issue, L2 = floor, eager's backward, measured"
    return table(head, map(cells, _BACKWARD))


class LatentOp(NamedTuple):
    """Counts of one call in fp32, "exact".

    Args:
        name: the op and its sizes.
        launches: kernels, one after another.
        memory: bytes of device memory, each tensor once.
        flop: operations, without those that parts or partly filled tiles add.
        products: seconds of matrix units, or of cuBLAS. Other operations are in ``instructions``.
        l2: bytes read and written through L2, where that is more.
        instructions: of warps.
        timed: the case of bench/gpu.sh, and its size.
    """

    name: str
    launches: int
    memory: float
    flop: float
    products: float = 0.0
    l2: float = 0.0
    instructions: float = 0.0
    timed: tuple[str, dict[str, Any]] | None = None


# Instructions per warp are of kernels compiled for sm_90 by Triton 3.7.1, as tests/static/loops.py counts them.
def _bank(K: int, N: int, B: int) -> LatentOp:
    """Rows sorted by operator: at most B / rows + K tiles, counted as full, in six products of parts."""
    few = 16 * max(K, 64) >= B
    rows, warps, around, step, rate = (16, 4, 427, 357, MMA_SYNC) if few else (128, 8, 945, 335, 1.0)
    tiles, columns = B / rows + K, N // 64
    return LatentOp(
        f"latent_matmul, K = {K:,}, N = {N}, B = {B:,}",
        launches=5 + 6,  # of which a sort is 6
        memory=8 * B * N + 4 * K * N * N + 94 * B,  # 94 bytes: the sort and its order
        flop=2 * B * N * N,
        products=6 * 2 * rows * tiles * N * N / (rate * H100.bf16),
        l2=4 * (tiles * N * N + columns * B * N + B * N),
        instructions=warps * tiles * columns * (around + N // 32 * step),
        timed=("latent_matmul", {"K": K, "N": N, "batch": B}),
    )


def _latent_ops() -> Iterator[LatentOp]:
    B, N = 1 << 20, 64
    flop = 2 * B * N * N
    yield LatentOp(
        f"shared A (cuBLAS), N = {N}, B = {B:,}", 1, 8 * B * N, flop, products=flop / FP32,
        timed=("latent_matmul", {"K": 0, "N": N, "batch": B}),
    )  # fmt: skip
    yield LatentOp(f"Diagonal (torch), N = {N}, B = {B:,}", 1, 8 * B * N, B * N)
    B, N = 1024, 512
    yield LatentOp(f"A per sample (cuBLAS), N = {N}, B = {B:,}", 1, 4 * B * N * (N + 2), 2 * B * N * N)
    B, N, K = 8192, 64, 8
    yield LatentOp(
        f"latent_matmul, K = {K}, N = {N}, B = {B:,}: row by row", 1, 8 * B * N + 4 * K * N * N,
        2 * B * N * N, l2=4 * B * N * (N + 2), instructions=4 * B * (192 + N // 32 * 56),
        timed=("latent_matmul", {"K": K, "N": N, "batch": B}),
    )  # fmt: skip
    for K, N, B in ((16, 64, 1 << 20), (16, 512, 1 << 16), (4096, 128, 1 << 14)):
        yield _bank(K, N, B)
    for N, B, splits, tiles in ((1024, 256, 4, 1), (12288, 128, 24, 2)):
        instructions = 4 * B * (splits * (174 + tiles * 66) + N // 256 * 232)
        yield LatentOp(
            f"low_rank, r = 8, N = {N:,}, B = {B}", 2, 19 * 4 * B * N, 4 * B * N * 8, instructions=instructions
        )
    for k, around, step in ((3, 311, 193), (9, 376, 360)):
        images, values = 512 * 64, 512 * 64 * 32 * 32
        yield LatentOp(
            f"depthwise_conv, {k} x {k}, 64 channels of 32 x 32, B = 512", 1, 8 * values, 2 * k * k * values,
            instructions=4 * images * (around + k * step),
            timed=("depthwise_conv", {"C": 64, "side": 32, "k": k, "batch": 512}),
        )  # fmt: skip


def latent() -> str:
    """Latent operators, in microseconds."""

    def cells(op: LatentOp) -> Iterator[str]:
        issue = op.instructions / (4 * H100.sms * H100.clock)
        on_chip = max(op.products, issue) + IN_TURN * min(op.products, issue)
        parts = {
            "memory": op.memory / H100.memory / 0.9,
            "L2": op.l2 / H100.l2,
            "products": op.products,
            "issue": issue,
        }
        yield from (op.name, str(op.launches), f"{op.memory / 1e6:,.0f}", f"{op.flop / 1e9:.2g}")
        yield from (us(part) if part else "" for part in parts.values())
        times = [max(op.memory / gpu.memory / 0.9, parts["L2"], on_chip) for gpu in (H100, H200)]
        yield " / ".join(us(START * op.launches + time) for time in times)
        of_units = sorted({"products": op.products, "issue": issue}.items(), key=lambda part: -part[1])
        held = {name: parts[name] for name in ("memory", "L2")}
        held |= {", ".join(name for name, part in of_units if part): on_chip}
        case, size = op.timed or ("", {})
        found = measured(case, "linfast", direction="forward", **size)
        yield from (max(held, key=held.__getitem__), or_not_yet(found, per=1e3))

    head = "op, launches, MB, GFLOP, memory, L2, products, issue, prediction H100 / H200, held by, measured"
    return table(head, map(cells, _latent_ops()))
