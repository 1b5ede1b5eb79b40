"""Mutants of training, saved models, the choice of precision, cutting of batches and the benchmarks' check."""

from __future__ import annotations

from .mutant import Mutant

__all__ = ["MUTANTS"]

_FLOW_MATCHING = "tests/training/test_flow_matching.py"
_STYLE = "tests/training/test_style_transfer.py"
_TRAINER = "tests/training/test_trainer.py"
_IO = "tests/models/test_io.py"
_PRECISION = "tests/ops/test_precision.py"
_ROWS = "tests/test_rows.py"
_HARNESS = "tests/bench/test_harness.py"

MUTANTS = (
    Mutant(
        name="one_step_loss: the likelihood adds log_det",
        file="linfast/training/flow_matching.py",
        old="nll = 0.5 * z.flatten(1).square().sum(1) - log_det",
        new="nll = 0.5 * z.flatten(1).square().sum(1) + log_det",
        breaks="The likelihood term rewards contraction.",
        tests=(f"{_FLOW_MATCHING}::test_likelihood_is_that_of_a_standard_normal",),
    ),
    Mutant(
        name="ModularStyle: rows are decoded in the order they were sorted into",
        file="linfast/training/style_transfer.py",
        old="return self.g.inverse(styled[order.argsort()])",
        new="return self.g.inverse(styled[order])",
        breaks="A row gets another row's image.",
        tests=(f"{_STYLE}::test_rows_are_decoded_by_their_style",),
    ),
    Mutant(
        name="Trainer: a checkpoint lacks the moments of Adam",
        file="examples/trainer.py",
        old='        self.optimizer.load_state_dict(state["optimizer"])\n',
        new="",
        breaks="A resumed run restarts Adam.",
        tests=(f"{_TRAINER}::test_resumed_is_uninterrupted_bit_for_bit",),
    ),
    Mutant(
        name="read_checkpoint: the contents are not compared with their digest",
        file="examples/trainer.py",
        old='state.pop("digest", None) == digest(state)',
        new='state.pop("digest", None) is not None',
        breaks="A run resumes from a checkpoint whose contents have changed.",
        tests=("tests/training/test_checkpoint.py::test_damaged_contents_are_refused_before_anything_changes",),
    ),
    Mutant(
        name="Trainer: the learning rate is a step late",
        file="examples/trainer.py",
        old="        for group in self.optimizer.param_groups:\n"
        '            group["lr"] = settings.learning_rate_at(self.step)\n'
        "        self.optimizer.step()\n",
        new="        self.optimizer.step()\n"
        "        for group in self.optimizer.param_groups:\n"
        '            group["lr"] = settings.learning_rate_at(self.step)\n',
        breaks="The first step runs at the peak rate.",
        tests=(_TRAINER,),
    ),
    Mutant(
        name="load: NaN weights are accepted",
        file="linfast/io.py",
        old="if value.is_floating_point() and not bool(torch.isfinite(value).all()):",
        new="if False:",
        breaks="The file of a failed training loads without an error.",
        tests=(f"{_IO}::test_nan_weights_are_refused",),
    ),
    Mutant(
        name="save: a failed save leaves half a file in the old one's place",
        file="linfast/io.py",
        old="        yield str(partial)\n",
        new="        os.replace(partial, path)\n        yield str(path)\n        partial = path\n",
        breaks="The old model is gone before the new one is written.",
        tests=(f"{_IO}::test_a_failed_save_leaves_the_old_file",),
    ),
    Mutant(
        name="load: tensors are contiguous, whatever their strides were",
        file="linfast/state.py",
        old="    room[once] = value[once]\n    return room\n",
        new="    room[once] = value[once]\n    return room.contiguous()\n",
        breaks="Another product of the BLAS runs after loading, and rounds differently.",
        tests=(f"{_IO}::test_tensors_lie_in_memory_as_they_did",),
    ),
    Mutant(
        name="bench check: the reference may be the kernel under test",
        file="bench/rounding.py",
        old="with plain_torch(), Rounding(seed, operands):",
        new="with Rounding(seed, operands):",
        breaks="A kernel that returns zeros is allowed an error of one.",
        tests=(f"{_HARNESS}::test_wrong_kernels_are_refused_where_auto_means_kernels",),
    ),
    Mutant(
        name="rounding: a sum of n terms is one operation",
        file="bench/rounding.py",
        old="size = _EPS / 2 * count.sqrt() * (count > 1)",
        new="size = _EPS / 2 * (count > 1)",
        breaks="A kernel that sums one element after the other is refused.",
        tests=("tests/bench/test_rounding.py",),
    ),
    Mutant(
        name="precision: tf32 is on where it was not allowed",
        file="linfast/dispatch.py",
        old='return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "high"',
        new='return "tf32"',
        breaks="Products lose thirteen bits although nobody has allowed it.",
        tests=(f"{_PRECISION}::test_tf32_is_never_on_silently",),
    ),
    Mutant(
        name="launch: offsets stay 32 bits wide up to 2^32",
        file="kernels/launch.py",
        old="_INT32_ELEMENTS = 2**31",
        new="_INT32_ELEMENTS = 2**32",
        breaks="An offset past 2^31 elements wraps around.",
        tests=("tests/ops/test_affine_coupling_kernel.py::test_int64_is_chosen_past_two_to_the_31_elements",),
    ),
    Mutant(
        name="rows: the parts come back last to first",
        file="linfast/rows.py",
        old="return torch.cat(ys), None if log_dets[0] is None else torch.cat(log_dets)",
        new="return torch.cat(ys), None if log_dets[0] is None else torch.cat(log_dets[::-1])",
        breaks="The log-determinants of a long batch are those of other rows.",
        tests=(f"{_ROWS}::test_a_flow_by_rows_gives_what_it_gives_at_once",),
    ),
    Mutant(
        name="rows: layers that depend on the whole batch are cut too",
        file="linfast/rows.py",
        old="if not known or len(known) < len(found):",
        new="if not known:",
        breaks="A layer whose rows may depend on each other gets parts of the batch.",
        tests=(_ROWS,),
    ),
)
