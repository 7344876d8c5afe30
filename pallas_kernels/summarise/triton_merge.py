"""Forward kernel of summarise, through Pallas-Triton: each token's key and value read once.

A program holds a few groups, all their rows side by side in registers. Under streaming selection
the rows are whole blocks, of which it first chooses the focal ones.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.summarise.triton_rows import like, load_rows, store_rows, tile, whole


class GroupTile(NamedTuple):
  """The tile of one program. Static."""

  groups: int  # G, a power of two
  lanes: int  # P, rows of a group, rounded up to a power of two

  @classmethod
  def of(cls, rows: int, head_dim: int) -> "GroupTile":
    """For groups of `rows` rows: as many as registers hold."""
    lanes = pl.next_power_of_2(rows)
    return cls(max(1, 64 * 128 // (lanes * head_dim)), lanes)

  @property
  def multiple(self) -> int:
    """What the number of groups is padded to; attention kernels want eights."""
    return max(8, self.groups)

  def rows_spec(self, row: Array) -> pl.BlockSpec:
    """A tile of row indices [B, n, k, P]; n is N or 1."""
    shared = row.shape[1] == 1
    return pl.BlockSpec(
      (None, None, self.groups, self.lanes), lambda t, n, b: (b, 0 if shared else n, t, 0)
    )

  def query_spec(self, last: Array) -> pl.BlockSpec:
    """A tile of query indices [B, n, k]."""
    shared = last.shape[1] == 1
    return pl.BlockSpec((None, None, self.groups), lambda t, n, b: (b, 0 if shared else n, t))


def heads_spec(query: Array, num_kv_heads: int) -> pl.BlockSpec:
  """All queries of the heads that share a KV head, of [B, L, H, D]."""
  _, L, H, D = query.shape
  return pl.BlockSpec((None, L, H // num_kv_heads, D), lambda t, n, b: (b, 0, n, 0))


def group_logits(
  q_ref: Any, last_G: Array, k_GxPxD: Array, *, length: int
) -> list[tuple[Array, Array]]:
  """For each query head of the KV head: its query [G, D] and its products with the rows [G, P]."""
  queries = [load_rows(q_ref, last_G, r, length=length) for r in range(q_ref.shape[1])]
  queries = [q.astype(jnp.float32) for q in queries]
  return [(q_GxD, (k_GxPxD * q_GxD[:, None]).sum(axis=-1)) for q_GxD in queries]


def masked_softmax(logits_GxP: Array, mask_GxP: Array) -> Array:
  """Softmax over the lanes of the mask, 0 elsewhere. Every group has such a lane."""
  logits_GxP = jnp.where(mask_GxP, logits_GxP, -jnp.inf)
  weights_GxP = jnp.exp(logits_GxP - logits_GxP.max(axis=1)[:, None])
  return weights_GxP / weights_GxP.sum(axis=1)[:, None]


def merge_rows(
  query: Array,
  key: Array,
  value: Array,
  row_BxnxkxP: Array,
  last_Bxnxk: Array,
  *,
  rows: int,
  focal: int,
  scale: float,
  reorder: bool,
  group_tile: GroupTile,
  interpret: bool,
) -> list[Array]:
  """Group keys and values [B, k, N, D], and further pairs as asked.

  Args:
    row_BxnxkxP: each group's rows, L where there is none; k is a multiple of group_tile.multiple.
    last_Bxnxk: the query that weighs them, L for none.
    rows: rows that a group has, at most P.
    focal: how many of them stay focal, chosen here: gives their keys and values [B, k·focal, N,
      D] and places in the block [B, N, k, focal].
    scale: of the merge logits.
    reorder: also writes the rows one after the other, [B, k·rows, N, D].
  """
  B, L, N, D = key.shape
  k = last_Bxnxk.shape[-1]
  G = group_tile.groups
  outs = [(k, G), (k, G)]
  outs += [(k * focal, G * focal)] * 2 if focal else []
  outs += [(k * rows, G * rows)] * 2 if reorder else []
  out_shape = [like(key, (B, S, N, D), key.dtype) for S, _ in outs]
  out_specs = [tile(x, count) for x, (_, count) in zip(out_shape, outs, strict=True)]
  if focal:
    out_shape.append(like(key, (B, N, k, focal), jnp.int32))
    out_specs.append(pl.BlockSpec((None, None, G, focal), lambda t, n, b: (b, n, t, 0)))
  merged: list[Array] = pl.pallas_call(
    functools.partial(
      _merge_kernel, length=L, rows=rows, focal=focal, scale=scale, reorder=reorder
    ),
    grid=(k // G, N, B),
    in_specs=[
      heads_spec(query, N),
      whole(key),
      whole(value),
      group_tile.rows_spec(row_BxnxkxP),
      group_tile.query_spec(last_Bxnxk),
    ],
    out_specs=out_specs,
    out_shape=out_shape,
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
    interpret=interpret,
    name="summarise_merge",
  )(query, key, value, row_BxnxkxP, last_Bxnxk)
  return merged


def _merge_kernel(
  q_ref: Any,
  k_ref: Any,
  v_ref: Any,
  row_ref: Any,
  last_ref: Any,
  *out_refs: Any,
  length: int,
  rows: int,
  focal: int,
  scale: float,
  reorder: bool,
) -> None:
  row_GxP = row_ref[...]
  G, P = row_GxP.shape
  D = k_ref.shape[-1]
  row_T = row_GxP.reshape(G * P)
  k_TxD, v_TxD = (load_rows(ref, row_T, length=length) for ref in (k_ref, v_ref))
  k_GxPxD, v_GxPxD = (x.reshape(G, P, D).astype(jnp.float32) for x in (k_TxD, v_TxD))
  logits = [x for _, x in group_logits(q_ref, last_ref[...], k_GxPxD, length=length)]
  lane_GxP = jnp.broadcast_to(jnp.arange(P)[None], (G, P))
  member_GxP = lane_GxP < rows
  *out_refs, chosen_ref = out_refs if focal else (*out_refs, None)
  pairs = [out_refs[i : i + 2] for i in range(0, len(out_refs), 2)]
  group_out, focal_out, window_out = pairs[0], pairs[1] if focal else None, pairs[-1]
  if focal:
    scores_GxP = sum(masked_softmax(x * D**-0.5, member_GxP) for x in logits)
    member_GxP = _choose(
      scores_GxP, member_GxP, lane_GxP, (k_GxPxD, v_GxPxD), focal_out, chosen_ref
    )
  weights_GxP = sum(masked_softmax(x * scale, member_GxP) for x in logits) / len(logits)
  for x_GxPxD, out_ref in ((k_GxPxD, group_out[0]), (v_GxPxD, group_out[1])):
    out_ref[...] = (weights_GxP[..., None] * x_GxPxD).sum(axis=1).astype(out_ref.dtype)
  if reorder:
    place_GxP = jnp.arange(G)[:, None] * rows + lane_GxP
    place_T = jnp.where(lane_GxP < rows, place_GxP, G * rows).reshape(G * P)
    for x_TxD, out_ref in ((k_TxD, window_out[0]), (v_TxD, window_out[1])):
      store_rows(out_ref, place_T, x_TxD, length=G * rows)


def _choose(
  scores_GxP: Array,
  member_GxP: Array,
  lane_GxP: Array,
  tokens: tuple[Array, Array],
  focal_out: Any,
  chosen_ref: Any,
) -> Array:
  """Stores the lanes of highest score, in position order; gives the mask of the others."""
  G, P = scores_GxP.shape
  focal = chosen_ref.shape[-1]
  # As a sort would have it, NaN is the largest.
  scores_GxP = jnp.where(scores_GxP == scores_GxP, scores_GxP, jnp.inf)
  chosen_GxP = lane_GxP < 0
  for _ in range(focal):
    left_GxP = member_GxP & ~chosen_GxP
    left_score_GxP = jnp.where(left_GxP, scores_GxP, -1.0)
    is_top_GxP = left_GxP & (left_score_GxP == left_score_GxP.max(axis=1)[:, None])
    first_G = jnp.where(is_top_GxP, lane_GxP, P).min(axis=1)
    chosen_GxP |= lane_GxP == first_G[:, None]
  place_G = jnp.full((G,), -1, jnp.int32)
  for j in range(focal):
    later_GxP = chosen_GxP & (lane_GxP > place_G[:, None])
    place_G = jnp.where(later_GxP, lane_GxP, P).min(axis=1)
    chosen_ref[:, j] = place_G
    is_it_GxPx1 = (lane_GxP == place_G[:, None])[..., None]
    slot_G = jnp.arange(G) * focal + j
    for x_GxPxD, out_ref in zip(tokens, focal_out, strict=True):
      x_GxD = jnp.where(is_it_GxPx1, x_GxPxD, 0).sum(axis=1)
      store_rows(out_ref, slot_G, x_GxD, length=G * focal)
  return member_GxP & ~chosen_GxP
