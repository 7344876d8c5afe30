"""Decoding over a compact cache: attention of one token per sequence, or a whole step in place."""

from pallas_kernels.decode.api import (
  decode_attention,
  dense_step,
  has_heads_kernel,
  has_step_kernel,
  heads_step,
  step_in_place,
)
from pallas_kernels.decode.cache_arrays import (
  BlockRule,
  CacheArrays,
  CacheLengths,
  CompactHeads,
  GroupBias,
  HeadCache,
  TokenArrays,
  TokenHeads,
  TokenRows,
)
from pallas_kernels.decode.cache_layout import CacheLayout, CacheMask, TokenCoords
from pallas_kernels.decode.quantise import pack_rows, unpack_rows

__all__ = [
  "BlockRule",
  "CacheArrays",
  "CacheLayout",
  "CacheLengths",
  "CacheMask",
  "CompactHeads",
  "GroupBias",
  "HeadCache",
  "TokenArrays",
  "TokenCoords",
  "TokenHeads",
  "TokenRows",
  "decode_attention",
  "dense_step",
  "has_heads_kernel",
  "has_step_kernel",
  "heads_step",
  "pack_rows",
  "step_in_place",
  "unpack_rows",
]
