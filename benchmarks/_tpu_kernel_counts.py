"""How often each part of a TPU attention kernel runs for one sequence length."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import subjaxprs

from benchmarks._aot_tpu import abstract_mesh, CHIPS
from benchmarks._bundles import Schedule
from benchmarks._inputs import merge
from dga_jax import DGAConfig
from dga_jax.attention.attend import attention_kwargs, Merged
from dga_jax.attention.metadata import prepare, StreamingMetadata
from dga_jax.attention.segments import find_documents
from dga_jax.attention.visibility import Visibility
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
class KernelCount:
  """Computes the bundles that one kernel issues, from its schedule.

  Attributes:
    kernel: a substring of the kernel's name.
    direction: "forward" or "backward".
    bundles: maps the kernel's schedule to the number of issued bundles.
    is_merge: whether the kernel selects or merges tokens, rather than computing attention.
    rows: positions of its last operand or first output, where several kernels have the name.
  """

  kernel: str
  direction: str
  bundles: Callable[[Schedule], float]
  is_merge: bool = False
  rows: int | None = None


def splash_counts(
  L: int, heads: int, kv_heads: int, tiles: tuple[int, int, int]
) -> list[KernelCount]:
  """The kernels of causal splash attention.

  Every pair of a query tile and a key tile is a grid step. The causal mask skips the attention of a
  hidden pair, not its grid step.

  Args:
    L: sequence length.
    heads: query heads.
    kv_heads: KV heads.
    tiles: queries of a tile, keys of a tile, keys of an inner step.
  """
  block_q, block_k, _ = tiles
  first_q, first_k = np.arange(0, L, block_q), np.arange(0, L, block_k)
  visible_pairs = int((first_k[None] < first_q[:, None] + block_q).sum())
  steps = len(first_q) * len(first_k)

  def bundles(schedule: Schedule, outer_tiles: float) -> float:
    parts = schedule.prologue + schedule.epilogue
    body = parts.index(max(parts))
    init_and_store = parts[body - 1] + parts[body + 1]
    each_step = sum(parts) + schedule.small - parts[body] - init_and_store
    return heads * (visible_pairs * parts[body] + outer_tiles * init_and_store + steps * each_step)

  def count(kernel: str, direction: str, outer_tiles: float) -> KernelCount:
    return KernelCount(kernel, direction, lambda schedule: bundles(schedule, outer_tiles))

  # The dkv kernel initializes and stores its accumulators once for each KV head and key tile.
  return [
    count("splash_mha_fwd", "forward", len(first_q)),
    count("splash_mha_dq", "backward", len(first_q)),
    count("splash_mha_dkv", "backward", len(first_k) * kv_heads / heads),
  ]


def dga_counts(
  chip: str, L: int, heads: tuple[int, int, int], D: int, config: DGAConfig
) -> list[KernelCount]:
  """The kernels of DGA under streaming selection, whose key ranges depend only on the length.

  Args:
    chip: a name in CHIPS.
    L: sequence length.
    heads: heads of the query, key and value.
    D: head dim.
    config: DGA's settings, with selection "streaming".
  """
  streaming = prepare(find_documents(1, L, None, None), config).by_selection
  assert isinstance(streaming, StreamingMetadata)
  assert streaming.visibility is not None  # Causal streaming selection has it.
  shapes = [jax.ShapeDtypeStruct((1, L, n, D), jnp.bfloat16) for n in heads]
  return merged_counts(chip, shapes, config, functools.partial(merge, config), streaming.visibility)


def merged_counts(
  chip: str,
  shapes: Sequence[jax.ShapeDtypeStruct],
  config: DGAConfig,
  merge: Callable[..., Merged],
  visibility: Visibility,
) -> list[KernelCount]:
  """The kernels that merge groups, and those that attend to the entries.

  Args:
    chip: a name in CHIPS.
    shapes: of query, key and value.
    config: DGA's settings.
    merge: a function of query, key and value.
    visibility: the ranges of entries that queries see.
  """
  kind, L = CHIPS[chip].kind, shapes[0].shape[1]
  with jax.sharding.use_abstract_mesh(abstract_mesh(kind)):
    query, sources = jax.eval_shape(merge, *shapes)
    grids = grid_steps(lambda *arrays: merge(*arrays).sources.kv, shapes)
  blocks = tpu_blocks(kind, query.dtype.itemsize)
  schedule = schedule_of(blocks, query, sources, **attention_kwargs(query, config, None))
  entries = Entries(*(x for pair in sources.kv for x in pair))
  bounds = pack_bounds(visibility.sources(entries), schedule.group_offset, L)
  return [
    *_attention_counts(bounds, schedule, entries.window_key.shape[1], shapes[1].shape[2]),
    *_merge_counts(grids["group_merge"]),
  ]


def _attention_counts(
  bounds: jax.Array, schedule: TileSchedule, window: int, kv_heads: int
) -> list[KernelCount]:
  """The attention kernels of both passes.

  Args:
    bounds: the packed ranges, of all KV heads at once or of each.
    schedule: sizes of the call.
    window: keys of the window source.
    kv_heads: KV heads.
  """
  heads = kv_heads if schedule.shared_bounds else 1  # that share a row of `bounds`
  queries = _query_side(bounds, schedule, heads)
  summary_tile, window_tile = schedule.summary_grad, schedule.window_grad
  window_ranges = pack_query_ranges(bounds, WINDOW, 0, window, window_tile)
  summaries = _key_side(summary_query_ranges(bounds, schedule), summary_tile, schedule, heads)
  return [
    KernelCount("grouped_attention_forward", "forward", queries),
    KernelCount("grouped_attention_dq", "backward", queries),
    KernelCount("grouped_attention_dkdv_summaries", "backward", summaries),
    KernelCount(
      "grouped_attention_dkdv_window",
      "backward",
      _key_side(window_ranges, window_tile, schedule, heads),
    ),
  ]


def _merge_counts(steps: int) -> list[KernelCount]:
  """The merging kernels of both passes, of `steps` grid steps each."""

  def bundles(schedule: Schedule) -> float:
    # The loop of this kernel runs only for inputs that are not finite.
    return steps * schedule.outside_loops

  return [
    KernelCount("group_merge_grad", "backward", bundles, is_merge=True),
    KernelCount("group_merge", "forward", bundles, is_merge=True),
  ]


def _query_side(
  bounds: jax.Array, tiling: TileSchedule, kv_heads: int
) -> Callable[[Schedule], float]:
  """Bundles of a kernel that loops over keys for each query tile (forward, dq)."""
  packed, max_steps = pack_key_ranges(bounds, tiling, jnp.bfloat16)
  ranges = unpack_key_ranges(packed)
  summary_tiles = (ranges.focal, ranges.group)
  whole = sum(int((tiles.whole_to - tiles.whole_from).sum()) for tiles in summary_tiles)
  masked = sum(int((tiles.edge - tiles.first).sum()) for tiles in summary_tiles) - whole
  pieces = int(jnp.maximum(ranges.pieces - 1, 0).sum())
  query_tiles = ranges.pieces.size
  head_tiles = kv_heads * tiling.splits

  def bundles(schedule: Schedule) -> float:
    *each_step, edges = schedule.prologue
    piece, *finish = schedule.epilogue
    per_tile = edges + sum(finish) + int(max_steps) * (sum(each_step) + schedule.small)
    loops = whole * schedule.loops[0] + masked * schedule.loops[1]
    return head_tiles * (query_tiles * per_tile + loops + pieces * piece)

  return bundles


def _key_side(
  ranges: jax.Array, tile: GradTile, tiling: TileSchedule, kv_heads: int
) -> Callable[[Schedule], float]:
  """Bundles of a kernel that loops over queries for each key tile (dk and dv)."""
  first, whole_from, whole_to, edge = (ranges[:, :, i] for i in range(4))
  whole = int((whole_to - whole_from).sum())
  masked = int((edge - first).sum()) - whole
  max_steps = max(-(-int((edge - first).max()) * tile.block_q // tile.piece), 1)
  steps = first.size * max_steps
  head_tiles = kv_heads * tiling.splits

  def bundles(schedule: Schedule) -> float:
    loops = whole * schedule.loops[0] + masked * schedule.loops[1]
    return head_tiles * (steps * schedule.outside_loops + loops)

  return bundles


def grid_steps(function: Callable[..., Any], shapes: Sequence[Any]) -> dict[str, int]:
  """The number of grid steps of each Pallas kernel that a function calls, by kernel name."""
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
