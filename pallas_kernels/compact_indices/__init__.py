"""The positions of chosen tokens, one after the other."""

from pallas_kernels.compact_indices.api import compact_indices

__all__ = ["compact_indices"]
