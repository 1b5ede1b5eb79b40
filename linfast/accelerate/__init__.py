"""accelerate: make the modules of existing models run on linfast's ops, in place.

engine.py           accelerate and restore: one walk over a model
report.py           what they did, as a table
adapter.py          what is known of one class; all adapters by class
identity.py         whether a module is what its library made of it
swap.py             changing an object's class, and back
verify.py           comparing with the original before anything is swapped
sides.py            one side of a coupling, as a formula, and the maps between couplings
coupling.py         what runs a coupling that is in no chain
chain.py            the adapters of chains; memory="invert", with evaluate_once.py
fused.py            a chain's couplings in one loop on a CPU, with launch.py in one launch on a GPU
mlp.py              recognising conditioners as MLPs
libraries/          one file per library: its couplings and its chain; plain.py is register_adapter
reference*.py       the research repository's modules
"""

from . import reference_g, reference_linear, reference_unet
from .adapter import add
from .engine import DEFECTS, accelerate, restore
from .libraries import freia, glasflow, memcnn, nflows, normflows, zuko
from .libraries.plain import register_adapter
from .mlp import MLP, find_mlp
from .report import Report, Row

for _library in (reference_g, reference_linear, reference_unet):
    add(*_library.ADAPTERS)
for _library in (freia, glasflow, memcnn, nflows, normflows, zuko):
    add(*_library.ADAPTERS)

__all__ = ["DEFECTS", "MLP", "Report", "Row", "accelerate", "find_mlp", "register_adapter", "restore"]
