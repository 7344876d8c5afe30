"""Attention over [focal tokens | merged groups | a raw window], each a range per query."""

from pallas_kernels.grouped_attention.api import grouped_attention, IMPLEMENTATIONS, refusals
from pallas_kernels.grouped_attention.bounds import Bounds

__all__ = ["IMPLEMENTATIONS", "Bounds", "grouped_attention", "refusals"]
