"""Tile sizes of the GPU kernels: a small table of measured ones, a rule for everything else."""

import dataclasses

import jax

H100_MULTIPROCESSORS = 132


@dataclasses.dataclass(frozen=True)
class TritonTile:
  """One program's tile: queries x entries, and how Triton compiles it."""

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


def triton_blocks(head_dim: int, itemsize: int) -> TritonBlocks:
  """Tiles for a (padded) head dim and an operand size in bytes.

  The rule keeps an operand tile at 32 KiB or less, so that two stages of K and V and the query
  tile fit the 164 KiB of shared memory of an A100.
  """
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


@dataclasses.dataclass(frozen=True)
class MosaicQueryTile:
  """Of the kernels that hold queries: entries a step, and steps in flight."""

  block_k: int
  stages: int


@dataclasses.dataclass(frozen=True)
class MosaicKeyTile:
  """Of the kernel that holds entries: queries a step, and steps in flight."""

  block_q: int
  stages: int


@dataclasses.dataclass(frozen=True)
class MosaicBlocks:
  """Tiles of the three Mosaic GPU kernels, and how many programs stay on the GPU."""

  forward: MosaicQueryTile
  dq: MosaicQueryTile
  dkdv: MosaicKeyTile
  programs: int


def mosaic_blocks() -> MosaicBlocks:
  """Tiles whose buffers fit the 227 KiB of shared memory of a Hopper, up to head dim 128.

  On an H100, 32K tokens, head dim 128: forward 2.72 ms with 128 entries a step, 3.22 with 64.
  """
  return MosaicBlocks(
    forward=MosaicQueryTile(block_k=128, stages=2),
    dq=MosaicQueryTile(block_k=64, stages=3),
    dkdv=MosaicKeyTile(block_q=64, stages=2),
    programs=multiprocessors(),
  )


def multiprocessors() -> int:
  """Of the device that is compiled for: the mesh's abstract device, or the default one."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is not None and device.num_cores:
    return int(device.num_cores)
  return int(getattr(jax.devices()[0], "core_count", None) or H100_MULTIPROCESSORS)
