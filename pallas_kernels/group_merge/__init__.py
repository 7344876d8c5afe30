"""From tokens to what attention reads: focal rows, merged groups, and the raw window."""

from pallas_kernels.group_merge.api import merge_blocks, merge_groups
from pallas_kernels.group_merge.entries import block_indices, Entries
from pallas_kernels.group_merge.xla import (
  block_scores,
  choose_in_blocks,
  merge,
  take_positions,
  take_rows,
)

__all__ = [
  "Entries",
  "block_indices",
  "block_scores",
  "choose_in_blocks",
  "merge",
  "merge_blocks",
  "merge_groups",
  "take_positions",
  "take_rows",
]
