"""The op on a sequence that is split over the devices of a mesh axis."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dga_jax.attention import validation
from dga_jax.attention.attend import attention_kwargs
from dga_jax.attention.context_parallel.global_ import global_entries, global_halo
from dga_jax.attention.context_parallel.streaming import streaming_entries, streaming_halo
from dga_jax.attention.context_parallel.zigzag import ZigzagShards
from dga_jax.attention.plan import Rows
from dga_jax.config import DGAConfig
from pallas_kernels.grouped_attention import grouped_attention


def attend_sharded(
  query: Float[Array, "B P H D"],
  key: Float[Array, "B P N D"],
  value: Float[Array, "B P N D"],
  *,
  config: DGAConfig,
  axis_name: str,
  lengths: Int[Array, "B"] | None = None,
  segment_ids: Int[Array, "B L"] | None = None,
  scale: float | None = None,
  implementation: str | None = None,
) -> Float[Array, "B P H D"]:
  """`dynamic_group_attention` inside a `jax.shard_map`, each device with its piece of the sequence.

  Computes what that computes of the whole sequence. Between devices move the summaries, and the
  tokens just before a chunk, but not all keys and values.

  Args:
    query: of the positions that `dga_jax.sharding.zigzag_order` gives this device: two chunks,
      an early and a late one, so that all devices have the same work.
    key: as query.
    value: as query.
    config: every switch of the mechanism.
    axis_name: the mesh axis over which the sequence is split.
    lengths: tokens of each whole row, the rest being right padding.
    segment_ids: of the whole rows, in their own order.
    scale: of the attention logits, default 1/√D.
    implementation: as there, but for "reference".

  Raises:
    ValueError: chunks are too short, or as there.
  """
  validation.query_and_key(query, key)
  validation.value_like_key(value, key)
  validation.softmax_scale(scale)
  pieces = ZigzagShards.of(axis_name, query.shape[1])
  rows = Rows.of(query.shape[0], pieces.length, config, lengths, segment_ids)
  if rows.padded:
    is_token_BxPx1x1 = pieces.own(rows.documents.is_token)[..., None, None]
    query, key, value = (jnp.where(is_token_BxPx1x1, x, 0) for x in (query, key, value))
  streaming = config.selection == "streaming"
  make_entries = streaming_entries if streaming else global_entries
  entries, bounds = make_entries(
    query,
    key,
    value,
    rows,
    pieces,
    config=config,
    implementation="xla" if implementation == "xla" else None,
  )
  options = attention_kwargs(query, config, scale)
  # Between the windows of the two chunks lies what precedes the second one, unseen by queries of
  # the first. Implementations take a tile's windows as one run, which may hold it.
  options["max_window"] += streaming_halo(config) if streaming else global_halo(config)
  out_BxPxHxD = grouped_attention(
    query, bounds.sources(entries), implementation=implementation, **options
  )
  if rows.broken is None:
    return out_BxPxHxD
  return jnp.where(pieces.own(rows.broken)[..., None, None], jnp.nan, out_BxPxHxD)
