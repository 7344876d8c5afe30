"""Segmented top-k: the highest scores of each segment of a row, as a mask."""

from pallas_kernels.segmented_top_k.api import segmented_top_k
from pallas_kernels.segmented_top_k.segments import Segments

__all__ = ["Segments", "segmented_top_k"]
