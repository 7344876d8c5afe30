"""One decoding step over a compact cache and the raw tokens beside it."""

from pallas_kernels.decode.api import decode_attention, has_step_kernel, step_in_place
from pallas_kernels.decode.cache_arrays import (
  BlockRule,
  CacheArrays,
  CacheLengths,
  CacheMask,
  GroupBias,
)
from pallas_kernels.decode.quantise import pack_rows, unpack_rows

__all__ = [
  "BlockRule",
  "CacheArrays",
  "CacheLengths",
  "CacheMask",
  "GroupBias",
  "decode_attention",
  "has_step_kernel",
  "pack_rows",
  "step_in_place",
  "unpack_rows",
]
