"""Dense causal attention."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dga_jax.attention.context_parallel.dense import dense_attend_sharded
from dga_jax.attention.dense import dense_attention, xla_attention
from dga_jax.attention.segments import Documents
from dga_jax.choices import CacheDtypeName
from dga_jax.model.attention_kinds.dense_cache import DenseCache, DenseCacheAttention
from pallas_kernels.decode import TokenRows
from pallas_kernels.dispatch import Implementation


@dataclasses.dataclass(frozen=True)
class DenseAttention(DenseCacheAttention):
  """Softmax attention over all earlier tokens.

  Attributes:
    implementation: for whole sequences, see `dga_jax.attention.dense.dense_attention`.
    cache_dtype: see `DenseCacheAttention`.
  """

  name = "dense"

  implementation: Implementation = None
  cache_dtype: CacheDtypeName | None = None

  def attend(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    metadata: Documents,
  ) -> Float[Array, "B L H D"]:
    """Causal attention inside each document; padding outputs 0."""
    return dense_attention(
      q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, metadata, implementation=self.implementation
    )

  def attend_sharded(
    self,
    q_BxPxHxD: Float[Array, "B P H D"],
    k_BxPxNxD: Float[Array, "B P N D"],
    v_BxPxNxD: Float[Array, "B P N D"],
    metadata: Documents,
    *,
    axis_name: str,
  ) -> Float[Array, "B P H D"]:
    """Attention of this device's queries to the keys and values of all devices."""
    return dense_attend_sharded(q_BxPxHxD, k_BxPxNxD, v_BxPxNxD, metadata, axis_name=axis_name)

  def extend(
    self,
    q_BxTxHxD: Float[Array, "B T H D"],
    k_BxTxNxD: Float[Array, "B T N D"],
    v_BxTxNxD: Float[Array, "B T N D"],
    cache: DenseCache,
    layer: Int[Array, ""],
    *,
    lengths: Int[Array, "B"],
  ) -> tuple[Float[Array, "B T H D"], DenseCache]:
    """Appends several tokens; each attends to all tokens up to itself."""
    B, T = q_BxTxHxD.shape[:2]
    M, new_T = cache.tokens.key.shape[-2], jnp.arange(T)
    position_BxT = cache.length[layer][:, None] + new_T[None]
    # A slot beyond the array's end is not written.
    slot_BxT = jnp.where(new_T[None] < lengths[:, None], position_BxT, M)
    at = (layer, jnp.arange(B)[:, None], slice(None), slot_BxT)
    rows = TokenRows.pack(k_BxTxNxD, v_BxTxNxD, cache.tokens.key.dtype)
    tokens = cache.tokens.write(at, rows)
    cache = DenseCache(tokens, cache.length.at[layer].add(lengths))
    seen_BxTxM = jnp.arange(M)[None, None] <= position_BxT[..., None]
    k_BxMxNxD, v_BxMxNxD = (x.swapaxes(1, 2) for x in tokens.layer(layer).unpack(q_BxTxHxD.dtype))
    return xla_attention(q_BxTxHxD, k_BxMxNxD, v_BxMxNxD, mask=seen_BxTxM[:, None]), cache
