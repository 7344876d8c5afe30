"""The op on sequences that a mesh axis splits (context parallelism)."""

import functools

from jaxtyping import Array, Float

from dga_jax.attention import validation
from dga_jax.attention.attend import (
  attention_kwargs,
  merging_implementation,
  nan_where_invalid,
)
from dga_jax.attention.context_parallel.global_ import global_sources
from dga_jax.attention.context_parallel.sharded_plan import global_halo
from dga_jax.attention.context_parallel.streaming import streaming_halo, streaming_sources
from dga_jax.attention.context_parallel.zigzag import ZigzagShards
from dga_jax.attention.metadata import AttentionMetadata
from pallas_kernels.dispatch import Implementation
from pallas_kernels.grouped_attention import grouped_attention


def attend_sharded(
  query: Float[Array, "B P H D"],
  key: Float[Array, "B P N D"],
  value: Float[Array, "B P N D"],
  metadata: AttentionMetadata,
  *,
  axis_name: str,
  focal_scores: Float[Array, "B P N"] | None = None,
  scale: float | None = None,
  implementation: Implementation = None,
) -> Float[Array, "B P H D"]:
  """`attend` inside a `jax.shard_map`, on this device's part of the sequences.

  The result is that of `attend` on the whole sequences. Focal tokens and groups go to all devices,
  and the tokens just before a chunk to the device of the chunk. The other keys and values stay on
  their devices.

  Args:
    query: P tokens of each sequence: an early and a late chunk, as in
      `dga_jax.sharding.zigzag_order`, so that all devices have equal work.
    key: as query.
    value: as query.
    metadata: of the whole sequences, from `prepare`.
    axis_name: the mesh axis that splits the sequences.
    focal_scores: of the tokens of this device, float32, with the selector "fitted"; else None.
    scale: multiplies the attention logits; default 1/√D.
    implementation: as for `dynamic_group_attention`, without "reference".

  Raises:
    ValueError: chunks are too short, or as for `dynamic_group_attention`.
  """
  validation.query_and_key(query, key)
  validation.value_like_key(value, key)
  validation.softmax_scale(scale)
  validation.focal_scores(focal_scores, key, metadata.config)
  validation.is_causal(metadata.config, "context parallelism")
  config, documents = metadata.config, metadata.documents
  shards = ZigzagShards.from_local_length(axis_name, query.shape[1])
  query, key, value = shards.zero_padding(documents, query, key, value)
  streaming = config.selection == "streaming"
  make_sources = (
    functools.partial(streaming_sources, focal_scores=focal_scores) if streaming else global_sources
  )
  sources = make_sources(
    query,
    key,
    value,
    metadata,
    shards,
    implementation=merging_implementation(implementation),
  )
  options = attention_kwargs(query, config, scale)
  # The windows of the late chunk's queries follow the halo of the late chunk, which no query of the
  # early chunk sees. Implementations read the windows of a tile as one run, which may include it.
  options["max_window"] += streaming_halo(config) if streaming else global_halo(config)
  out_BxPxHxD = grouped_attention(query, sources, implementation=implementation, **options)
  if metadata.invalid is None:
    return out_BxPxHxD
  return nan_where_invalid(out_BxPxHxD, shards.local_part(metadata.invalid))
