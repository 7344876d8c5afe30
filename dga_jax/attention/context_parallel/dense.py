"""Dense attention on a sequence split over devices: all keys and values go to all devices."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dga_jax.attention.context_parallel.zigzag import ZigzagShards
from dga_jax.attention.segments import Documents
from pallas_kernels.dispatch import Implementation
from pallas_kernels.grouped_attention import grouped_attention, KVSource, KVSources


def dense_attend_sharded(
  query: Float[Array, "B P H D"],
  key: Float[Array, "B P N D"],
  value: Float[Array, "B P N D"],
  documents: Documents,
  *,
  axis_name: str,
  scale: float | None = None,
  implementation: Implementation = None,
) -> Float[Array, "B P H D"]:
  """`dense_attention` inside a `jax.shard_map`, on this device's part of the sequences.

  Keys and values are gathered in the order of positions, and a query sees the range from the first
  token of its document to itself. The backward pass sums their gradients on the devices that hold
  the tokens.

  Args:
    query: P tokens of each sequence: an early and a late chunk, as in
      `dga_jax.sharding.zigzag_order`.
    key: as query.
    value: as query.
    documents: of the whole sequences.
    axis_name: the mesh axis that splits the sequences.
    scale: of the logits, default 1/√D.
    implementation: of `grouped_attention`.
  """
  B, P, N, D = key.shape
  shards = ZigzagShards.from_local_length(axis_name, P)
  is_token_BxP = shards.local_part(documents.is_token)
  if documents.rows != "whole":
    query, key, value = (
      jnp.where(is_token_BxP[..., None, None], x, 0) for x in (query, key, value)
    )
  both_BxPx2xNxD = jnp.stack([key, value], axis=2)
  chunks = shards.all_gather(shards.split_chunks(both_BxPx2xNxD))
  both_BxLx2xNxD = chunks.reshape(B, shards.length, 2, N, D)
  start_BxP = shards.local_part(documents.start)
  end_BxP = jnp.where(is_token_BxP, shards.positions[None] + 1, start_BxP)
  ranges = start_BxP[:, None], end_BxP[:, None]
  none = start_BxP[:, None], start_BxP[:, None]
  sources = KVSources(
    focal=KVSource(both_BxLx2xNxD[:, :, 0], both_BxLx2xNxD[:, :, 1], *ranges),
    group=KVSource(key[:, :0], value[:, :0], *none),
    window=KVSource(key, value, *none),
  )
  return grouped_attention(
    query,
    sources,
    scale=D**-0.5 if scale is None else scale,
    max_window=1,
    implementation=implementation,
  )
