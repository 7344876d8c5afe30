"""The highest scores of each range of a row, as a mask."""

from pallas_kernels.select.api import select_highest
from pallas_kernels.select.ranges import Ranges

__all__ = ["Ranges", "select_highest"]
