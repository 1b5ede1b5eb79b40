"""Mutants of the low-rank product, the bank of latent operators and the depthwise convolution."""

from __future__ import annotations

from .mutant import Mutant

__all__ = ["MUTANTS"]

_LOW_RANK = "tests/ops/test_low_rank_kernel.py"
_BANK = "tests/ops/test_latent_matmul_kernel.py"
_CONV = "tests/ops/test_depthwise_conv_kernel.py"

MUTANTS = (
    Mutant(
        name="low_rank kernel: alpha is left out",
        file="kernels/low_rank.py",
        old="y += alpha * tl.load(",
        new="y += tl.load(",
        breaks="The identity has weight 1 whatever alpha is.",
        tests=(f"{_LOW_RANK}::test_every_size_and_sharing",),
    ),
    Mutant(
        name="low_rank kernel: the last split of V^T x is dropped",
        file="kernels/low_rank.py",
        old="mask=(s < n_splits)[:, None] & (r < RANK)[None, :]",
        new="mask=(s < tl.maximum(n_splits - 1, 1))[:, None] & (r < RANK)[None, :]",
        breaks="With more than one split the last rows are left out.",
        tests=(f"{_LOW_RANK}::test_every_size_and_sharing",),
    ),
    Mutant(
        name="low_rank kernel: partial sums keep seventeen bits",
        file="kernels/low_rank.py",
        old="tl.store(partial_ptr + at, tl.sum(total, 0), mask=r < RANK)",
        new="sums = (tl.sum(total, 0).to(tl.int32, bitcast=True) & -64).to(tl.float32, bitcast=True)\n"
        "    tl.store(partial_ptr + at, sums, mask=r < RANK)",
        breaks="Each split's sum loses its last six bits.",
        tests=(f"{_LOW_RANK}::test_every_size_and_sharing",),
    ),
    Mutant(
        name="low_rank backward: the gradient is projected on V and not on U",
        file="kernels/low_rank.py",
        old="partial = _project(grad, U, grad_t)",
        new="partial = _project(grad, V, grad_t)",
        breaks="dx and dV are those of V V^T.",
        tests=(f"{_LOW_RANK}::test_each_gradient_alone",),
    ),
    Mutant(
        name="low_rank reference: long sums are taken one element after the other",
        file="linfast/ops/low_rank.py",
        old="_SHORTEST_PART = 256",
        new="_SHORTEST_PART = 1 << 30",
        breaks="At N = 12288 the plain form's error is six times as large as with sums in parts.",
        tests=(f"{_LOW_RANK}::test_long_sums_of_the_plain_form_are_taken_in_parts",),
    ),
    Mutant(
        name="latent_matmul kernel: dA lacks an operator's last few rows",
        file="kernels/latent_matmul.py",
        old="n_rows = (end - begin).to(tl.int32)",
        new="n_rows = tl.maximum((end - begin).to(tl.int32) // INNER, 1) * INNER",
        breaks="Rows past the last whole step of 32 add nothing to the operator's gradient.",
        tests=(f"{_BANK}::test_operators_without_rows_and_with_many",),
    ),
    Mutant(
        name="latent_matmul kernel: operands are truncated to tf32",
        file="kernels/latent_matmul.py",
        old="total = dot(z, a, total, PARTS, TYPE)",
        new="z = (z.to(tl.float32).to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True).to(z.dtype)\n"
        "        total = dot(z, a, total, PARTS, TYPE)",
        breaks="The latents lose thirteen bits before the product.",
        tests=(f"{_BANK}::test_every_size",),
    ),
    Mutant(
        name="latent_matmul kernel: an operator that begins inside a tile is left out",
        file="kernels/latent_matmul.py",
        old="if (begin % ROWS == 0) | (begin == tl.load(start_ptr + operator + 1)):",
        new="if begin >= 0:",
        breaks="Its rows up to the next tile are not written.",
        tests=(f"{_BANK}::test_operators_without_rows_and_with_many",),
    ),
    Mutant(
        name="latent_matmul kernel: row by row an index outside the bank gives a product",
        file="kernels/latent_matmul.py",
        old='y = tl.where(known, tl.sum(products, 1), float("nan"))',
        new="y = tl.sum(products, 1)",
        breaks="The row silently gets the product with the first operator.",
        tests=(f"{_BANK}::test_an_index_outside_the_bank",),
    ),
    Mutant(
        name="latent_matmul kernel: splits of dA overlap by a row",
        file="kernels/latent_matmul.py",
        old="end = tl.minimum(begin + share, end)",
        new="end = tl.minimum(begin + share + 1, end)",
        breaks="The first row of each split but an operator's first is added twice.",
        tests=(f"{_BANK}::test_gradients_in_several_splits",),
    ),
    Mutant(
        name="latent_matmul kernel: dA in one part is one long sum of the matrix units",
        file="kernels/latent_matmul.py",
        old="run = dot(grad, z, run, PARTS, TYPE)",
        new="total = dot(grad, z, total, PARTS, TYPE)",
        breaks="Units that truncate each step lose bits of hundreds of steps.",
        tests=(f"{_BANK}::test_long_sums_of_one_part_are_runs_from_zero",),
    ),
    Mutant(
        name="latent_matmul backward: operands of gradients are rounded to the forward's type",
        file="kernels/latent_matmul.py",
        old="Mode.of(z.dtype, precision, gradient_dtype)",
        new="Mode.of(z.dtype, precision, part_dtype)",
        breaks="Under autocast to fp16 a gradient below 2^-25 is zero.",
        tests=(f"{_BANK}::test_fp32_gradients_have_the_range_of_bf16",),
    ),
    Mutant(
        name="latent_matmul backward: a large operator's gradient has as many splits as a small one's",
        file="kernels/latent_matmul.py",
        old="PROGRAMS // (n_operators * tiles)",
        new="PROGRAMS // n_operators",
        breaks="A gradient of 64 MB has 2 GB of sums to add.",
        tests=(f"{_BANK}::test_splits_fill_a_gpu_and_take_little_memory",),
    ),
    Mutant(
        name="latent_matmul: padding is not counted where rows are read one by one",
        file="kernels/latent_matmul.py",
        old="if batch * padded <= ELEMENTS_ALONE:",
        new="if batch * n_out * n_in <= ELEMENTS_ALONE:",
        breaks="Two million rows of four features take two million programs, 99% of whose work is masked.",
        tests=(f"{_BANK}::test_row_by_row_padding_counts",),
    ),
    Mutant(
        name="latent_matmul: kernels run on every AMD GPU",
        file="linfast/ops/latent_matmul.py",
        old="return torch.version.hip is None or target_of(z) is not None",
        new="return True",
        breaks="Triton cannot compile them for a GPU other than gfx942.",
        tests=(f"{_BANK}::test_amd_gpus_without_tf32_run_plain_torch",),
    ),
    Mutant(
        name="latent_matmul: a bank always runs in torch's default mode",
        file="linfast/ops/latent_matmul.py",
        old="mode = mode_on(target_of(z), resolve_precision(z, precision))",
        new='mode = "exact"',
        breaks="The precision that is asked for, or that torch is set to, has no effect.",
        tests=(f"{_BANK}::test_torch_chooses_the_mode", f"{_BANK}::test_every_mode"),
    ),
    Mutant(
        name="latent_matmul reference: rows come back in the order they were sorted into",
        file="linfast/ops/latent_matmul.py",
        old="y.index_select(0, order.argsort())",
        new="y.index_select(0, order)",
        breaks="A row gets another row's product.",
        tests=(f"{_BANK}::test_every_size",),
    ),
    Mutant(
        name="latent_matmul: an index outside the bank is not refused",
        file="linfast/ops/latent_matmul.py",
        old="if low < 0 or high >= n_operators:",
        new="if low < 0 or high > n_operators:",
        breaks="On a CPU an index of K passes the check.",
        tests=(_BANK,),
    ),
    Mutant(
        name="depthwise_conv kernel: an even kernel is centred one row too low",
        file="kernels/depthwise_conv.py",
        old="row = i + sign * (u - (kh - 1) // 2)",
        new="row = i + sign * (u - kh // 2)",
        breaks="With an even number of rows the padding is on the wrong side.",
        tests=(f"{_CONV}::test_every_size", f"{_CONV}::test_every_shape"),
    ),
    Mutant(
        name="depthwise_conv kernel: products of half precision are rounded",
        file="kernels/depthwise_conv.py",
        old="acc += weight * tl.load(x_ptr + x_at, mask=there, other=0.0).to(tl.float32)",
        new="value = tl.load(x_ptr + x_at, mask=there, other=0.0)\n"
        "            acc += (weight.to(value.dtype) * value).to(tl.float32)",
        breaks="fp16 images are multiplied in fp16, and then summed in fp32.",
        tests=(f"{_CONV}::test_half_precision_products_are_not_rounded",),
    ),
    Mutant(
        name="depthwise_conv kernel: pixels of the next row are read past the image's edge",
        file="kernels/depthwise_conv.py",
        old="there = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)\n"
        "            x_at = b * stride_xb + c * stride_xc + row * stride_xh + column * stride_xw\n"
        "            w_at",
        new="there = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width + (row < height - 1))\n"
        "            x_at = b * stride_xb + c * stride_xc + row * stride_xh + column * stride_xw\n"
        "            w_at",
        breaks="The mask lets a tap past the right edge read the next row's first pixel in place of a zero.",
        tests=(f"{_CONV}::test_every_size", f"{_CONV}::test_every_shape"),
    ),
    Mutant(
        name="depthwise_conv backward: every program of a row computes the row's first taps",
        file="kernels/depthwise_conv.py",
        old="column = j + sign * (first + v - (KW - 1) // 2)",
        new="column = j + sign * (v - (KW - 1) // 2)",
        breaks="With more taps in a row than a program computes, the others are copies of the first ones.",
        tests=(f"{_CONV}::test_rows_of_taps_in_several_programs",),
    ),
    Mutant(
        name="depthwise_conv backward: a shared kernel's gradient lacks the last sample",
        file="kernels/depthwise_conv.py",
        old="partial.sum(0)).to(weight.dtype)",
        new="partial[: max(1, len(partial) - 1)].sum(0)).to(weight.dtype)",
        breaks="The sum over samples stops one short.",
        tests=(f"{_CONV}::test_every_size", f"{_CONV}::test_every_shape"),
    ),
)
