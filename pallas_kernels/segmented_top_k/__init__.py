"""The highest scores of each range of a row, as a mask."""

from pallas_kernels.segmented_top_k.api import segmented_top_k
from pallas_kernels.segmented_top_k.segments import Ranges

__all__ = ["Ranges", "segmented_top_k"]
