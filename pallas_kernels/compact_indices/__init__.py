"""Stream compaction: the list of positions that a mask selects."""

from pallas_kernels.compact_indices.api import compact_indices

__all__ = ["compact_indices"]
