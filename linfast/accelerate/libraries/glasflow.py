"""glasflow: its fork of nflows, and its own affine coupling, whose instances hold their scale function."""

from __future__ import annotations

from .nflows import composite_of, coupling_of, layers_of, masked_of, spline_coupling_of

ADAPTERS = (
    coupling_of("glasflow", "glasflow.nflows.transforms.coupling", "AffineCouplingTransform"),
    coupling_of("glasflow", "glasflow.nflows.transforms.coupling", "AdditiveCouplingTransform"),
    coupling_of("glasflow", "glasflow.transforms.coupling", "AffineCouplingTransform"),
    spline_coupling_of("glasflow", "glasflow.nflows"),
    composite_of("glasflow"),
    *masked_of("glasflow", "glasflow.nflows"),
)

LAYERS = layers_of("glasflow")
