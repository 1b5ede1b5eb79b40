"""Mutants of training without stored activations: undoing, replay, the drift guard, checkpoints and the modes."""

from __future__ import annotations

from .mutant import Mutant

__all__ = ["MUTANTS"]

_LAWS = "tests/laws/test_reversible.py"
_STORED = f"{_LAWS}::test_gradients_are_those_of_the_stored_graph"
_MODELS = "tests/models/test_reversible_training.py"

MUTANTS = (
    Mutant(
        name="reversible: drift is never noticed",
        file="linfast/flows/reversible.py",
        old="if chain.guard.strayed(rebuilt,",
        new="if False and chain.guard.strayed(rebuilt,",
        breaks="Gradients of activations that strayed are returned without a word.",
        tests=(f"{_MODELS}::test_the_guard_redoes_badly_scaled_stacks",),
    ),
    Mutant(
        name="reversible: a shared layer's earlier gradient is overwritten",
        file="linfast/flows/reversible.py",
        old="self._sums[id(tensor)] = grad if before is None else before + grad",
        new="self._sums[id(tensor)] = grad",
        breaks="Of a layer that is used twice only one use counts.",
        tests=(f"{_LAWS}::test_shared_layers_add_their_gradients",),
    ),
    Mutant(
        name="reversible: a segment between checkpoints lacks its last step",
        file="linfast/flows/reversible.py",
        old="range(start, min(start + every, n))",
        new="range(start, max(start + 1, min(start + every, n) - 1))",
        breaks="The redone backward skips a step in each segment.",
        tests=(f"{_MODELS}::test_the_guard_redoes_badly_scaled_stacks",),
    ),
    Mutant(
        name="reversible: the first sums are kept when a backward is redone",
        file="linfast/flows/reversible.py",
        old="                    self._sums.clear()\n",
        new="",
        breaks="Gradients of the strayed pass are added to those of the redone one.",
        tests=(f"{_MODELS}::test_the_guard_redoes_badly_scaled_stacks",),
    ),
    Mutant(
        name="reversible: log_det's gradient reaches the last step alone",
        file="linfast/flows/reversible.py",
        old="            self._add(wanted, found)\n            rows.append",
        new="            self._add(wanted, found)\n            grad_log_det = None\n            rows.append",
        breaks="A likelihood's gradient lacks all log-determinants but the last.",
        tests=(f"{_LAWS}::test_shared_layers_add_their_gradients",),
    ),
    Mutant(
        name="reversible: changed parameters are not noticed",
        file="linfast/flows/reversible.py",
        old="        chain.check_parameters()\n",
        new="",
        breaks="A parameter that was replaced since the forward gives another one's gradient.",
        tests=(f"{_LAWS}::test_a_replaced_parameter_is_an_error",),
    ),
    Mutant(
        name="undo: the forward draws other random numbers than the inverse",
        file="linfast/flows/undo.py",
        old="    generators.set(state)\n",
        new="",
        breaks="With dropout a step's gradient is of another mask than its rebuilt input.",
        tests=(f"{_LAWS}::test_steps_of_any_modules",),
    ),
    Mutant(
        name="replay: random numbers are not those of the first run",
        file="linfast/flows/replay.py",
        old="self._random.append(None if after == self._before else self._before)",
        new="self._random.append(None)",
        breaks="Dropout's masks are drawn anew in the backward.",
        tests=(f"{_LAWS}::test_dropout_is_replayed_and_the_generator_left_alone",),
    ),
    Mutant(
        name="replay: buffers keep what the replay wrote",
        file="linfast/flows/replay.py",
        old="            stack.enter_context(_unwritten(self._written))\n",
        new="",
        breaks="Running statistics are updated a second time in the backward.",
        tests=(f"{_LAWS}::test_buffers_are_written_once",),
    ),
    Mutant(
        name="replay: autocast is not what it was",
        file="linfast/flows/replay.py",
        old="            stack.enter_context(self.autocast())\n            stack.enter_context(backend",
        new="            stack.enter_context(backend",
        breaks="A forward under autocast is undone in fp32.",
        tests=(f"{_LAWS}::test_autocast_is_replayed",),
    ),
    Mutant(
        name="memory: an inverse's steps are in the forward's order",
        file="linfast/flows/memory.py",
        old="return steps[::-1] if inverse else steps",
        new="return steps",
        breaks="The inverse of a flow in memory mode 'invert' undoes the first layer first.",
        tests=(
            "tests/laws/test_reversible.py::test_actnorm_is_initialised_by_a_forward_and_never_by_a_replay",
            "tests/laws/test_reversible.py::test_gradients_are_those_of_the_stored_graph",
        ),
    ),
    Mutant(
        name="memory: 'auto' counts elements and not bytes",
        file="linfast/flows/memory.py",
        old="stored * x.numel() * x.element_size() > AUTO_BYTES",
        new="stored * x.numel() > AUTO_BYTES",
        breaks="A flow in fp32 is stored up to four times the limit.",
        tests=(f"{_LAWS}::test_auto_inverts_what_is_too_large_to_store",),
    ),
    Mutant(
        name="drift: a budget a thousand times too wide",
        file="linfast/flows/drift.py",
        old="torch.float32: 1e-5,",
        new="torch.float32: 1e-2,",
        breaks="fp32 gradients may be off by half a percent before a backward is redone.",
        tests=(_MODELS,),
    ),
    Mutant(
        name="drift: errors are divided by the norm twice",
        file="linfast/flows/drift.py",
        old="relative = moved / kept[:, -1].clamp(min=torch.finfo(kept.dtype).tiny)",
        new="relative = moved / kept[:, -1].square().clamp(min=torch.finfo(kept.dtype).tiny)",
        breaks="The drift of a large tensor is taken for a small one.",
        tests=(f"{_LAWS}::test_checksums_see_drift",),
    ),
)
