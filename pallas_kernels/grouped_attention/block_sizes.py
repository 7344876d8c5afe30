"""Tile sizes of the GPU kernels: a table of measured ones, and a rule for everything else.

`benchmarks/tune_attention.py --write` measures tiles and writes the table, `tuned_blocks.json`.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

TABLE = pathlib.Path(__file__).with_name("tuned_blocks.json")
H100_MULTIPROCESSORS = 132


@dataclasses.dataclass(frozen=True)
class TritonTile:
  """The tile of one program: queries × keys, and how Triton compiles it."""

  block_q: int
  block_k: int
  num_warps: int
  num_stages: int


@dataclasses.dataclass(frozen=True)
class TritonBlocks:
  """Tiles of the three Triton-lowered kernels."""

  forward: TritonTile
  dq: TritonTile
  dkdv: TritonTile


@dataclasses.dataclass(frozen=True)
class MosaicQueryTile:
  """Tile of a kernel that holds queries: keys of a step, and pipeline stages."""

  block_k: int
  stages: int


@dataclasses.dataclass(frozen=True)
class MosaicKeyTile:
  """Tile of the kernel that holds keys: queries of a step, and pipeline stages."""

  block_q: int
  stages: int


@dataclasses.dataclass(frozen=True)
class MosaicBlocks:
  """Tiles of the three Mosaic GPU kernels."""

  forward: MosaicQueryTile
  dq: MosaicQueryTile
  dkdv: MosaicKeyTile


def triton_blocks(device_kind: str, head_dim: int, itemsize: int) -> TritonBlocks:
  """Tiles for a device, a head dim and an operand size in bytes.

  The default rule keeps an operand tile at 32 KiB or less, so that two stages of K and V and the
  query tile fit the 164 KiB of shared memory of an A100.
  """
  tuned = _tuned(device_kind, "triton", head_dim, itemsize)
  if tuned is not None:
    return TritonBlocks(**{kernel: TritonTile(**tile) for kernel, tile in tuned.items()})
  if itemsize > 2:
    # Exact float32 products unroll into scalar code: small tiles keep its compile time down.
    tile = TritonTile(block_q=32, block_k=16, num_warps=8, num_stages=1)
    return TritonBlocks(forward=tile, dq=tile, dkdv=tile)
  if head_dim > 256:
    tile = TritonTile(block_q=32, block_k=32, num_warps=8, num_stages=1)
    return TritonBlocks(forward=tile, dq=tile, dkdv=tile)
  if head_dim > 128:
    return TritonBlocks(
      forward=TritonTile(block_q=64, block_k=64, num_warps=4, num_stages=2),
      dq=TritonTile(block_q=64, block_k=32, num_warps=8, num_stages=1),
      dkdv=TritonTile(block_q=32, block_k=64, num_warps=8, num_stages=1),
    )
  return TritonBlocks(
    forward=TritonTile(block_q=128, block_k=64, num_warps=8, num_stages=3),
    dq=TritonTile(block_q=128, block_k=64, num_warps=8, num_stages=2),
    dkdv=TritonTile(block_q=64, block_k=128, num_warps=8, num_stages=2),
  )


def mosaic_blocks(device_kind: str, head_dim: int) -> MosaicBlocks:
  """Tiles for a device and a head dim of 64 or 128, with operands of 2 bytes.

  The rule is the fastest setting on an H100 at head dim 128; its buffers fit the 227 KiB of shared
  memory of any Hopper GPU.
  """
  tuned = _tuned(device_kind, "mosaic_gpu", head_dim, 2)
  if tuned is not None:
    return MosaicBlocks(
      forward=MosaicQueryTile(**tuned["forward"]),
      dq=MosaicQueryTile(**tuned["dq"]),
      dkdv=MosaicKeyTile(**tuned["dkdv"]),
    )
  return MosaicBlocks(
    forward=MosaicQueryTile(block_k=128, stages=2),
    dq=MosaicQueryTile(block_k=64, stages=3),
    dkdv=MosaicKeyTile(block_q=64, stages=2),
  )


def table_key(backend: str, head_dim: int, itemsize: int) -> str:
  """The key of a setting in the table of a device."""
  return f"{backend}, head_dim {head_dim}, {itemsize} bytes"


def _tuned(
  device_kind: str, backend: str, head_dim: int, itemsize: int
) -> dict[str, dict[str, int]] | None:
  entry: Any = _table().get(device_kind, {}).get(table_key(backend, head_dim, itemsize))
  return entry


@functools.cache
def _table() -> dict[str, Any]:
  table: dict[str, Any] = json.loads(TABLE.read_text())
  return table
