"""Mutants of the training losses and the trainer, of saved models, of precision's choice and of work by rows."""

from __future__ import annotations

from .mutant import Mutant

__all__ = ["MUTANTS"]

_FLOW_MATCHING = "tests/training/test_flow_matching.py"
_IDEMPOTENT = "tests/training/test_idempotent.py"
_STYLE = "tests/training/test_style_transfer.py"
_TRAINER = "tests/training/test_trainer.py"
_IO = "tests/models/test_io.py"
_PRECISION = "tests/ops/test_precision.py"
_ROWS = "tests/test_rows.py"

MUTANTS = (
    Mutant(
        name="one_step_loss: time runs from data to noise",
        file="linfast/training/flow_matching.py",
        old="predicted = f.A((1 - weight) * z_0 + weight * z_1, t=t)",
        new="predicted = f.A(weight * z_0 + (1 - weight) * z_1, t=t)",
        breaks="z_t is noise at t = 1 and data at t = 0.",
        tests=(f"{_FLOW_MATCHING}::test_terms_are_their_formulas",),
    ),
    Mutant(
        name="one_step_loss: the likelihood adds log_det",
        file="linfast/training/flow_matching.py",
        old="nll = 0.5 * z.flatten(1).square().sum(1) - log_det",
        new="nll = 0.5 * z.flatten(1).square().sum(1) + log_det",
        breaks="The likelihood term rewards contraction.",
        tests=(f"{_FLOW_MATCHING}::test_likelihood_is_that_of_a_standard_normal",),
    ),
    Mutant(
        name="idempotent_loss: isometry is about the wrong zero",
        file="linfast/training/idempotent.py",
        old="stretch = (z - zero).flatten(1)",
        new="stretch = z.flatten(1)",
        breaks="|g(x)| stands for |g(x) - g(0)|.",
        tests=(f"{_IDEMPOTENT}::test_terms_are_their_formulas",),
    ),
    Mutant(
        name="ModularStyle: interpolation's weights are swapped",
        file="linfast/training/style_transfer.py",
        old="alpha * self.operator(first) + (1 - alpha) * self.operator(second)",
        new="(1 - alpha) * self.operator(first) + alpha * self.operator(second)",
        breaks="alpha = 1 gives the second style.",
        tests=(f"{_STYLE}::test_interpolation_is_of_operators_and_its_ends_are_the_styles",),
    ),
    Mutant(
        name="ModularStyle: rows are decoded in the order they were sorted into",
        file="linfast/training/style_transfer.py",
        old="return self.g.inverse(styled[order.argsort()])",
        new="return self.g.inverse(styled[order])",
        breaks="A row is given another row's image.",
        tests=(f"{_STYLE}::test_rows_are_decoded_by_their_style",),
    ),
    Mutant(
        name="Trainer: a checkpoint lacks the moments of Adam",
        file="linfast/training/trainer.py",
        old='        self.optimizer.load_state_dict(state["optimizer"])\n',
        new="",
        breaks="A resumed run starts Adam afresh.",
        tests=(f"{_TRAINER}::test_resumed_is_uninterrupted_bit_for_bit",),
    ),
    Mutant(
        name="Trainer: every step draws the same rows",
        file="linfast/training/trainer.py",
        old="manual_seed(_seed(settings.seed, self.step))",
        new="manual_seed(_seed(settings.seed))",
        breaks="Training sees one batch.",
        tests=(f"{_TRAINER}::test_every_step_draws_anew",),
    ),
    Mutant(
        name="Trainer: the learning rate is a step late",
        file="linfast/training/trainer.py",
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
        name="save: a module that is used twice is described twice",
        file="linfast/io.py",
        old="    if id(module) in seen:\n",
        new="    if False:\n",
        breaks="A Linearizer's shared g comes back as two.",
        tests=(f"{_IO}::test_a_linearizer_keeps_what_it_shares",),
    ),
    Mutant(
        name="load: NaN weights are accepted",
        file="linfast/io.py",
        old="if value.is_floating_point() and not bool(torch.isfinite(value).all()):",
        new="if False:",
        breaks="A broken training's file loads without a word.",
        tests=(f"{_IO}::test_nan_weights_are_refused",),
    ),
    Mutant(
        name="load: weights come back in the constructor's dtype",
        file="linfast/io.py",
        old="        value.data = value.data.to(tensors[key].dtype)\n",
        new="        pass\n",
        breaks="A model in float64 is rounded to fp32.",
        tests=(_IO,),
    ),
    Mutant(
        name="save: a failed save leaves half a file in the old one's place",
        file="linfast/io.py",
        old="        yield partial\n        os.replace(partial, path)\n",
        new="        os.replace(partial, path)\n        yield str(path)\n",
        breaks="The old model is gone before the new one is written.",
        tests=(f"{_IO}::test_a_failed_save_leaves_the_old_file",),
    ),
    Mutant(
        name="precision: tf32 is on where it was not allowed",
        file="linfast/precision.py",
        old='"high": "tf32" if allowed == "tf32" else "high",',
        new='"high": "tf32",',
        breaks="Products lose thirteen bits without anyone having asked for it.",
        tests=(f"{_PRECISION}::test_tf32_is_never_on_silently",),
    ),
    Mutant(
        name="precision: 'medium' is high mode",
        file="linfast/precision.py",
        old='"medium": "fast"}[setting]',
        new='"medium": "high"}[setting]',
        breaks="torch's medium setting runs three products in place of one.",
        tests=(f"{_PRECISION}::test_torchs_matmul_precision_chooses",),
    ),
    Mutant(
        name="precision: autocast is not asked",
        file="linfast/precision.py",
        old="if x.dtype in _HALF_DTYPES or _autocast_dtype(x) in _HALF_DTYPES:",
        new="if x.dtype in _HALF_DTYPES:",
        breaks="Under autocast fused kernels run in fp32's mode.",
        tests=(f"{_PRECISION}::test_half_precision_input_or_autocast_is_fast",),
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
        breaks="A long batch's log-determinants are other rows'.",
        tests=(f"{_ROWS}::test_a_flow_by_rows_gives_what_it_gives_at_once",),
    ),
    Mutant(
        name="rows: what depends on the whole batch is cut too",
        file="linfast/rows.py",
        old="if not known or len(known) < len(found):",
        new="if not known:",
        breaks="A layer that is not known to take rows one by one is given parts of the batch.",
        tests=(_ROWS,),
    ),
)
