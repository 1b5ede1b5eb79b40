"""glasflow: its fork of nflows, and its own affine coupling, whose instances hold their scale function."""

from __future__ import annotations

from .nflows import composite_of, coupling_of, masked_of

ADAPTERS = (
    coupling_of("glasflow", "glasflow.nflows.transforms.coupling", "AffineCouplingTransform"),
    coupling_of("glasflow", "glasflow.nflows.transforms.coupling", "AdditiveCouplingTransform"),
    coupling_of("glasflow", "glasflow.transforms.coupling", "AffineCouplingTransform"),
    composite_of("glasflow"),
    *masked_of("glasflow", "glasflow.nflows"),
)
