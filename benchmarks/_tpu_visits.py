"""How often each part of the attention kernels runs at some length."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import subjaxprs

from benchmarks._aot_tpu import abstract_mesh, CHIPS
from benchmarks._bundles import Schedule
from benchmarks._inputs import merge
from dga_jax import DGAConfig
from dga_jax.attention.attend import attention_kwargs
from dga_jax.attention.metadata import prepare, StreamingMetadata
from dga_jax.attention.segments import find_documents
from pallas_kernels.group_merge import Entries
from pallas_kernels.grouped_attention.mosaic_tpu_attention import schedule_of, summary_query_ranges
from pallas_kernels.grouped_attention.mosaic_tpu_blocks import tpu_blocks
from pallas_kernels.grouped_attention.mosaic_tpu_schedule import (
  GradTile,
  pack_bounds,
  pack_key_ranges,
  pack_query_ranges,
  TileSchedule,
  unpack_key_ranges,
  WINDOW,
)


@dataclasses.dataclass(frozen=True)
class Counts:
  """A kernel, found by a part of its name, and how its schedule adds up."""

  kernel: str
  part: str  # "forward" or "backward"
  bundles: Callable[[Schedule], float]
  is_summary: bool = False


def splash_counts(L: int, heads: int, kv_heads: int, tiles: tuple[int, int, int]) -> list[Counts]:
  """Of causal splash attention: it has one grid step for each pair of tiles, seen or not."""
  block_q, block_k, _ = tiles
  first_q, first_k = np.arange(0, L, block_q), np.arange(0, L, block_k)
  seen = int((first_k[None] < first_q[:, None] + block_q).sum())
  steps = len(first_q) * len(first_k)

  def bundles(schedule: Schedule, outer: float) -> float:
    parts = schedule.before + schedule.after
    body = parts.index(max(parts))
    begin_and_end = parts[body - 1] + parts[body + 1]
    each_step = sum(parts) + schedule.small - parts[body] - begin_and_end
    return heads * (seen * parts[body] + outer * begin_and_end + steps * each_step)

  def count(kernel: str, part: str, outer: float) -> Counts:
    return Counts(kernel, part, lambda schedule: bundles(schedule, outer))

  # The kernel that holds keys begins and ends once a KV head and tile of keys.
  return [
    count("splash_mha_fwd", "forward", len(first_q)),
    count("splash_mha_dq", "backward", len(first_q)),
    count("splash_mha_dkv", "backward", len(first_k) * kv_heads / heads),
  ]


def dga_counts(
  chip: str, L: int, heads: tuple[int, int, int], D: int, config: DGAConfig
) -> list[Counts]:
  """Of DGA's kernels in streaming mode, whose ranges follow from the length alone."""
  shapes = [jax.ShapeDtypeStruct((1, L, n, D), jnp.bfloat16) for n in heads]
  with jax.sharding.use_abstract_mesh(abstract_mesh(CHIPS[chip].kind)):
    query, sources = jax.eval_shape(functools.partial(merge, config), *shapes)
    grids = _grids(lambda *arrays: merge(config, *arrays).sources.kv, shapes)
  options = attention_kwargs(query, config, None)
  blocks = tpu_blocks(CHIPS[chip].kind, 2)
  schedule = schedule_of(blocks, query, sources, **options)
  streaming = prepare(find_documents(1, L, None, None), config).by_selection
  assert isinstance(streaming, StreamingMetadata)
  entries = Entries(*(x for pair in sources.kv for x in pair))
  bounds = pack_bounds(streaming.visibility.sources(entries), schedule.group_offset, L)

  queries = _query_side(bounds, schedule, heads[1])
  summary_tile, window_tile = schedule.summary_grad, schedule.window_grad
  window_ranges = pack_query_ranges(bounds, WINDOW, 0, entries.window_key.shape[1], window_tile)
  of_summaries = _key_side(summary_query_ranges(bounds, schedule), summary_tile, schedule, heads[1])
  of_window = _key_side(window_ranges, window_tile, schedule, heads[1])

  def each_step(steps: int) -> Callable[[Schedule], float]:
    # Its loop is for inputs that are not finite.
    return lambda schedule: steps * schedule.straight

  return [
    Counts("grouped_attention_forward", "forward", queries),
    Counts("grouped_attention_dq", "backward", queries),
    Counts("grouped_attention_dkdv_summaries", "backward", of_summaries),
    Counts("grouped_attention_dkdv_window", "backward", of_window),
    Counts("group_merge_grad", "backward", each_step(grids["group_merge"]), True),
    Counts("group_merge", "forward", each_step(grids["group_merge"]), True),
  ]


def _query_side(
  bounds: jax.Array, tiling: TileSchedule, kv_heads: int
) -> Callable[[Schedule], float]:
  packed, most_steps = pack_key_ranges(bounds, tiling, jnp.bfloat16)
  ranges = unpack_key_ranges(packed)
  summaries = (ranges.focal, ranges.group)
  whole = sum(int((tiles.whole_to - tiles.whole_from).sum()) for tiles in summaries)
  rest = sum(int((tiles.edge - tiles.first).sum()) for tiles in summaries) - whole
  pieces = int(jnp.maximum(ranges.pieces - 1, 0).sum())
  query_tiles = ranges.pieces.size
  head_tiles = kv_heads * tiling.splits

  def bundles(schedule: Schedule) -> float:
    *each_step, edges = schedule.before
    piece, *finish = schedule.after
    per_tile = edges + sum(finish) + int(most_steps) * (sum(each_step) + schedule.small)
    loops = whole * schedule.loops[0] + rest * schedule.loops[1]
    return head_tiles * (query_tiles * per_tile + loops + pieces * piece)

  return bundles


def _key_side(
  ranges: jax.Array, tile: GradTile, tiling: TileSchedule, kv_heads: int
) -> Callable[[Schedule], float]:
  first, whole_from, whole_to, edge = (ranges[:, :, i] for i in range(4))
  whole = int((whole_to - whole_from).sum())
  rest = int((edge - first).sum()) - whole
  most_steps = max(-(-int((edge - first).max()) * tile.block_q // tile.piece), 1)
  steps = first.size * most_steps
  head_tiles = kv_heads * tiling.splits

  def bundles(schedule: Schedule) -> float:
    loops = whole * schedule.loops[0] + rest * schedule.loops[1]
    return head_tiles * (steps * schedule.straight + loops)

  return bundles


def _grids(function: Callable[..., Any], shapes: list[Any]) -> dict[str, int]:
  """Steps of each kernel that a function calls."""
  grids: dict[str, int] = {}

  def visit(jaxpr: Any) -> None:
    for equation in jaxpr.eqns:
      if equation.primitive.name == "pallas_call":
        name = equation.params["name"]
        grids[name] = int(np.prod(equation.params["grid_mapping"].grid))
    for inner in subjaxprs(jaxpr):
      visit(inner)

  visit(jax.make_jaxpr(function)(*shapes).jaxpr)
  return grids
