"""Group merging: from tokens to focal tokens, merged groups and the raw window."""

from pallas_kernels.group_merge.api import merge_blocks, merge_groups
from pallas_kernels.group_merge.entries import block_indices, Entries
from pallas_kernels.group_merge.xla import (
  block_scores,
  choose_in_blocks,
  highest_in_blocks,
  merge,
)

__all__ = [
  "Entries",
  "block_indices",
  "block_scores",
  "choose_in_blocks",
  "highest_in_blocks",
  "merge",
  "merge_blocks",
  "merge_groups",
]
