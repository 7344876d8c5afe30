"""The parts of a `GroupPlan` that each device of a mesh axis computes (global, random selection).

The plan's lists (focal tokens, groups, members of groups) are in the order of positions, so the
entries of a chunk are contiguous in each list. A list is addressed by slots, 0 for its first entry.
A device's rows are the halos of its two chunks, then its tokens: see `ShardedPlan.fetch_halo`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dga_jax.attention.context_parallel.ragged_all_gather import (
  GatherPlan,
  ragged_all_gather,
  slot_count,
)
from dga_jax.attention.context_parallel.zigzag import ZigzagShards
from dga_jax.attention.plan import GroupPlan
from dga_jax.attention.visibility import Visibility
from dga_jax.config import DGAConfig
from pallas_kernels.gather import take_rows


class _ChunkEdges(NamedTuple):
  """For each chunk the slot of its first entry in each list; the last edge is a list's length."""

  focal: Int[Array, "B N edges"]
  member: Int[Array, "B N edges"]

  def group(self, size: int) -> Int[Array, "B N edges"]:
    """Of the list of groups of `size` members; a group belongs to the chunk of its last member."""
    return self.member // size


class ShardedPlan(NamedTuple):
  """A plan of the whole sequence, the same on every device, and this device's part of it."""

  plan: GroupPlan
  edges: _ChunkEdges
  shards: ZigzagShards

  @classmethod
  def from_plan(cls, plan: GroupPlan, shards: ZigzagShards) -> "ShardedPlan":
    """Counts the entries of every chunk."""

    def edges(mask_BxNxL: Array) -> Array:
      B, N, _ = mask_BxNxL.shape
      count = mask_BxNxL.reshape(B, N, -1, shards.chunk).sum(axis=-1, dtype=jnp.int32)
      return jnp.pad(jnp.cumsum(count, axis=-1), ((0, 0), (0, 0), (1, 0)))

    member_BxNxL = plan.documents.is_token[:, None] & ~plan.focal_mask
    return cls(plan, _ChunkEdges(edges(plan.focal_mask), edges(member_BxNxL)), shards)

  @property
  def halo(self) -> int:
    """`global_halo`."""
    return global_halo(self.plan.config)

  def fetch_halo(self, x: Float[Array, "B P N D"]) -> Float[Array, "B halo N D"]:
    """The last `halo` members before each of this device's chunks, from the devices that hold them.

    Args:
      x: the tokens of this device.
    """
    shards, halo = self.shards, self.halo
    device = jnp.arange(shards.devices, dtype=jnp.int32)
    chunk_Cx2 = jnp.stack([device, 2 * shards.devices - 1 - device], axis=1)
    first = self.edges.member[:, :, chunk_Cx2.reshape(-1)]
    slot = first[..., None] - halo + jnp.arange(halo, dtype=jnp.int32)[None, None, None]
    B, N = slot.shape[:2]
    position = self._member_position(slot.reshape(B, N, -1))
    held = take_rows(x, shards.local_index(position))
    return jax.lax.psum_scatter(held, shards.axis_name, scatter_dimension=1, tiled=True)

  def local_layout(self) -> tuple[Array, Array, Array]:
    """The layout of what this device makes, as indices of its rows, for `merge_groups`.

    Returns:
      Focal tokens [B, N, f], members of groups [B, N, g, m] and the query of each group [B, N, g].
      The number of rows marks an absent entry.
    """
    shards, layout, m = self.shards, self.plan.layout, self.plan.config.group_size
    absent = 2 * self.halo + 2 * shards.chunk
    slot, _ = self._local_slots(self.edges.focal, self._most_focal)
    focal_position = _take(layout.focal_index, slot, fill=shards.length)
    group, half = self._local_slots(self.edges.group(m), self._most_groups)
    exists = group < layout.group_query.shape[-1]
    member = group[..., None] * m + jnp.arange(m, dtype=jnp.int32)[None, None, None]
    B, N, G, _ = member.shape
    half = jnp.broadcast_to(half[..., None], member.shape).reshape(B, N, -1)
    index = self._row_of_member(member.reshape(B, N, -1), half).reshape(B, N, G, m)
    index = jnp.where(exists[..., None], index, absent)
    return 2 * self.halo + shards.local_index(focal_position), index, index[..., -1]

  def all_gather(
    self, focal: Float[Array, "B f N D"], group: Float[Array, "B g N D"]
  ) -> tuple[Float[Array, "B r N D"], Float[Array, "B k N D"]]:
    """The focal tokens and groups of the whole sequence, from those of each device.

    Kernels may append zero rows to a device's arrays.
    """
    r, k = self._list_lengths
    held = jnp.concatenate([focal[:, : self._most_focal], group[:, : self._most_groups]], axis=1)
    most = min(self._most_focal + self._most_groups, r + k)
    slots = slot_count(r + k, self.shards.devices, most)
    gather_plan, focal_counts = self._gather_plan(slots)
    # The slots of a device hold its focal tokens, then its groups.
    device = jax.lax.axis_index(self.shards.axis_name)
    focal_count = jnp.take(focal_counts, device, axis=2)[..., None]
    j = jnp.arange(slots, dtype=jnp.int32)[None, None]
    source = jnp.where(j < focal_count, j, self._most_focal + j - focal_count)
    gathered = ragged_all_gather(take_rows(held, source), gather_plan, self.shards.axis_name)
    return gathered[:, :r], gathered[:, r:]

  def window_index(self) -> Int[Array, "B N w"]:
    """Row of each entry of this device's window list.

    For each chunk the list has the members of the halo, then the members of the chunk.
    """
    length = 2 * self.halo + 2 * self.shards.chunk
    entry = jnp.arange(length, dtype=jnp.int32)[None, None]
    (first, second), (count, _) = self._local_members()
    is_second = entry >= self.halo + count
    slot = jnp.where(is_second, second + entry - 2 * self.halo - count, first + entry - self.halo)
    return self._row_of_member(slot, is_second.astype(jnp.int32))

  def local_visibility(self) -> Visibility:
    """The ranges of this device's queries; windows are ranges of this device's window list."""
    visibility = jax.tree.map(self.shards.local_part, self.plan.visibility)
    (first, second), (count, _) = self._local_members()
    is_second = jnp.arange(2 * self.shards.chunk)[None, None] >= self.shards.chunk
    shift = jnp.where(is_second, 2 * self.halo + count - second, self.halo - first)
    return visibility._replace(
      window_start=visibility.window_start + shift, window_end=visibility.window_end + shift
    )

  @property
  def _list_lengths(self) -> tuple[int, int]:
    """r and k: static lengths of the lists of focal tokens and of groups."""
    layout = self.plan.layout
    return layout.focal_index.shape[-1], layout.group_query.shape[-1]

  @property
  def _most_focal(self) -> int:
    """Static bound on the focal tokens of one device."""
    return min(self._list_lengths[0], 2 * self.shards.chunk)

  @property
  def _most_groups(self) -> int:
    """Static bound on the groups of one device."""
    m = self.plan.config.group_size
    return min(self._list_lengths[1], 2 * ((self.shards.chunk + m - 1) // m))

  def _local_members(self) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """First slot, and number of members, of each of this device's chunks."""
    starts, counts = self._local_ranges(self.edges.member)
    return (starts[..., :1], starts[..., 1:]), (counts[..., :1], counts[..., 1:])

  def _local_ranges(self, edges: Array) -> tuple[Array, Array]:
    """First slot, and number of entries, of each of this device's chunks: [B, N, 2] each."""
    chunk = self.shards.chunk_ids
    start, end = jnp.take(edges, chunk, axis=2), jnp.take(edges, chunk + 1, axis=2)
    return start, end - start

  def _local_slots(self, edges: Array, most: int) -> tuple[Array, Array]:
    """Slots of this device's entries of a list, and 0 or 1 for its early or late chunk."""
    start, count = self._local_ranges(edges)
    j = jnp.arange(most, dtype=jnp.int32)[None, None]
    second = j >= count[..., :1]
    slot = jnp.where(second, start[..., 1:] + j - count[..., :1], start[..., :1] + j)
    exists = j < count.sum(axis=-1, keepdims=True)
    return jnp.where(exists, slot, jnp.iinfo(jnp.int32).max // 2), second.astype(jnp.int32)

  def _row_of_member(self, slot_BxNxS: Array, half_BxNxS: Array) -> Array:
    """Row on this device of a member in one of its chunks, or in the halo of that chunk."""
    (first, second), _ = self._local_members()
    in_halo = slot_BxNxS - jnp.where(half_BxNxS == 1, second, first) + self.halo
    in_chunk = 2 * self.halo + self.shards.local_index(self._member_position(slot_BxNxS))
    return jnp.where(in_halo < self.halo, half_BxNxS * self.halo + in_halo, in_chunk)

  def _member_position(self, slot_BxNxS: Array) -> Array:
    """Position in the sequence of the member in a slot; L for a slot outside the list."""
    B, N = slot_BxNxS.shape[:2]
    position = self.plan.layout.member_index.reshape(B, N, -1)
    return _take(position, slot_BxNxS, fill=self.shards.length)

  def _gather_plan(self, slots: int) -> tuple[GatherPlan, Int[Array, "B N C"]]:
    """Where the focal tokens and groups are, and how many focal tokens each device holds."""
    shards, C = self.shards, self.shards.devices
    r, k = self._list_lengths
    lists = (self.edges.focal, self.edges.group(self.plan.config.group_size))
    positions = (self.plan.layout.focal_index, self.plan.layout.group_query)
    rows = jnp.full((*lists[0].shape[:2], C, slots), r + k, jnp.int32)
    used_BxNxC = jnp.zeros((*lists[0].shape[:2], C), jnp.int32)
    devices, device_slots, counts = [], [], []
    j = jnp.arange(slots, dtype=jnp.int32)[None, None, None]
    for edges, position, offset in zip(lists, positions, (0, r), strict=True):
      start, count = edges[..., :-1], jnp.diff(edges, axis=-1)
      chunk = jnp.minimum(position // shards.chunk, 2 * C - 1)
      device = jnp.minimum(chunk, 2 * C - 1 - chunk)
      entry = jnp.arange(position.shape[-1], dtype=jnp.int32)[None, None]
      # On a device, the entries of the early chunk precede those of the late chunk.
      early = jnp.where(chunk < C, 0, _take(count[..., :C], device, fill=0))
      slot = entry - _take(start, chunk, fill=0) + early + _take(used_BxNxC, device, fill=0)
      devices.append(device)
      device_slots.append(jnp.where(position < shards.length, slot, slots))
      for half in (slice(None, C), slice(None, C - 1, -1)):
        inside = j - used_BxNxC[..., None]
        is_here = (inside >= 0) & (inside < count[..., half][..., None])
        rows = jnp.where(is_here, offset + start[..., half][..., None] + inside, rows)
        used_BxNxC = used_BxNxC + count[..., half]
      counts.append(used_BxNxC)
    plan = GatherPlan(jnp.concatenate(devices, -1), jnp.concatenate(device_slots, -1), rows)
    return plan, counts[0]


def global_halo(config: DGAConfig) -> int:
  """Members before a chunk that may belong to a group which ends in the chunk; at least 1."""
  return max(1, config.group_size - 1)


def _take(x_BxNxS: Array, index_BxNxT: Array, *, fill: int) -> Array:
  """Entries by their index along the last axis; `fill` for indices outside it."""
  size = x_BxNxS.shape[-1]
  index = jnp.where((index_BxNxT < 0) | (index_BxNxT >= size), size, index_BxNxT)
  take = jax.vmap(jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=fill)))
  return take(x_BxNxS, jnp.broadcast_to(index, (*x_BxNxS.shape[:2], *index.shape[2:])))
