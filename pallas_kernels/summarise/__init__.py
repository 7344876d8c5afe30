"""From tokens to what attention reads: focal rows, merged groups, and the raw window."""

from pallas_kernels.summarise.api import summarise, summarise_blocks
from pallas_kernels.summarise.entries import Entries
from pallas_kernels.summarise.xla import (
  block_scores,
  choose_in_blocks,
  merge,
  take_positions,
  take_rows,
)

__all__ = [
  "Entries",
  "block_scores",
  "choose_in_blocks",
  "merge",
  "summarise",
  "summarise_blocks",
  "take_positions",
  "take_rows",
]
