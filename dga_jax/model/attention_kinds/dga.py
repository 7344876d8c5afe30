"""Dynamic Group Attention as an attention kind: the op, and the compact cache."""

import dataclasses

from jaxtyping import Array, DTypeLike, Float, Int

from dga_jax.attention.attend import attend
from dga_jax.attention.context_parallel.attend import attend_sharded
from dga_jax.attention.metadata import AttentionMetadata, prepare
from dga_jax.attention.segments import Documents
from dga_jax.cache import CompactCache, decode_step, empty_cache, extend
from dga_jax.cache.prompt import attend_and_prefill_prepared, cache_prompt
from dga_jax.config import DGAConfig
from dga_jax.model.attention_kinds.base import AttentionKind
from pallas_kernels.grouped_attention import KVSources


@dataclasses.dataclass(frozen=True)
class DynamicGroupAttention(AttentionKind):
  """See `dga_jax.dynamic_group_attention` and `dga_jax.cache`."""

  name = "dga"

  config: DGAConfig

  @property
  def takes_focal_scores(self) -> bool:
    """See `AttentionKind`."""
    return self.config.selector == "fitted"

  def prepare(self, documents: Documents) -> AttentionMetadata:
    """Blocks and visibility of streaming selection; quotas and sampled queries of global."""
    return prepare(documents, self.config)

  def attend(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    metadata: AttentionMetadata,
    focal_scores: Float[Array, "B L N"] | None = None,
  ) -> Float[Array, "B L H D"]:
    """The op over whole sequences."""
    return attend(q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, metadata, focal_scores=focal_scores)

  def attend_sharded(
    self,
    q_BxPxHxD: Float[Array, "B P H D"],
    k_BxPxNxD: Float[Array, "B P N D"],
    v_BxPxNxD: Float[Array, "B P N D"],
    metadata: AttentionMetadata,
    *,
    axis_name: str,
    focal_scores: Float[Array, "B P N"] | None = None,
  ) -> Float[Array, "B P H D"]:
    """The op on this device's shard of the sequences; `metadata` is of the whole sequences."""
    return attend_sharded(
      q_BxPxHxD,
      k_BxPxNxD,
      v_BxPxNxD,
      metadata,
      axis_name=axis_name,
      focal_scores=focal_scores,
    )

  def init_cache(
    self, batch: int, max_length: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike
  ) -> CompactCache:
    """An empty compact cache of one layer."""
    return empty_cache(
      config=self.config,
      batch=batch,
      max_length=max_length,
      num_kv_heads=num_kv_heads,
      head_dim=head_dim,
      dtype=dtype,
    )

  def prefill(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    metadata: AttentionMetadata,
    *,
    max_length: int,
    focal_scores: Float[Array, "B L N"] | None = None,
  ) -> tuple[Float[Array, "B L H D"], CompactCache]:
    """The op over prompts, whose focal tokens and groups become the compact cache."""
    return attend_and_prefill_prepared(
      q_BxLxHxD,
      k_BxLxNxD,
      v_BxLxNxD,
      metadata,
      max_length=max_length,
      focal_scores=focal_scores,
    )

  def cache_prompt(
    self,
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    metadata: AttentionMetadata,
    *,
    sources: KVSources,
    max_length: int,
    focal_scores: Float[Array, "B L N"] | None = None,
  ) -> CompactCache:
    """The cache after prompts whose tokens are merged."""
    return cache_prompt(k_BxLxNxD, v_BxLxNxD, focal_scores, metadata, sources, max_length)

  def decode(
    self,
    q_BxHxD: Float[Array, "B H D"],
    k_BxNxD: Float[Array, "B N D"],
    v_BxNxD: Float[Array, "B N D"],
    cache: CompactCache,
    layer: Int[Array, ""],
    *,
    focal_scores: Float[Array, "B N"] | None = None,
  ) -> tuple[Float[Array, "B H D"], CompactCache]:
    """Appends one token and attends to the compact part and the raw tokens."""
    return decode_step(
      q_BxHxD,
      k_BxNxD,
      v_BxNxD,
      cache,
      config=self.config,
      focal_scores=focal_scores,
      layer=layer,
    )

  def extend(
    self,
    q_BxTxHxD: Float[Array, "B T H D"],
    k_BxTxNxD: Float[Array, "B T N D"],
    v_BxTxNxD: Float[Array, "B T N D"],
    cache: CompactCache,
    layer: Int[Array, ""],
    *,
    lengths: Int[Array, "B"],
    focal_scores: Float[Array, "B T N"] | None = None,
  ) -> tuple[Float[Array, "B T H D"], CompactCache]:
    """Appends several tokens; computes what decoding them one by one would."""
    return extend(
      q_BxTxHxD,
      k_BxTxNxD,
      v_BxTxNxD,
      cache,
      config=self.config,
      focal_scores=focal_scores,
      lengths=lengths,
      layer=layer,
    )
