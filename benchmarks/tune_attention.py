r"""Times tile sizes of the GPU attention kernels, and writes the fastest to a table.

    ./workspace bench tune_attention --length=32768 --head_dim=128
    ./workspace bench tune_attention --length=32768 --head_dim=64 --write
    ./workspace bench tune_attention --length=8192 --group_size=126 --focal_per_block=2 \
      --sink_tokens=4 --local_window=8

The tile of one kernel varies while the other kernels keep their current tiles. The output ranks the
tiles, fastest first. --write stores the fastest tiles as the device's entry in
pallas_kernels/grouped_attention/tuned_blocks.json. A new tile must be more than 1 % faster than the
current one. --compile_to and --compiled work as in benchmarks/attention.py.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags
from jax import Array
from tqdm import tqdm

from benchmarks import _aot_gpu
from benchmarks._block_flags import block_config, block_slug
from benchmarks._inputs import Shape, with_gradients
from benchmarks._paired_timing import compare, TimedProgram
from benchmarks.timing import environment
from dga_jax import DGAConfig
from dga_jax.attention.attend import attention_kwargs
from pallas_kernels.grouped_attention import KVSources
from pallas_kernels.grouped_attention.block_sizes import (
  mosaic_blocks,
  MosaicKeyTile,
  MosaicQueryTile,
  TABLE,
  table_key,
  triton_blocks,
  TritonTile,
)
from pallas_kernels.grouped_attention.mosaic_gpu_attention import grouped_attention_mosaic_gpu
from pallas_kernels.grouped_attention.triton_attention import grouped_attention_triton

_LENGTH = flags.DEFINE_integer("length", 32768, "sequence length")
_HEADS = flags.DEFINE_integer("heads", 32, "query heads")
_KV_HEADS = flags.DEFINE_integer("kv_heads", 8, "KV heads")
_HEAD_DIM = flags.DEFINE_integer("head_dim", 128, "head dim")
_SELECTION = flags.DEFINE_enum(
  "selection", "streaming", ["global", "streaming"], "selection mode of the inputs"
)
_BACKENDS = flags.DEFINE_list("backends", ["mosaic_gpu", "triton"], "kernel backends to tune")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "samples for each tile")
_REPEATS = flags.DEFINE_integer("repeats", 10, "queued calls in one sample")
_WRITE = flags.DEFINE_bool("write", False, "write the fastest tiles to tuned_blocks.json")

# A tile replaces the current one below this fraction of its time. Smaller differences are noise.
_MAX_TIME_RATIO = 0.99


def main(argv: list[str]) -> None:
  """Prints a ranking of tiles for each kernel of each backend."""
  del argv
  shape = Shape(_LENGTH.value, _HEADS.value, _KV_HEADS.value, _HEAD_DIM.value)
  compile_only = _aot_gpu.COMPILE_TO.value is not None
  device_kind = "NVIDIA H100 80GB HBM3" if compile_only else jax.devices()[0].device_kind
  if not compile_only:
    print(environment())
  for backend in _BACKENDS.value:
    attention, best, candidates = _search_space(backend, shape, device_kind)
    for kernel, tiles in candidates.items():
      current = getattr(best, kernel)
      attentions: dict[Any, Callable[..., Any]] = {
        tile: functools.partial(attention, blocks=dataclasses.replace(best, **{kernel: tile}))
        for tile in dict.fromkeys([current, *tiles])
      }
      programs, refused = _make_programs(shape, f"{backend} {kernel}", attentions)
      if not compile_only:
        print(f"\n{backend} {kernel}, {shape}, current tile {current}")
        fastest = _rank(programs, refused, current)
        best = dataclasses.replace(best, **{kernel: fastest})
    if _WRITE.value and not compile_only:
      _write(device_kind, table_key(backend, shape.D, 2), dataclasses.asdict(best))


def _rank(programs: dict[Any, TimedProgram], refused: dict[Any, str], current: Any) -> Any:
  """Times the tiles and prints the ranking.

  Returns:
    The fastest tile, or the current tile if the fastest one is at most 1 % faster.
  """
  timings, failed = compare(programs, rounds=_ROUNDS.value, repeats=_REPEATS.value, seed=0)
  ranking = sorted(timings.items(), key=lambda item: item[1].median)
  for tile, times in ranking:
    print(f"{1e3 * times.median:9.3f} ms  {tile}", flush=True)
  for tile, reason in (refused | failed).items():
    print(f"  refused  {tile}: {reason[:100]}")
  fastest, times = ranking[0]
  return fastest if times.median < _MAX_TIME_RATIO * timings[current].median else current


def _make_programs(
  shape: Shape, label: str, attentions: dict[Any, Callable[..., Any]]
) -> tuple[dict[Any, TimedProgram], dict[Any, str]]:
  """The programs by tile, and the error message of each tile that does not compile."""
  config = block_config(_SELECTION.value)
  backend, kernel = label.split()
  sizes = f"{_SELECTION.value}_{shape.L}_{shape.N}_{shape.D}_{block_slug()}"
  programs: dict[Any, TimedProgram] = {}
  refused: dict[Any, str] = {}
  for tile, attention in tqdm(attentions.items(), desc=label, disable=None):
    numbers = "_".join(str(x) for x in dataclasses.astuple(tile))
    try:
      programs[tile] = TimedProgram(
        *_aot_gpu.jit_or_load(
          f"{backend}_{kernel}_{sizes}_{numbers}",
          _timed(attention, shape, config, kernel),
          functools.partial(shape.sources, config),
          inputs_name=f"sources_{sizes}",
        )
      )
    except (FileNotFoundError, NotImplementedError, ValueError) as error:
      refused[tile] = str(error).splitlines()[0]
  return programs, refused


def _search_space(
  backend: str, shape: Shape, device_kind: str
) -> tuple[Callable[..., Any], Any, dict[str, list]]:
  """The attention function, its current blocks, and the tiles to try for each kernel."""
  if backend == "mosaic_gpu":  # The inner dimension of a matrix product is a multiple of 64.
    query_tiles = [MosaicQueryTile(*x) for x in itertools.product((64, 128), (2, 3, 4))]
    key_tiles = [MosaicKeyTile(64, stages) for stages in (2, 3, 4)]
    candidates: dict[str, list] = {"forward": query_tiles, "dq": query_tiles, "dkdv": key_tiles}
    return grouped_attention_mosaic_gpu, mosaic_blocks(device_kind, shape.D), candidates
  sides = [(128, 64), (64, 64), (64, 128), (128, 128)]
  tiles = [TritonTile(*side, *x) for side in sides for x in itertools.product((4, 8), (2, 3))]
  blocks = triton_blocks(device_kind, shape.D, 2)
  return grouped_attention_triton, blocks, dict.fromkeys(("forward", "dq", "dkdv"), tiles)


def _timed(
  attention: Callable[..., Any], shape: Shape, config: DGAConfig, kernel: str
) -> Callable[..., Any]:
  """The timed function: the forward pass, or both passes if `kernel` is a backward kernel."""

  def run(query: Array, sources: KVSources) -> Any:
    call = functools.partial(attention, **attention_kwargs(query, config, None))
    if kernel == "forward":
      return call(query, sources)
    return with_gradients(call, query, sources)[1]

  return run


def _write(device_kind: str, key: str, blocks: dict[str, Any]) -> None:
  table = json.loads(TABLE.read_text())
  table.setdefault(device_kind, {})[key] = blocks
  TABLE.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
  print(f"wrote the entry {key} to {TABLE.name}")


if __name__ == "__main__":
  app.run(main)
