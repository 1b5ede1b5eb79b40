"""FrEIA: the coupling blocks GLOW, GIN, RNVP, NICE and one-sided; AllInOneBlock; SequenceINN.

    y1 = x1 e^s + t with (s, t) of x2, then y2 = x2 e^s + t with (s, t) of y1;  s = clamp f_clamp(raw)
    GLOW: one subnet per side gives [raw | t]; GIN: the same, with s minus its mean over the features;
    RNVP: one for raw and one for t; NICE: only t, s = 0; one-sided: only y2, from x1
    AllInOneBlock: y2 = x2 e^s + t,  (raw, t) = subnet(x1) / 10,  s = clamp tanh(raw), minus its mean with GIN;
        then a learned scale and offset, and R; with reverse_pre_permute R^-1 comes first
        R = w_perm, a permutation or any matrix, or w_0 H_1 ... H_k with learned reflections H_i
    m((x,), c=[...], rev=) -> ((y,), log_det [B])

FrEIA multiplies by R; a permutation is an index here. FrEIA stores the learned R in w_perm at every call, and
reads it nowhere else; here w_perm keeps its value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...flows.mix import reflections
from ...flows.undo import Context, Outputs
from ...ops.stack_weights import AffineMap
from ...scale_maps import ScaleMap
from ..adapter import Adapter, Draw, Unfit
from ..chain import Part, chain_adapter, nets_of, part_of, per_sample, put_stubs, run_chain
from ..coupling import Members, couple, coupling_adapter
from ..maps import Maps, listed
from ..sides import ADDITIVE, Affine, Index, Params, Side, Split, Tail, index_of, known_map
from ..unknown import Layers

_ATAN = 0.636  # FrEIA's 2 / pi


def _adapter(where: str, members: Members, **what: Any) -> Adapter:
    """The adapter of a block: ``coupling_adapter`` with FrEIA's one method."""

    def forward(block: Any, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> tuple[Any, Any]:
        def original(z: Tensor) -> tuple[Tensor, Any]:
            (y,), log_det = block._linfast_original.forward(block, (z,), c, rev, jac)
            return y, log_det if isinstance(log_det, Tensor) else None

        found = members(block, block._linfast_plan.layout, c)
        y, log_det = couple(block, found, x[0], rev, original)
        keeps_volume = isinstance(found[0], Side) and found[0].tail.keeps_volume
        return (y,), 0.0 if keeps_volume else log_det

    return coupling_adapter(
        library="FrEIA",
        where=f"FrEIA.modules.{where}",
        members=members,
        methods=({"forward": forward}, _both_ways),
        shapes=lambda block: ((3, block.dims_in[0][0], *(2, 3, 2)[: len(block.dims_in[0]) - 1]),),
        extra=_extra,
        **what,
    )


def _both_ways(block: Any, draw: Draw, shape: tuple[int, ...]) -> list[Tensor]:
    outputs: list[Tensor] = []
    for rev in (False, True):
        c = [draw(shape[0], _extra(block), *shape[2:])] if block.conditional else []
        (y,), log_det = block.forward((draw(*shape),), c, rev=rev)
        outputs += [y, log_det] if isinstance(log_det, Tensor) else [y]
    return outputs


def _extra(block: Any) -> int:
    """The number of channels of the block's conditions."""
    return sum(dims[0] for dims in block.dims_c)


def _check_clamp(block: Any) -> None:
    if not block.clamp > 0:
        raise Unfit(f"its clamp is {block.clamp}: not positive")


def _log_scale(block: Any, f_clamp: Callable[[Tensor], Tensor], gin: bool, raw: Tensor) -> Tensor:
    """s = clamp f_clamp(raw), minus its mean over the features for ``gin``."""
    s: Tensor = block.clamp * f_clamp(raw)
    return s - s.mean(1, keepdim=True) if gin else s


_BLOCKS: dict[str, tuple[str, tuple[tuple[str, tuple[str, ...]], ...]]] = {
    "GLOWCouplingBlock": ("raw_first", (("first", ("subnet2",)), ("second", ("subnet1",)))),
    "GINCouplingBlock": ("raw_first", (("first", ("subnet2",)), ("second", ("subnet1",)))),
    "RNVPCouplingBlock": ("pair", (("first", ("subnet_t2", "subnet_s2")), ("second", ("subnet_t1", "subnet_s1")))),
    "AffineCouplingOneSided": ("raw_first", (("second", ("subnet",)),)),
    "NICECouplingBlock": ("shift", (("first", ("F",)), ("second", ("G",)))),
}
"""By class: the layout of the subnets' output; per side, the half that moves and its subnets' names."""


def _block(name: str) -> Adapter:
    layout, sides = _BLOCKS[name]

    def find(block: Any) -> tuple[str, ScaleMap | None]:
        if layout == "shift":
            return "additive coupling", None
        _check_clamp(block)
        if name == "GINCouplingBlock":
            return "GIN coupling", None
        known: dict[ScaleMap, Callable[[Tensor], Tensor]] = {
            ScaleMap("tanh", block.clamp): torch.tanh,
            ScaleMap("arctan", block.clamp * _ATAN * math.pi / 2): lambda raw: _ATAN * raw.atan(),
        }
        scale_map = known_map("f_clamp", block.f_clamp, known)
        return f"affine coupling, {scale_map.kind if scale_map else 'own f_clamp'}", scale_map

    def members(block: Any, scale_map: ScaleMap | None, c: Sequence[Tensor]) -> list[Side]:
        """The side that moves the first channels and the one that moves the others; one-sided: only the latter."""
        tail = ADDITIVE
        if layout != "shift":
            gin = name == "GINCouplingBlock"
            tail = Tail(layout, scale_map, partial(_log_scale, block, block.f_clamp, gin), keeps_volume=gin)

        def side(moves: str, names: tuple[str, ...]) -> Side:
            nets = tuple(getattr(block, name) for name in names)

            def run(kept: Tensor) -> Params:
                given = torch.cat([kept, *c], 1) if block.conditional else kept
                if len(nets) == 1:
                    params: Tensor = nets[0](given)
                    return params
                raw = nets[1](given)  # first, as in the library, for nets that draw random numbers
                return nets[0](given), raw

            split = Split("halves", moves, block.split_len1, block.channels)
            return Side(split, tail, run, () if block.conditional else nets)

        return [side(moves, names) for moves, names in sides]

    return _adapter(
        "coupling_layers",
        members,
        name=name,
        find=find,
        nets=lambda block: tuple(getattr(block, net) for _, nets in sides for net in nets),
        settings=("clamp", "f_clamp"),
        assumes=() if len(sides) == 1 else ("_coupling1", "_coupling2"),
    )


# AllInOneBlock

_FACTOR = 0.1


def _find_all_in_one(block: Any) -> tuple[str, tuple[Index, Index] | None]:
    """(description, R and its inverse as indices; None where R is another matrix)."""
    _check_clamp(block)
    what = "GIN coupling" if block.GIN else "affine coupling, tanh"
    if block.householder:
        return f"{what}, learned permutation", None
    matrix, back = block.w_perm.flatten(1), block.w_perm_inv.flatten(1)
    eye, post, pre = torch.eye(len(matrix)).to(matrix), matrix.argmax(1), back.argmax(1)
    if not (torch.equal(back, matrix.T) and torch.equal(matrix, eye[post]) and torch.equal(back, eye[pre])):
        return f"{what}, permutation by a matrix", None
    return f"{what}, permutation by index", (Index(post.tolist()), Index(pre.tolist()))


def _rotation(block: Any, back: bool, inverse: bool) -> AffineMap:
    """R, or R^-1 where ``back``."""
    if block.householder:
        vectors = block.vk_householder
        matrix = torch.addmm(block.w_0, block.w_0 @ vectors.mT, reflections(vectors), alpha=-1)
        undo = matrix.mT
    else:
        matrix, undo = block.w_perm.flatten(1), block.w_perm_inv.flatten(1)
    return AffineMap(undo, None, matrix) if back else AffineMap(matrix, None, undo)


def _members_all_in_one(block: Any, layout: tuple[Index, Index] | None, c: Sequence[Tensor]) -> list[Any]:
    def run(kept: Tensor) -> Tensor:
        params: Tensor = block.subnet(torch.cat([kept, *c], 1) if block.conditional else kept)
        params *= _FACTOR  # in place, as the library does
        return params

    def scaling(inverse: bool) -> AffineMap:
        offset = block.global_offset.flatten()
        if block.GIN:
            return AffineMap(torch.ones_like(offset), offset)
        scale = block.global_scale_activation(block.global_scale).flatten()
        return AffineMap(scale, offset)

    scale_map = None if block.GIN else ScaleMap("tanh", block.clamp)
    tail = Tail("raw_first", scale_map, partial(_log_scale, block, torch.tanh, block.GIN))
    split = Split("halves", "second", block.splits[0], block.in_channels)
    side = Side(split, tail, run, () if block.conditional else (block.subnet,), factor=_FACTOR)
    post: Index | Affine
    pre: Index | Affine
    if layout is None:
        per_batch = bool(block.householder)
        pre = Affine(partial(_rotation, block, True), None, True, per_batch)
        post = Affine(partial(_rotation, block, False), None, True, per_batch, pre)
    else:
        post, pre = layout
    return [*([pre] if block.reverse_pre_permute else []), side, Affine(scaling), post]


_ALL_IN_ONE = _adapter(
    "all_in_one_block",
    _members_all_in_one,
    name="AllInOneBlock",
    find=_find_all_in_one,
    nets=lambda block: (block.subnet,),
    masks=lambda block: (block.w_perm, block.w_perm_inv),
    reads_masks=lambda layout: layout is not None,
    settings=("clamp", "GIN", "householder", "reverse_pre_permute"),
    assumes=("_affine", "_construct_householder_permutation", "_permute", "_pre_permute"),
)


# SequenceINN

_flat = listed("module_list")
_MAPS = Maps(
    ("FrEIA",),
    ("forward",),
    {"PermuteRandom": lambda block: index_of(block.perm, block.perm_inv)},
    others=(
        "ActNorm",
        "Fixed1x1Conv",
        "FixedLinearTransform",
        "Flatten",
        "HaarDownsampling",
        "HaarUpsampling",
        "IRevNetDownsampling",
        "IRevNetUpsampling",
        "Reshape",
    ),
    initialises=lambda block: getattr(block, "init_on_next_batch", False),
)
_VOLUME_KEEPING = Maps(("FrEIA",), ("forward",), {}, ("GINCouplingBlock", "NICECouplingBlock", "PermuteRandom"))
"""The classes whose log-determinant FrEIA returns as the number 0."""


def _parts(chain: Any) -> list[Part]:
    return [
        part_of(name, block, _MAPS.known(block), partial(_run_part, condition))
        for (name, block), condition in zip(_flat(chain), chain.conditions, strict=False)
    ]


def _run_part(condition: int | None, block: Any, x: Tensor, context: Context, inverse: bool) -> Outputs:
    named = {} if condition is None else {"c": [context["c"][condition]]}
    (y,), log_det = block((x,), rev=inverse, **named)
    return y, per_sample(log_det, x)


def _sequence(chain: Any, x_or_z: Any, c: Any = None, rev: bool = False, jac: bool = True) -> tuple[Any, Any]:
    x = x_or_z[0] if isinstance(x_or_z, (list, tuple)) else x_or_z
    outputs = run_chain(chain, x, {"c": c if c is None else list(c)}, rev)
    if outputs is None:
        return chain._linfast_original.forward(chain, x_or_z, c, rev, jac)
    y, log_det = outputs
    keeps_volume = all(map(_VOLUME_KEEPING.known, chain.module_list))
    return (y,) if chain.force_tuple_output else y, 0.0 if keeps_volume else log_det


def _both_ways_sequence(chain: Any, draws: Sequence[Tensor], c: Sequence[Tensor] | None) -> list[Tensor]:
    outputs: list[Tensor] = []
    for x, rev in zip(draws, (False, True), strict=True):
        y, log_det = chain.forward(x, c, rev=rev)
        outputs += [*(y if isinstance(y, tuple) else (y,)), 1 + torch.as_tensor(log_det)]  # GIN's is rounding alone
    return outputs


def _probe_sequence(chain: Any, draw: Draw) -> Sequence[Tensor]:
    put_stubs([*chain.module_list], draw)
    used = {where: block.dims_c[0] for block, where in zip(chain.module_list, chain.conditions, strict=True)
            if where is not None}  # fmt: skip
    c = [draw(2, *used.get(i, (1,))) for i in range(max(used, default=-1) + 1)]
    return _both_ways_sequence(chain, [draw(2, *chain.shapes[0]), draw(2, *chain.shapes[-1])], c)


_SEQUENCE = chain_adapter(
    "FrEIA",
    "FrEIA.framework.sequence_inn",
    "SequenceINN",
    _flat,
    partial(_run_part, None),
    _MAPS,
    _parts,
    lambda chain: None if chain.conditions.count(None) == len(chain.conditions) else "it has conditions",
    methods={"forward": _sequence},
    probe=_probe_sequence,
    emptied=lambda chain: nets_of(chain.module_list),
    vectors=lambda chain, draw, features: _both_ways_sequence(chain, [draw(4, features) for _ in range(2)], None),
)

ADAPTERS = (*map(_block, _BLOCKS), _ALL_IN_ONE, _SEQUENCE)

_OTHERS = (
    "GraphINN",
    "HouseholderPerm",
    "InvAutoAct",
    "InvAutoActFixed",
    "InvAutoActTwoSided",
    "InvAutoConv2D",
    "InvAutoFC",
    "LearnedElementwiseScaling",
    "OrthogonalTransform",
    "ReversibleGraphNet",
)
LAYERS = Layers("FrEIA", "FrEIA.modules.base", "InvertibleModule", (*_MAPS.names, *_OTHERS))
