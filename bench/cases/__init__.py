"""Every case; a new one is named here and nowhere else.

Each is imported when it is asked for, so that ``--compare`` still runs the others on a commit that lacks what
one of them needs.
"""

import importlib
from collections.abc import Iterator, Mapping

from ..harness import Case

__all__ = ["CASES"]

_PLACES = {
    **{
        name: (name, "CASE")
        for name in (
            "affine_coupling",
            "channel_mix",
            "coupling_mix",
            "coupling_stack",
            "low_rank",
            "latent_matmul",
            "depthwise_conv",
            "group_norm_silu",
            "conv2d_fused",
            "coupling_flow",
            "linearizer",
            "collapse",
            "reversible",
        )
    },
    "peers": ("coupling_flow", "PEERS_CASE"),
}


class _Cases(Mapping[str, Case]):
    def __getitem__(self, name: str) -> Case:
        module, attribute = _PLACES[name]
        case: Case = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
        return case

    def __iter__(self) -> Iterator[str]:
        return iter(_PLACES)

    def __len__(self) -> int:
        return len(_PLACES)


CASES: Mapping[str, Case] = _Cases()
