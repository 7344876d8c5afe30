"""Global and random selection on a sequence split over devices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dga_jax.attention.attend import merge_scale
from dga_jax.attention.context_parallel.ragged_all_gather import collect, GatherPlan, places
from dga_jax.attention.context_parallel.scores import sharded_importance_scores
from dga_jax.attention.context_parallel.zigzag import ZigzagShards
from dga_jax.attention.layout import Layout
from dga_jax.attention.metadata import AttentionMetadata, RankingMetadata
from dga_jax.attention.plan import GroupPlan
from dga_jax.attention.scores import random_scores
from dga_jax.attention.selection import select_by_score
from dga_jax.attention.visibility import Visibility
from dga_jax.config import DGAConfig
from pallas_kernels.dispatch import Implementation
from pallas_kernels.gather import take_rows
from pallas_kernels.group_merge import Entries, merge_groups
from pallas_kernels.grouped_attention import KVSources


def global_sources(
  query: Float[Array, "B P H D"],
  key: Float[Array, "B P N D"],
  value: Float[Array, "B P N D"],
  metadata: AttentionMetadata,
  shards: ZigzagShards,
  *,
  implementation: Implementation,
) -> KVSources:
  """What one device's queries attend to, and the ranges that each of them sees of it.

  Scores are gathered, so that every device makes the same plan. A focal token is sent by the
  device that holds it, a group by the device that holds its last member. Members of a group that
  began before a chunk, fewer than m, are fetched from the devices that hold them.
  """
  config, documents, ranking = metadata.config, metadata.documents, metadata.by_selection
  assert isinstance(ranking, RankingMetadata)
  if ranking.samples is not None:
    scores_BxNxL = sharded_importance_scores(query, key, ranking.samples, shards)
  else:
    scores_BxNxL = random_scores(documents, key.shape[2], config.seed)
  selection = select_by_score(scores_BxNxL, documents, ranking.quotas, config)
  plan = GroupPlan.from_selection(selection, metadata)
  split = _Split.of(plan, shards)

  # Keys and values travel together, side by side in the last axis.
  both = jnp.concatenate([key, value], axis=-1)
  both = jnp.concatenate([split.open_groups(both), both], axis=1)
  before = 2 * global_halo(config)
  key, value = jnp.split(both, 2, axis=-1)
  _, made = merge_groups(
    jnp.pad(query, ((0, 0), (before, 0), (0, 0), (0, 0))),
    key,
    value,
    *split.own_indices(),
    scale=merge_scale(config, query.shape[-1]),
    reorder_window=False,
    implementation=implementation,
  )
  focal, group = split.gather(
    jnp.concatenate([made.focal_key, made.focal_value], axis=-1),
    jnp.concatenate([made.group_key, made.group_value], axis=-1),
  )
  window = take_rows(both, split.window_index())
  entries = [half for x in (focal, group, window) for half in jnp.split(x, 2, axis=-1)]
  return split.visibility().sources(Entries(*entries))


def global_halo(config: DGAConfig) -> int:
  """Members before a chunk that may belong to a group which ends in it; at least 1."""
  return max(1, config.group_size - 1)


class _Chunks(NamedTuple):
  """For each chunk, where its part of the sequence's lists begins."""

  focal: Int[Array, "B N bounds"]  # in the list of focal tokens
  member: Int[Array, "B N bounds"]  # in the list of group members

  def groups(self, size: int) -> Int[Array, "B N bounds"]:
    """In the list of groups, each counted where its last member is."""
    return self.member // size


