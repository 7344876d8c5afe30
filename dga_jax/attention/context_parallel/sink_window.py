"""Sinks and a window on a sequence split over devices: only sinks go to all devices."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dga_jax.attention.context_parallel.streaming import join_chunks, local_visibility
from dga_jax.attention.context_parallel.zigzag import ZigzagShards
from dga_jax.attention.sink_window import SinkWindowMetadata
from pallas_kernels.dispatch import Implementation
from pallas_kernels.gather import take_positions
from pallas_kernels.group_merge import Entries
from pallas_kernels.grouped_attention import grouped_attention


def sink_window_attend_sharded(
  query: Float[Array, "B P H D"],
  key: Float[Array, "B P N D"],
  value: Float[Array, "B P N D"],
  metadata: SinkWindowMetadata,
  *,
  axis_name: str,
  scale: float | None = None,
  implementation: Implementation = None,
) -> Float[Array, "B P H D"]:
  """`attend_sink_window` inside a `jax.shard_map`, on this device's part of the sequences.

  Each chunk gets the last window − 1 tokens of the chunk before it (halo exchange).

  Args:
    query: P tokens of each sequence: an early and a late chunk, as in
      `dga_jax.sharding.zigzag_order`.
    key: as query.
    value: as query.
    metadata: of the whole sequences.
    axis_name: the mesh axis that splits the sequences.
    scale: of the attention logits, default 1/√D.
    implementation: of `grouped_attention`.

  Raises:
    ValueError: a chunk is shorter than a window without its last token.
  """
  documents, (B, P, _, D) = metadata.documents, key.shape
  shards = ZigzagShards.from_local_length(axis_name, P)
  halo = metadata.window - 1
  if halo > shards.chunk:
    raise ValueError(
      f"The mesh axis {axis_name!r} of size {shards.devices} cuts the sequence into chunks of "
      f"{shards.chunk} tokens. A chunk must hold the window without its last token, {halo} tokens. "
      "Use fewer devices for a sequence, longer sequences, or a smaller window."
    )
  query, key, value = shards.zero_padding(documents, query, key, value)
  both_BxPx2xNxD = jnp.stack([key, value], axis=2)
  before = shards.halo_exchange(both_BxPx2xNxD, halo)
  window = join_chunks(jnp.concatenate([before, shards.split_chunks(both_BxPx2xNxD)], axis=2))
  position_BxS = metadata.sink_index
  if position_BxS is None:
    first_1xS = jnp.arange(min(metadata.sinks, shards.length), dtype=jnp.int32)[None]
    position_BxS = jnp.broadcast_to(first_1xS, (B, first_1xS.size))
  own = take_positions(both_BxPx2xNxD, shards.local_index(position_BxS))
  sinks = jax.lax.psum(own, axis_name)
  entries = Entries(
    sinks[:, :, 0], sinks[:, :, 1], key[:, :0], value[:, :0], window[:, :, 0], window[:, :, 1]
  )
  return grouped_attention(
    query,
    local_visibility(metadata.visibility, halo, shards).sources(entries),
    scale=D**-0.5 if scale is None else scale,
    # The windows of the late chunk's queries follow the halo of the late chunk, which no query of
    # the early chunk sees. Implementations read the windows of a tile as one run.
    max_window=metadata.window + halo,
    implementation=implementation,
  )
