"""accelerate: make the modules of existing models run on linfast's ops, in place.

    identity.py  who a module is, and whether anyone changed it       mlp.py     recognising MLPs
    adapter.py   what an adapter says; the list of them               tail.py    a coupling in plain torch
    swap.py      changing an object's class, and back                 whole.py   a coupling in one launch
    verify.py    comparing with the original first                    couple.py  which of these runs
    run.py       accelerate and restore                               plain.py   register_adapter
    invert.py    memory="invert", with recall.py                      report.py  the report
    constant_time.py  a time known for the whole batch

Every other file is one library: its formulas, how an instance is recognised, what runs instead.
"""

from . import (
    chains,
    freia,
    freia_all_in_one,
    memcnn,
    nflows,
    normflows,
    normflows_masked,
    reference,
    reference_g,
    reference_sampling,
    reference_song,
    reference_unet,
    zuko,
)
from .adapter import add
from .mlp import MLP, find_mlp
from .plain import register_adapter
from .report import Report, Row
from .run import DEFECTS, accelerate, restore

add(*reference.ADAPTERS, *reference_g.ADAPTERS, reference_sampling.ADAPTER)
add(*reference_unet.ADAPTERS, *reference_song.ADAPTERS)
add(normflows.ADAPTER, normflows_masked.ADAPTER, *nflows.ADAPTERS)
add(*freia.ADAPTERS, freia_all_in_one.ADAPTER, zuko.ADAPTER, *memcnn.ADAPTERS)
add(*chains.ADAPTERS)

__all__ = ["DEFECTS", "MLP", "Report", "Row", "accelerate", "find_mlp", "register_adapter", "restore"]
