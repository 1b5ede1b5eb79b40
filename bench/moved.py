"""Names of linfast that stood elsewhere in older commits, on which ``--compare`` runs these benchmarks too."""

__all__ = ["has_kernels", "plain_torch"]

try:
    from linfast.dispatch import has_kernels, plain_torch
except ModuleNotFoundError:
    from linfast.backend import has_kernels, plain_torch  # type: ignore[import-not-found, no-redef]
