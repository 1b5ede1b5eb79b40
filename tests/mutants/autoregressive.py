"""Mutants of the kernel of masked autoregressive transforms and of its schedule."""

from __future__ import annotations

from .mutant import Mutant

__all__ = ["MUTANTS"]

_KERNEL = "tests/ops/test_masked_autoregressive_kernel.py"

MUTANTS = (
    Mutant(
        name="masked_autoregressive kernel: a step reads past its prefix",
        file="kernels/masked_steps.py",
        old="read_part_stride, (k < known)[:, None], PARTS",
        new="read_part_stride, (k < padded)[:, None], PARTS",
        breaks="Zero weights meet memory that is not yet written, which may be NaN.",
        tests=(f"{_KERNEL}::test_every_size",),
    ),
    Mutant(
        name="masked_autoregressive kernel: the inverse's log_det has the wrong sign",
        file="kernels/masked_steps.py",
        old="return -log_s",
        new="return log_s",
        breaks="The inverse returns the log-determinant of the forward.",
        tests=(f"{_KERNEL}::test_every_scale_map_and_order",),
    ),
    Mutant(
        name="masked_autoregressive kernel: every second tile of a program is the next program's",
        file="kernels/masked_autoregressive.py",
        old="start = (program + turn * tl.num_programs(0))",
        new="start = (program + turn)",
        breaks="Programs with several tiles skip rows.",
        tests=(f"{_KERNEL}::test_every_batch_and_more_tiles_than_programs",),
    ),
    Mutant(
        name="masked_autoregressive kernel: a value is kept after its activation",
        file="kernels/masked_steps.py",
        old="tl.store(value_at + tl.load(step_ptr + 8) * ROWS, total,",
        new="tl.store(value_at + tl.load(step_ptr + 8) * ROWS, activate(total, ACTIVATION, FORM),",
        breaks="A residual block adds what the next layer reads in place of the value.",
        tests=(f"{_KERNEL}::test_residual_blocks_terms_and_gates",),
    ),
    Mutant(
        name="masked schedule: features of one degree share their parameters' place without waiting",
        file="kernels/masked_schedule.py",
        old=" or (last and layer in written)",
        new="",
        breaks="On a GPU a feature may be inverted by the parameters of the next one of its degree.",
        tests=(f"{_KERNEL}::test_no_step_reads_what_others_wrote_since_all_waited",),
    ),
    Mutant(
        name="masked schedule: a gate is taken from the columns of the term",
        file="kernels/masked_schedule.py",
        old="gate = term + sizes[layer] * bool(kind & TERM)",
        new="gate = term",
        breaks="Where a layer has both, its units are multiplied by their terms.",
        tests=(f"{_KERNEL}::test_residual_blocks_terms_and_gates",),
    ),
)
