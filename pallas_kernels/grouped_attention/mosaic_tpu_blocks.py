"""Tile sizes of the TPU kernels: a small table by chip, and a rule for every other one.

They rest on static schedules (`./workspace bench tpu_static`): no time was measured.
"""

import dataclasses

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class KeyTile:
  """Tile of a kernel that holds keys and loops over queries, all heads of a tile at once."""

  block_k: int  # keys
  rows: int  # heads times queries
  tiles: int  # tiles of queries that are loaded at once


@dataclasses.dataclass(frozen=True)
class TpuBlocks:
  """Tiles of the three kernels. Sizes are powers of two."""

  rows: int  # of a tile of queries: heads times queries
  edge_rows: int  # rows that are computed at once at the edges
  block_k: int  # keys of a tile of summaries
  summaries: int  # bytes of summary keys that are loaded at once at most
  summary_grad: KeyTile
  window_grad: KeyTile
  vmem: int  # bytes that a kernel may use


# An MXU of 128 x 128 is the bottleneck; the vector unit has time to spare.
_NARROW_MXU = TpuBlocks(
  rows=1024,
  edge_rows=256,
  block_k=512,
  summaries=4 * _MIB,
  summary_grad=KeyTile(block_k=512, rows=1024, tiles=2),
  window_grad=KeyTile(block_k=256, rows=512, tiles=4),
  vmem=48 * _MIB,
)
# An MXU of 256 x 256 waits for the vector unit.
_WIDE_MXU = dataclasses.replace(_NARROW_MXU, edge_rows=1024)
_CHIPS = {
  "TPU v5 lite": _NARROW_MXU,
  "TPU v5": _NARROW_MXU,
  "TPU v6 lite": _WIDE_MXU,
  "TPU7x": _WIDE_MXU,
}
# For chips with 16 MiB of VMEM, and for float32.
_SMALL = TpuBlocks(
  rows=512,
  edge_rows=256,
  block_k=256,
  summaries=_MIB // 2,
  summary_grad=KeyTile(block_k=256, rows=256, tiles=1),
  window_grad=KeyTile(block_k=128, rows=256, tiles=1),
  vmem=15 * _MIB,
)


def tpu_blocks(device_kind: str, itemsize: int) -> TpuBlocks:
  """Tiles for a device and an operand size in bytes."""
  return _CHIPS.get(device_kind, _SMALL) if itemsize == 2 else _SMALL
