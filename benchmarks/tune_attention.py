"""Times tile sizes of the attention kernels: what `pallas_kernels`' block sizes come from.

    ./workspace bench tune_attention --length=32768 --head_dim=128

Varies one kernel's tile at a time, the others at their defaults; prints the fastest first.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags

from benchmarks._inputs import grouped_inputs, Shape
from benchmarks._queued import compare, Contender
from benchmarks.timing import environment
from dga_jax import DGAConfig
from pallas_kernels.grouped_attention.block_sizes import (
  mosaic_blocks,
  MosaicKeyTile,
  MosaicQueryTile,
  triton_blocks,
  TritonTile,
)
from pallas_kernels.grouped_attention.mosaic_gpu_attention import grouped_attention_mosaic_gpu
from pallas_kernels.grouped_attention.triton_attention import grouped_attention_triton

_LENGTH = flags.DEFINE_integer("length", 32768, "sequence length")
_HEADS = flags.DEFINE_integer("heads", 32, "query heads")
_KV_HEADS = flags.DEFINE_integer("kv_heads", 8, "KV heads")
_HEAD_DIM = flags.DEFINE_integer("head_dim", 128, "head dim")
_SELECTION = flags.DEFINE_enum("selection", "global", ["global", "streaming"], "selection")
_BACKENDS = flags.DEFINE_list("backends", ["mosaic_gpu", "triton"], "what to tune")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "samples of each tile")
_REPEATS = flags.DEFINE_integer("repeats", 3, "calls in a sample")


def main(argv: list[str]) -> None:
  """Prints a ranking for every kernel of every backend."""
  del argv
  print(environment())
  shape = Shape(_LENGTH.value, _HEADS.value, _KV_HEADS.value, _HEAD_DIM.value)
  selection: Any = _SELECTION.value
  config = DGAConfig(selection=selection, min_focal_tokens=0)
  draw = functools.partial(grouped_inputs, shape, config)
  for backend in _BACKENDS.value:
    attention, default, candidates = _search_space(backend, shape)
    for kernel, tiles in candidates.items():
      contenders = {}
      for tile in tiles:
        blocks = dataclasses.replace(default, **{kernel: tile})
        run = _timed(functools.partial(attention, blocks=blocks), shape, config, kernel)
        contenders[str(tile)] = Contender(run, draw)
      timings, refused = compare(contenders, rounds=_ROUNDS.value, repeats=_REPEATS.value, seed=0)
      print(f"\n{backend} {kernel}, {shape}, default {getattr(default, kernel)}")
      for name, times in sorted(timings.items(), key=lambda item: item[1].median):
        print(f"{1e3 * times.median:9.3f} ms  {name}")
      for name, reason in refused.items():
        print(f"  refused  {name}: {reason[:100]}")


def _search_space(backend: str, shape: Shape) -> tuple[Callable[..., Any], Any, dict[str, list]]:
  """The attention, its default blocks, and tiles to try by kernel."""
  if backend == "mosaic_gpu":
    query_tiles = [MosaicQueryTile(*x) for x in itertools.product((64, 96, 128, 192), (2, 3, 4))]
    key_tiles = [MosaicKeyTile(*x) for x in itertools.product((32, 64, 96, 128), (2, 3, 4))]
    candidates: dict[str, list] = {"forward": query_tiles, "dq": query_tiles, "dkdv": key_tiles}
    return grouped_attention_mosaic_gpu, mosaic_blocks(), candidates
  tiles = [
    TritonTile(*x) for x in itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3))
  ]
  default = triton_blocks(shape.D, 2)
  return grouped_attention_triton, default, dict.fromkeys(("forward", "dq", "dkdv"), tiles)


def _timed(
  attention: Callable[..., Any], shape: Shape, config: DGAConfig, kernel: str
) -> Callable[..., Any]:
  """The forward pass, or with the backward pass where that holds the kernel to be tuned."""
  window = config.block_size if config.selection == "streaming" else config.group_size
  call = functools.partial(attention, scale=shape.D**-0.5, group_bias=0.0, max_window=window)

  def run(arrays: Any, bounds: Any) -> Any:
    if kernel == "forward":
      return call(*arrays, bounds)
    out, vjp = jax.vjp(lambda *arrays: call(*arrays, bounds), *arrays)
    return vjp(out)

  return jax.jit(run)


if __name__ == "__main__":
  app.run(main)
