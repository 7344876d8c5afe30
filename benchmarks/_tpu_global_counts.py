"""How often each part of the TPU kernels runs under global selection.

The ranges that queries see depend on the selected tokens. The counts are for random keys and
queries from a normal distribution, with one query head for each KV head.

Parts of a kernel that run only in some grid steps are counted in every step, except those of the
importance and attention kernels. Counts of the other kernels are therefore upper bounds.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._bundles import Schedule, SMALL
from benchmarks._tpu_kernel_counts import KernelCount, merged_counts
from dga_jax import DGAConfig, plan_groups
from dga_jax.attention.attend import merge_planned
from dga_jax.attention.plan import GroupPlan
from pallas_kernels.group_merge.mosaic_tpu_row_gather import ALIGNED, RowSizes
from pallas_kernels.importance.mosaic_tpu_importance import ImportanceBlocks
from pallas_kernels.mosaic_tpu_common import LANES

_ITEMSIZE = 2  # bfloat16


def global_counts(
  chip: str, L: int, heads: tuple[int, int, int], D: int, config: DGAConfig
) -> list[KernelCount]:
  """The kernels of DGA under global selection.

  Args:
    chip: a name in CHIPS.
    L: sequence length.
    heads: heads of the query, key and value.
    D: head dim.
    config: DGA's settings, with selection "global".
  """
  H, N, _ = heads
  plan = _random_plan(L, N, D, config)
  shapes = [jax.ShapeDtypeStruct((1, L, n, D), jnp.bfloat16) for n in heads]
  merge = functools.partial(merge_planned, plan=plan)
  return [
    importance_count(L, H, N, config),
    _top_k_count(L, N),
    _compact_count(L, N),
    *_row_move_counts(plan, L, (H, N), D),
    *merged_counts(chip, shapes, config, merge, plan.visibility),
  ]


def _random_plan(L: int, N: int, D: int, config: DGAConfig) -> GroupPlan:
  query, key = (
    jax.random.normal(x, (1, L, N, D), jnp.bfloat16) for x in jax.random.split(jax.random.key(0))
  )
  return plan_groups(query, key, config=config)


def importance_count(L: int, H: int, N: int, config: DGAConfig) -> KernelCount:
  """Each pass has one part for a tile; between the two is the part that combines the lanes."""
  rows = (config.n_recent + config.n_random) * (H // N)
  blocks = ImportanceBlocks().for_call(rows, L)
  tiles, row_blocks = -(-L // blocks.block_k), blocks.padded_rows(rows) // blocks.block_q

  def bundles(schedule: Schedule) -> float:
    parts = schedule.loops or schedule.prologue  # A loop over one block of rows is unrolled.
    first, second = sorted(sorted(range(len(parts)), key=parts.__getitem__)[-2:])
    combine = sum(parts[first + 1 : second])
    each_step = sum(parts) - parts[first] - combine - parts[second]
    if schedule.loops:
      each_step = sum(schedule.prologue) + sum(schedule.epilogue)
    passes = row_blocks * (parts[first] + parts[second])
    return N * (tiles * passes + row_blocks * combine + 2 * tiles * (each_step + schedule.small))

  return KernelCount("importance", "forward", bundles, is_merge=True)


def _top_k_count(L: int, N: int) -> KernelCount:
  """At most 32 bits of a threshold, the tied positions, and two more passes over a row."""
  tiles = -(-L // (32 * LANES))
  passes = 32 + math.ceil(math.log2(L)) + 2

  def bundles(schedule: Schedule) -> float:
    tile = max([SMALL, *schedule.prologue, *schedule.loops])
    return N * (schedule.outside_loops + tiles * passes * tile)

  return KernelCount("segmented_top_k", "forward", bundles, is_merge=True)


def _compact_count(L: int, N: int) -> KernelCount:
  """A row is compacted in runs of 256 positions."""
  runs = -(-L // 256)
  return KernelCount(
    "compact_indices",
    "forward",
    lambda schedule: N * runs * schedule.outside_loops,
    is_merge=True,
  )


def _row_move_counts(plan: GroupPlan, L: int, heads: tuple[int, int], D: int) -> list[KernelCount]:
  """The gathers of members, focal tokens and queries, and the scatters of their gradients."""
  (H, N), layout = heads, plan.layout
  row = max(D, LANES) * _ITEMSIZE
  moved = (
    (np.asarray(layout.member_index).reshape(1, N, -1), 2 * row),
    (np.asarray(layout.focal_index), 2 * row),
    (np.asarray(layout.group_query), H // N * row),
  )
  counts = []
  for index, row_bytes in moved:
    S = index.shape[-1]
    for kernel, direction, sizes in (
      ("gather_rows", "forward", RowSizes.for_gather(S, L, row_bytes)),
      ("scatter_rows", "backward", RowSizes.for_scatter(S, L, row_bytes)),
    ):
      bundles = _move_bundles(index, L, sizes)
      counts.append(KernelCount(kernel, direction, bundles, is_merge=True, rows=S))
  return counts


def _move_bundles(index: np.ndarray, L: int, sizes: RowSizes) -> Callable[[Schedule], float]:
  """Bundles of a gather or scatter: all parts in every grid step, and the further runs of units."""
  B, N, S = index.shape
  steps = B * N * (-(-S // sizes.tile) + -(-L // sizes.chunk) - 1)
  further = further_runs(index, L, sizes)

  def bundles(schedule: Schedule) -> float:
    # The last loop runs only for inputs that are not finite; the others are one for each unit.
    return steps * schedule.outside_loops + further * schedule.loops[0]

  return bundles


def further_runs(index: np.ndarray, L: int, sizes: RowSizes) -> int:
  """Runs of positions after the first of each unit of indices in each chunk."""
  S = index.shape[-1]
  padded = np.pad(index, ((0, 0), (0, 0), (0, -S % sizes.unit)), constant_values=L)
  units = padded.reshape(-1, sizes.unit)
  units = units[units[:, 0] < L]  # Indices ascend, and L is an empty slot.
  first, last = units[:, 0], np.where(units < L, units, -1).max(axis=1)
  further = 0
  for chunk in range(-(-L // sizes.chunk)):
    begin = chunk * sizes.chunk
    low = np.maximum(first // ALIGNED * ALIGNED - begin, 0)
    end = np.minimum((last // ALIGNED + 1) * ALIGNED - begin, sizes.chunk)
    further += int(np.maximum(-(-(end - low) // sizes.run) - 1, 0).sum())
  return further
