"""Dynamic Group Attention as an attention kind: the op, and the compact cache."""

import dataclasses

from jaxtyping import Array, DTypeLike, Float, Int

from dga_jax.attention import dynamic_group_attention
from dga_jax.attention.context_parallel.attend import attend_sharded
from dga_jax.cache import attend_and_prefill, CompactCache, decode_step, empty_cache, extend
from dga_jax.config import DGAConfig


@dataclasses.dataclass(frozen=True)
class DynamicGroupAttention:
  """See `dga_jax.dynamic_group_attention` and `dga_jax.cache`."""

  config: DGAConfig

  def attend(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    *,
    segment_ids: Int[Array, "B L"] | None,
    lengths: Int[Array, "B"] | None,
  ) -> Float[Array, "B L H D"]:
    """The op, over whole sequences."""
    return dynamic_group_attention(
      q_BxLxHxD,
      k_BxLxNxD,
      v_BxLxNxD,
      config=self.config,
      segment_ids=segment_ids,
      lengths=lengths,
    )

  def attend_sharded(
    self,
    q_BxPxHxD: Float[Array, "B P H D"],
    k_BxPxNxD: Float[Array, "B P N D"],
    v_BxPxNxD: Float[Array, "B P N D"],
    *,
    segment_ids: Int[Array, "B L"] | None,
    lengths: Int[Array, "B"] | None,
    axis_name: str,
  ) -> Float[Array, "B P H D"]:
    """The op on one device's piece of the sequences; see `context_parallel.attend`."""
    return attend_sharded(
      q_BxPxHxD,
      k_BxPxNxD,
      v_BxPxNxD,
      config=self.config,
      axis_name=axis_name,
      segment_ids=segment_ids,
      lengths=lengths,
    )

  def init_cache(
    self, batch: int, max_length: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike
  ) -> CompactCache:
    """An empty compact cache for `max_length` tokens a sequence."""
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
    *,
    lengths: Int[Array, "B"] | None,
    max_length: int,
  ) -> tuple[Float[Array, "B L H D"], CompactCache]:
    """Attends over right-padded prompts and fills a cache with them."""
    return attend_and_prefill(
      q_BxLxHxD,
      k_BxLxNxD,
      v_BxLxNxD,
      config=self.config,
      lengths=lengths,
      max_length=max_length,
    )

  def decode(
    self,
    q_BxHxD: Float[Array, "B H D"],
    k_BxNxD: Float[Array, "B N D"],
    v_BxNxD: Float[Array, "B N D"],
    cache: CompactCache,
    layer: Int[Array, ""],
  ) -> tuple[Float[Array, "B H D"], CompactCache]:
    """Appends one token and attends to the compact entries and the raw tokens."""
    return decode_step(q_BxHxD, k_BxNxD, v_BxNxD, cache, config=self.config, layer=layer)

  def extend(
    self,
    q_BxTxHxD: Float[Array, "B T H D"],
    k_BxTxNxD: Float[Array, "B T N D"],
    v_BxTxNxD: Float[Array, "B T N D"],
    cache: CompactCache,
    layer: Int[Array, ""],
    *,
    counts: Int[Array, "B"],
  ) -> tuple[Float[Array, "B T H D"], CompactCache]:
    """Appends several tokens, as decoding would one by one."""
    return extend(
      q_BxTxHxD, k_BxTxNxD, v_BxTxNxD, cache, config=self.config, lengths=counts, layer=layer
    )
