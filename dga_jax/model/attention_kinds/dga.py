"""Dynamic Group Attention as an attention kind: the op, and the compact cache."""

import dataclasses

import jax
from jaxtyping import Array, DTypeLike, Float, Int

from dga_jax.api import dynamic_group_attention
from dga_jax.attention.context_parallel.attend import attend_sharded
from dga_jax.cache import CompactCache, decode_step, empty_cache, extend, prefill
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
    return empty_cache(self.config, batch, max_length, num_kv_heads, head_dim, dtype)

  def prefill(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    *,
    lengths: Int[Array, "B"] | None,
    max_length: int,
  ) -> tuple[Float[Array, "B L H D"], CompactCache]:
    """Attends over a right-padded prompt and stores its summaries."""
    return prefill(
      q_BxLxHxD,
      k_BxLxNxD,
      v_BxLxNxD,
      self.config,
      lengths_B=lengths,
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
    """Appends one token and attends to the compact part and the raw tokens."""
    return decode_step(q_BxHxD, k_BxNxD, v_BxNxD, cache, layer, self.config)

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
    """Appends several tokens, by the rule of decoding."""
    own = jax.tree.map(lambda array: array[layer], cache)
    out_BxTxHxD, own = extend(q_BxTxHxD, k_BxTxNxD, v_BxTxNxD, own, self.config, count_B=counts)
    return out_BxTxHxD, jax.tree.map(lambda every, one: every.at[layer].set(one), cache, own)
