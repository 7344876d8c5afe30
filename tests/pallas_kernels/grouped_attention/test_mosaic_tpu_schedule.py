"""The tiles that the TPU kernels visit, compared with the dense visibility masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_attention import KVSources
from pallas_kernels.grouped_attention.mosaic_tpu_blocks import KeyTile, tpu_blocks, TpuBlocks
from pallas_kernels.grouped_attention.mosaic_tpu_schedule import (
  FOCAL,
  GROUP,
  pack_bounds,
  pack_key_ranges,
  pack_query_ranges,
  TileSchedule,
  unpack_key_ranges,
  WINDOW,
)
from tests.pallas_kernels.grouped_attention.kernel_cases import Case

_TILE = 128
_BLOCKS = TpuBlocks(
  rows=128,
  edge_rows=128,
  block_k=_TILE,
  summaries=2 * _TILE * 64 * 4,
  summary_grad=KeyTile(_TILE, 128, 1),
  window_grad=KeyTile(_TILE, 128, 1),
  vmem=2**24,
)
_CASES = {
  "long": Case(documents=((1500,),), length=1536, focal_rate=0.5, group_size=2),
  "packed": Case(documents=((300, 1, 700, 64), (900,)), length=1100, focal_rate=0.6, group_size=2),
  "masked_row": Case(documents=((), (400,)), length=400),
}


def _packed(case: Case) -> tuple[KVSources, TileSchedule, jax.Array]:
  _, sources, options = case.inputs()
  schedule = TileSchedule.for_call(
    _BLOCKS,
    dtype=jnp.dtype("float32"),
    head_dim=64,
    heads_per_kv=1,
    length=case.length,
    focal=sources.focal.key.shape[1],
    groups=sources.group.key.shape[1],
    max_window=options["max_window"],
    shared_bounds=False,
    scale2=1.0,
    group_bias2=0.0,
  )
  length = -(-case.length // schedule.block_q) * schedule.block_q
  return sources, schedule, pack_bounds(sources, schedule.group_offset, length)


def _seen(packed: jax.Array, b: int, source: int, entries: int) -> np.ndarray:
  """The visibility mask [queries, entries] of one source."""
  start, end = (np.asarray(packed[b, 0, source + i])[:, None] for i in (0, 1))
  entry = np.arange(entries)[None]
  return (start <= entry) & (entry < end)


def _tiles(seen: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
  """For each tile: whether any query sees any entry, and whether all queries see all entries."""
  L, S = seen.shape
  tiled = seen.reshape(L // rows, rows, S // columns, columns)
  return tiled.any(axis=(1, 3)), tiled.all(axis=(1, 3))


@pytest.mark.parametrize("name", _CASES)
def test_query_tiles_visit_exactly_the_tiles_that_they_see(name: str):
  _, schedule, packed = _packed(_CASES[name])
  ranges = unpack_key_ranges(pack_key_ranges(packed, schedule, jnp.dtype("float32"))[0])
  for b in range(packed.shape[0]):
    for source, tile_range in ((FOCAL, ranges.focal), (GROUP, ranges.group)):
      any_seen, all_seen = _tiles(
        _seen(packed, b, source, schedule.summaries), schedule.block_q, _TILE
      )
      for t in range(any_seen.shape[0]):
        first, whole_from, whole_to, edge = (int(x[b, 0, t]) for x in tile_range)
        assert set(np.flatnonzero(any_seen[t])) <= set(range(first, edge + 1))
        assert edge - first <= max(any_seen[t].sum() - 1, 0)  # No invisible tile is visited.
        assert all_seen[t, whole_from:whole_to].all()
        # The edge tile is masked even if all queries see all of it.
        assert whole_to - whole_from >= all_seen[t].sum() - 1


@pytest.mark.parametrize("name", _CASES)
def test_every_visited_tile_is_in_one_visited_block(name: str):
  _, schedule, packed = _packed(_CASES[name])
  numbers, steps = pack_key_ranges(packed, schedule, jnp.dtype("float32"))
  ranges = unpack_key_ranges(numbers)
  B, _, tiles = ranges.pieces.shape
  for b, t in np.ndindex(B, tiles):
    focal, group, blocks = (
      type(x)(*(int(y[b, 0, t]) for y in x)) for x in (ranges.focal, ranges.group, ranges.blocks)
    )
    visited = [int(blocks.at(j)) for j in range(int(blocks.count))]
    assert len(visited) == len(set(visited)) <= int(steps)
    needed = {x // schedule.tiles_per_block for r in (focal, group) for x in range(r.first, r.edge)}
    assert needed <= set(visited)


@pytest.mark.parametrize("name", _CASES)
def test_window_pieces_contain_the_visible_tokens(name: str):
  sources, schedule, packed = _packed(_CASES[name])
  ranges = unpack_key_ranges(pack_key_ranges(packed, schedule, jnp.dtype("float32"))[0])
  entries = -(-int(sources.window.end.max()) // _TILE) * _TILE
  for b in range(packed.shape[0]):
    seen = _seen(packed, b, WINDOW, entries)
    for t in range(ranges.pieces.shape[2]):
      columns = np.flatnonzero(seen[t * schedule.block_q : (t + 1) * schedule.block_q].any(axis=0))
      first, pieces = int(ranges.window_from[b, 0, t]), int(ranges.pieces[b, 0, t])
      if columns.size:
        assert first <= columns[0]
        assert columns[-1] < first + pieces * schedule.window


@pytest.mark.parametrize("name", _CASES)
def test_key_tiles_visit_the_queries_that_see_them(name: str):
  _, schedule, packed = _packed(_CASES[name])
  tile = schedule.window_grad
  entries = 1536
  query_ranges = pack_query_ranges(packed, WINDOW, 0, entries, tile)
  for b in range(packed.shape[0]):
    any_seen, all_seen = _tiles(_seen(packed, b, WINDOW, entries), tile.block_q, tile.block_k)
    for e in range(any_seen.shape[1]):
      first, whole_from, whole_to, edge = (int(query_ranges[b, 0, i, e]) for i in range(4))
      assert set(np.flatnonzero(any_seen[:, e])) <= set(range(first, edge))
      assert all_seen[whole_from:whole_to, e].all()
      assert whole_to - whole_from == all_seen[:, e].sum()


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x", "TPU v4"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tile_sizes_of_a_chip_are_compatible(kind: str, itemsize: int):
  blocks = tpu_blocks(kind, itemsize)
  numbers = [blocks.rows, blocks.edge_rows, blocks.block_k]
  numbers += [x for tile in (blocks.summary_grad, blocks.window_grad) for x in vars(tile).values()]
  assert all(x & (x - 1) == 0 for x in numbers)
  assert 512 <= blocks.rows <= 1024