class _Split(NamedTuple):
  """How the sequence's focal tokens, groups and window lists are spread over the devices."""

  plan: GroupPlan
  chunks: _Chunks
  pieces: ZigzagShards

  @classmethod
  def of(cls, plan: GroupPlan, pieces: ZigzagShards) -> "_Split":
    def starts(chosen_BxNxL: Array) -> Array:
      B, N, _ = chosen_BxNxL.shape
      count = chosen_BxNxL.reshape(B, N, -1, pieces.chunk).sum(axis=-1, dtype=jnp.int32)
      return jnp.pad(jnp.cumsum(count, axis=-1), ((0, 0), (0, 0), (1, 0)))

    member_BxNxL = plan.documents.is_token[:, None] & ~plan.focal_mask
    return cls(plan, _Chunks(starts(plan.focal_mask), starts(member_BxNxL)), pieces)

  @property
  def layout(self) -> Layout:
    """Of the plan."""
    return self.plan.layout

  @property
  def config(self) -> DGAConfig:
    """Of the plan."""
    return self.plan.config

  @property
  def halo(self) -> int:
    """`global_halo`."""
    return global_halo(self.config)

  def open_groups(self, x: Float[Array, "B P N D"]) -> Float[Array, "B 2halo N D"]:
    """The last members before each of this device's chunks, wherever they are."""
    pieces = self.pieces
    device = jnp.arange(pieces.count, dtype=jnp.int32)
    chunk_Cx2 = jnp.stack([device, 2 * pieces.count - 1 - device], axis=1)
    first = self.chunks.member[:, :, chunk_Cx2.reshape(-1)]
    slot = first[..., None] - self.halo + jnp.arange(self.halo, dtype=jnp.int32)[None, None, None]
    B, N = slot.shape[:2]
    position = self._member_position(slot.reshape(B, N, -1))
    own = take_rows(x, pieces.place(position))
    return jax.lax.psum_scatter(own, pieces.axis_name, scatter_dimension=1, tiled=True)

  def own_indices(self) -> tuple[Array, Array, Array]:
    """`merge_groups`'s indices of what this device makes: focal tokens, members, group queries."""
    pieces, m = self.pieces, self.config.group_size
    none = 2 * self.halo + 2 * pieces.chunk
    slot, _ = self._own(self.chunks.focal, self._most_focal)
    focal_place = pieces.place(_take(self.layout.focal_index, slot, fill=pieces.length))
    group, half = self._own(self.chunks.groups(m), self._most_groups)
    exists = group < self.layout.group_query.shape[-1]
    member = group[..., None] * m + jnp.arange(m, dtype=jnp.int32)[None, None, None]
    B, N, G, _ = member.shape
    half = jnp.broadcast_to(half[..., None], member.shape).reshape(B, N, -1)
    place = self._entry(member.reshape(B, N, -1), half).reshape(B, N, G, m)
    place = jnp.where(exists[..., None], place, none)
    return 2 * self.halo + focal_place, place, place[..., -1]

  def gather(
    self, focal: Float[Array, "B f N D"], group: Float[Array, "B g N D"]
  ) -> tuple[Float[Array, "B r N D"], Float[Array, "B k N D"]]:
    """All focal tokens and groups of the sequence, of what each device made of its own."""
    r, k = self.layout.focal_index.shape[-1], self.layout.group_query.shape[-1]
    # Kernels may leave rows behind the asked ones.
    made = jnp.concatenate([focal[:, : self._most_focal], group[:, : self._most_groups]], axis=1)
    most = min(self._most_focal + self._most_groups, r + k)
    size = places(r + k, self.pieces.count, most)
    holders, focal_count = self._holders(size)
    # At their places the device's focal tokens come first, its groups right after them.
    own = jax.lax.axis_index(self.pieces.axis_name)
    count = jnp.take(focal_count, own, axis=2)[..., None]
    j = jnp.arange(size, dtype=jnp.int32)[None, None]
    source = jnp.where(j < count, j, self._most_focal + j - count)
    every = collect(take_rows(made, source), holders, self.pieces.axis_name)
    return every[:, :r], every[:, r:]

  def window_index(self) -> Int[Array, "B N w"]:
    """Places of the window list's entries: for each chunk the members before it and its own.

    The second chunk's part follows right upon the first one's.
    """
    length = 2 * self.halo + 2 * self.pieces.chunk
    entry = jnp.arange(length, dtype=jnp.int32)[None, None]
    (first, second), (count, _) = self._own_members()
    is_second = entry >= self.halo + count
    slot = jnp.where(is_second, second + entry - 2 * self.halo - count, first + entry - self.halo)
    return self._entry(slot, is_second.astype(jnp.int32))

  def visibility(self) -> Visibility:
    """The plan's, of this device's queries, with windows over this device's list."""
    own = jax.tree.map(self.pieces.own, self.plan.visibility)
    (first, second), (count, _) = self._own_members()
    is_second = jnp.arange(2 * self.pieces.chunk)[None, None] >= self.pieces.chunk
    shift = jnp.where(is_second, 2 * self.halo + count - second, self.halo - first)
    return own._replace(window_start=own.window_start + shift, window_end=own.window_end + shift)

  @property
  def _most_focal(self) -> int:
    return min(self.layout.focal_index.shape[-1], 2 * self.pieces.chunk)

  @property
  def _most_groups(self) -> int:
    m = self.config.group_size
    in_chunks = 2 * ((self.pieces.chunk + m - 1) // m)
    return min(self.layout.group_query.shape[-1], in_chunks)

  def _own_members(self) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """First slot of each of this device's chunks among the members, and how many it has."""
    starts, counts = self._own_ranges(self.chunks.member)
    return (starts[..., :1], starts[..., 1:]), (counts[..., :1], counts[..., 1:])

  def _own_ranges(self, edges: Array) -> tuple[Array, Array]:
    chunk = self.pieces.chunk_starts // self.pieces.chunk
    start, end = jnp.take(edges, chunk, axis=2), jnp.take(edges, chunk + 1, axis=2)
    return start, end - start

  def _own(self, edges: Array, most: int) -> tuple[Array, Array]:
    """Slots of this device's entries of a list, and the half of the device they belong to."""
    start, count = self._own_ranges(edges)
    j = jnp.arange(most, dtype=jnp.int32)[None, None]
    second = j >= count[..., :1]
    slot = jnp.where(second, start[..., 1:] + j - count[..., :1], start[..., :1] + j)
    exists = j < count.sum(axis=-1, keepdims=True)
    return jnp.where(exists, slot, jnp.iinfo(jnp.int32).max // 2), second.astype(jnp.int32)

  def _entry(self, slot_BxNxS: Array, half_BxNxS: Array) -> Array:
    """Place of a member of the sequence in this device's rows, which begin with open groups."""
    (first, second), _ = self._own_members()
    before = slot_BxNxS - jnp.where(half_BxNxS == 1, second, first) + self.halo
    own = 2 * self.halo + self.pieces.place(self._member_position(slot_BxNxS))
    return jnp.where(before < self.halo, half_BxNxS * self.halo + before, own)

  def _member_position(self, slot_BxNxS: Array) -> Array:
    B, N = slot_BxNxS.shape[:2]
    flat = self.layout.member_index.reshape(B, N, -1)
    return _take(flat, slot_BxNxS, fill=self.pieces.length)

  def _holders(self, size: int) -> tuple[GatherPlan, Int[Array, "B N C"]]:
    """Who sends what, and how many focal tokens each device has."""
    pieces, C = self.pieces, self.pieces.count
    r, k = self.layout.focal_index.shape[-1], self.layout.group_query.shape[-1]
    lists = (self.chunks.focal, self.chunks.groups(self.config.group_size))
    positions = (self.layout.focal_index, self.layout.group_query)
    device, rank, slots = [], [], jnp.full((*lists[0].shape[:2], C, size), r + k, jnp.int32)
    before_BxNxC = jnp.zeros((*lists[0].shape[:2], C), jnp.int32)
    counts = []
    j = jnp.arange(size, dtype=jnp.int32)[None, None, None]
    for edges, position, offset in zip(lists, positions, (0, r), strict=True):
      start, count = edges[..., :-1], jnp.diff(edges, axis=-1)
      chunk = jnp.minimum(position // pieces.chunk, 2 * C - 1)
      holder = jnp.minimum(chunk, 2 * C - 1 - chunk)
      index = jnp.arange(position.shape[-1], dtype=jnp.int32)[None, None]
      # The early chunk's entries come before the late one's.
      early = jnp.where(chunk < C, 0, _take(count[..., :C], holder, fill=0))
      own = index - _take(start, chunk, fill=0) + early + _take(before_BxNxC, holder, fill=0)
      device.append(holder)
      rank.append(jnp.where(position < pieces.length, own, size))
      for half in (slice(None, C), slice(None, C - 1, -1)):
        inside = j - before_BxNxC[..., None]
        here = (inside >= 0) & (inside < count[..., half][..., None])
        slots = jnp.where(here, offset + start[..., half][..., None] + inside, slots)
        before_BxNxC = before_BxNxC + count[..., half]
      counts.append(before_BxNxC)
    holders = GatherPlan(jnp.concatenate(device, -1), jnp.concatenate(rank, -1), slots)
    return holders, counts[0]


def _take(x_BxNxS: Array, index_BxNxT: Array, *, fill: int) -> Array:
  """Entries by their index along the last axis, `fill` for indices outside it."""
  size = x_BxNxS.shape[-1]
  index = jnp.where((index_BxNxT < 0) | (index_BxNxT >= size), size, index_BxNxT)
  take = jax.vmap(jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=fill)))
  return take(x_BxNxS, jnp.broadcast_to(index, (*x_BxNxS.shape[:2], *index.shape[2:])))
