"""AutoregressiveMasks: the degrees of a masked network's units, found from its masks; its weights are packed here.

    degree(feature) = 1 + the largest degree of a feature that its parameters depend on, 1 where there is none
    degree(unit)    = the largest degree of a feature that it depends on, 0 where there is none

Only the masks are read. They may come from any library: random ones, those of a random order of the features, and
those that let several features have one degree.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_count, check_dense, check_flag, check_kind
from ..dispatch import cat, check_values, has_values
from ..kernels.masked_spec import GATE, TERM, MaskedSpec, masked_spec_of, padded

_SEQUENCES = (list, tuple)
_INVERSE = (0, 0, 1.0, 0.0, True, True, "exact")  # a spec's options in a walk, which reads none of them


class AutoregressiveMasks:
    """The masks of a network whose parameters of feature i depend only on features before i, in some order.

    The network has linear layers 1 .. n. Layer l computes value_l = W_l read_{l-1} + b_l from what the layer before
    it gives, read_0 = x. A hidden layer gives read_l = activation(value_l), or value_l itself. The last layer's
    values are the parameters of the features: ``per_feature`` of feature 1, then those of feature 2, and so on.

    Args:
        masks: of layers 1 .. n, at least two; [out, in] each, True or nonzero where a weight is used.
        per_feature: parameters per feature: 2 (shift and raw scale), 1 (shift), or those of another transform.
        activated: for each hidden layer, whether the next layer reads its activation; all by default.
        adds: for each hidden layer, the number (1 .. n - 1) of an earlier hidden layer of equal size whose value is
            added to its own: the end of a residual block. 0 for none, the default.
        raw_first: whether the parameters of a feature are (raw scale, shift), in place of (shift, raw scale).

    Attributes:
        features: D.
        degrees: for each layer from 0 to n - 1 the degrees of its units, a list of integers.
        order: the features in the order of their degrees.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit together, or the parameters of a feature depend on the feature itself.
    """

    def __init__(
        self,
        masks: Sequence[Tensor],
        per_feature: int = 2,
        activated: Sequence[bool] | None = None,
        adds: Sequence[int] | None = None,
        raw_first: bool = False,
    ) -> None:
        _check_masks(masks, per_feature)
        check_flag("raw_first", raw_first)
        hidden = len(masks) - 1
        activated = [True] * hidden if activated is None else activated
        adds = [0] * hidden if adds is None else adds
        for name, given in (("activated", activated), ("adds", adds)):
            check_kind(name, given, _SEQUENCES, "a list")
            if len(given) != hidden:
                raise ValueError(f"{name} must have one entry per hidden layer, {hidden}; got {len(given)}")
        for i, each in enumerate(activated):
            check_flag(f"activated[{i}]", each)
        self.activated = tuple(activated)
        self.adds = tuple([check_count(f"adds[{i}]", each, least=0) for i, each in enumerate(adds)])
        self.features, self.per_feature, self.raw_first = masks[0].shape[1], per_feature, raw_first
        self.shapes = tuple([(int(mask.shape[0]), int(mask.shape[1])) for mask in masks])
        for i, source in enumerate(self.adds):
            if source and not (0 < source <= i and self.shapes[source - 1][0] == self.shapes[i][0]):
                raise ValueError(f"adds[{i}] must be 0 or an earlier hidden layer of equal size; got {source}")
        self._copies: dict[tuple[Hashable, ...], list[Tensor]] = {}
        with torch.inference_mode(False), torch.device("cpu"):  # whatever the mode and the default device
            kept = [mask.detach().cpu() != 0 for mask in masks]
            self._find_degrees(kept)
            self._make_tables(kept)

    def __deepcopy__(self, memo: object) -> AutoregressiveMasks:
        return self  # nothing in it changes

    def __getstate__(self) -> dict[str, Any]:
        """Without the copies, whose devices may be others where they are loaded, and without second views."""
        return vars(self) | {"_copies": {}, "_arrays": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _arrays=_arrays_of(state["_tensors"]))

    def _find_degrees(self, kept: Sequence[Tensor]) -> None:
        """The degrees of all units, their orders, and the cuts of a MaskedSpec."""
        self.degrees = [layer.tolist() for layer in _degrees(kept, self.per_feature, self.adds)]
        self._orders = [torch.tensor(layer).argsort(stable=True) for layer in self.degrees]
        self.order = tuple(self._orders[0].tolist())
        highest, steps, cuts = max(self.degrees[0]), np.arange(max(self.degrees[0]) + 2), []
        for i, layer in enumerate(self.degrees):
            below = np.searchsorted(np.sort(layer), steps)
            if i:  # units of the highest degree reach no parameter
                below = np.minimum(below, below[highest])
                self._orders[i] = self._orders[i][: int(below[-1])]
            cuts += below.tolist()
        self.cuts = tuple(cuts)

    def masks(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """The masks of layers 1 .. n as numbers 1 and 0, copied once to each device."""
        return self._on_device(device, "masks", self._source("masks"), dtype)

    def apply(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """The weights of layers 1 .. n multiplied by their masks."""
        used = self.masks(weights[0].device, weights[0].dtype)
        return [weight * mask for weight, mask in zip(weights, used, strict=True)]

    def _make_tables(self, masks: Sequence[Tensor]) -> None:
        """For every packed weight its index among all weights and biases in turn, and 1 or, where masked, 0."""
        rows = torch.arange(self.shapes[-1][0]).view(self.features, self.per_feature)
        rows = (rows.flip(1) if self.raw_first else rows)[self._orders[0]].flatten()
        index, used, of_biases, at = [], [], [], 0
        for (n_out, n_in), mask, out, into in zip(
            self.shapes, masks, [*self._orders[1:], rows], self._orders, strict=True
        ):
            padding = (0, padded(len(into)) - len(into))
            index.append(F.pad(at + out[:, None] * n_in + into, padding).flatten())
            used.append(F.pad(mask[out][:, into], padding).flatten())
            at += n_out * n_in
            of_biases.append(at + out)
            at += n_out
        of_all = torch.cat([*used, torch.ones(sum(map(len, of_biases)), dtype=torch.bool)])
        of_packed = torch.cat([*index, *of_biases])
        self._tensors = {"masks": list(masks), "index": [of_packed], "used": [of_all], "units": self._orders[1:]}
        self._arrays = _arrays_of(self._tensors)

    def _source(self, name: str) -> list[Any]:
        """Tensors where torch.compile traces the call; elsewhere arrays, as torch.export and FakeTensorMode take no
        tensor that was made outside them."""
        return (self._tensors if torch.compiler.is_dynamo_compiling() else self._arrays)[name]

    def pack(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
        """The packed weights of linfast.kernels.masked_spec, differentiable; a masked weight is 0."""
        parts = []
        for weight, bias in zip(weights, biases, strict=True):
            parts.append(weight.reshape(-1))
            parts.append(weight.new_zeros(weight.shape[0]) if bias is None else bias)
        flat = cat(parts)
        (index,) = self._on_device(flat.device, "index", self._source("index"))
        (used,) = self._on_device(flat.device, "used", self._source("used"), flat.dtype)  # faster than Booleans
        return flat.index_select(0, index) * used

    def pack_extras(
        self, extras: Sequence[tuple[Tensor | None, Tensor | None]]
    ) -> tuple[Tensor | None, tuple[int, ...]]:
        """(all terms and gates in the order of the degrees [B, n], their kinds for MaskedSpec.extras)."""
        kinds = tuple([TERM * (term is not None) + GATE * (gate is not None) for term, gate in extras])
        given = [each for pair in extras for each in pair if each is not None]
        if not given:
            return None, kinds
        place = (given[0].device, None, kinds)
        index = (
            self._copies[place]
            if place in self._copies
            else self._on_device(*place[::2], self._extras_index(kinds))
        )
        return cat(given, 1).index_select(1, index[0]), kinds

    def _extras_index(self, kinds: tuple[int, ...]) -> list[Any]:
        """The columns of all terms and gates in turn, in the order of the degrees."""
        at, index = 0, []
        for units, (n_out, _), kind in zip(self._source("units"), self.shapes, kinds, strict=False):
            for _ in range(kind.bit_count()):
                index.append(at + units)
                at += n_out
        return [torch.cat(index) if isinstance(index[0], Tensor) else np.concatenate(index)]

    def _on_device(
        self, device: torch.device, key: Hashable, source: list[Any], dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        """The tensors or arrays of ``source``, copied once to each device; under torch.compile in its graph."""
        if torch.compiler.is_dynamo_compiling():
            return [tensor.to(device, dtype) for tensor in source]
        place = (device, dtype, key)
        if place not in self._copies:
            with torch.inference_mode(False):  # they are used outside too
                found = [torch.from_numpy(array).to(device, dtype) for array in source]
            if not all(map(has_values, found)):
                return found
            self._copies[place] = found
        return self._copies[place]

    def sort_norms(self, norms: Sequence[tuple[Tensor, Tensor] | None]) -> list[tuple[Tensor, Tensor] | None]:
        """(scale, shift), [H_l] each, of the hidden layers as columns in the order of the degrees."""
        found: list[tuple[Tensor, Tensor] | None] = []
        for norm, order in zip(norms, self._orders[1:], strict=True):
            found.append(None if norm is None else (norm[0][order, None], norm[1][order, None]))
        return found

    def spec(self, extras: tuple[int, ...], *options: object) -> MaskedSpec:
        """The MaskedSpec of these masks with a call's options, ``activation`` and on; by default a walk's."""
        flags, options = tuple(map(int, self.activated)), options or _INVERSE
        highest = len(self.cuts) // len(self.shapes) - 2
        make: Any = MaskedSpec if torch.compiler.is_compiling() else masked_spec_of  # Dynamo traces no cached class
        return make(highest, self.per_feature, self.order, self.cuts, flags, self.adds, extras, *options)


def _arrays_of(tensors: dict[str, list[Tensor]]) -> dict[str, list[Any]]:
    return {name: [t.numpy() for t in each] for name, each in tensors.items()}


def _check_masks(masks: Sequence[Tensor], per_feature: int) -> None:
    check_kind("masks", masks, _SEQUENCES, "a list of tensors")
    if len(masks) < 2:
        raise ValueError(f"masks must have at least two layers; got {len(masks)}")
    check_count("per_feature", per_feature)
    for i, mask in enumerate(masks):
        check_dense(f"masks[{i}]", mask)
        check_values(f"masks[{i}]", mask)
        if mask.ndim != 2 or 0 in mask.shape:
            raise ValueError(f"masks[{i}] must be [out, in]; got {tuple(mask.shape)}")
        if i and mask.shape[1] != masks[i - 1].shape[0]:
            before = masks[i - 1].shape[0]
            raise ValueError(f"masks[{i}] must be [out, {before}], as masks[{i - 1}] has {before} rows; "
                             f"got {tuple(mask.shape)}")  # fmt: skip
    n_out, features = masks[-1].shape[0], masks[0].shape[1]
    if n_out != per_feature * features:
        raise ValueError(
            f"the last mask must have {per_feature} x {features} rows, for {features} features; got {n_out}"
        )


def _degrees(masks: Sequence[Tensor], per_feature: int, adds: Sequence[int]) -> list[Tensor]:
    """The degrees of the units of layers 0 .. n - 1."""
    features = masks[0].shape[1]
    reached = [torch.eye(features, dtype=torch.float32)]  # [H_l, D]: 1 where the unit depends on the feature
    for i, mask in enumerate(masks):
        found = mask.float() @ reached[-1]
        if i < len(adds) and adds[i]:
            found = found + reached[adds[i]]
        reached.append((found > 0).float())
    needs = reached.pop().view(features, per_feature, features).amax(1) > 0
    of_features, missing, degree = torch.zeros(features, dtype=torch.long), needs.sum(1), 0
    while bool((ready := (missing == 0) & (of_features == 0)).any()):
        degree += 1
        of_features[ready] = degree
        missing = missing - needs[:, ready].sum(1)
    if not of_features.all():
        raise ValueError(f"masks are not autoregressive: {_why_not(needs, of_features == 0)}")
    degrees = [of_features, *(torch.where(unit > 0, of_features, 0).amax(1) for unit in reached[1:])]
    for i in reversed(range(len(adds))):  # what is added is sorted as the sum
        if adds[i]:
            degrees[adds[i]] = torch.maximum(degrees[adds[i]], degrees[i + 1])
    _check_sorted(masks, degrees, adds)
    return degrees


def _why_not(needs: Tensor, left: Tensor) -> str:
    """Which features depend on themselves, among those that are left without a degree."""
    of_itself = (needs.diagonal() & left).nonzero()
    if len(of_itself):
        at = int(of_itself[0])
        return f"the parameters of feature {at} depend, through the layers, on feature {at}"
    path = [int(left.nonzero()[0])]
    while path.count(path[-1]) == 1:  # a feature that is left depends on another one that is left
        path.append(int((needs[path[-1]] & left).nonzero()[0]))
    return f"features {' and '.join(map(str, sorted({*path[path.index(path[-1]) :]})))} depend on each other"


def _check_sorted(masks: Sequence[Tensor], degrees: Sequence[Tensor], adds: Sequence[int]) -> None:
    """Raise ValueError where raising the degrees of a residual block's units breaks the order of the degrees."""
    for i, mask in enumerate(masks[:-1]):
        highest = torch.where(mask, degrees[i], 0).amax(1)
        if bool((highest > degrees[i + 1]).any()) or (
            adds[i] and not torch.equal(degrees[adds[i]], degrees[i + 1])
        ):
            raise ValueError(
                f"the degrees of hidden layer {i + 1} do not match those of the residual block's layers"
            )
