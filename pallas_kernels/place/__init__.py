"""The positions of chosen tokens, one after the other."""

from pallas_kernels.place.api import place_positions

__all__ = ["place_positions"]
