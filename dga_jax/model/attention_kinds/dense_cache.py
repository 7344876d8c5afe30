"""A cache of every key and value, and dense decoding over it."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from dga_jax.attention.segments import Documents
from dga_jax.choices import CacheDtypeName
from dga_jax.model.attention_kinds.base import AttentionKind
from pallas_kernels.decode import dense_step, TokenRows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCache:
  """All keys and values. While decoding, arrays have a leading axis of layers.

  Heads precede positions, so that the products of decoding read contiguous memory.

  Attributes:
    tokens: keys after RoPE, and values; entries from `length` on are not read.
    length: tokens that each sequence has seen.
  """

  tokens: TokenRows
  length: Int[Array, "*layers B"]


class DenseCacheAttention(AttentionKind):
  """Decodes densely. Subclasses define `attend` for whole sequences and prompts.

  Attributes:
    cache_dtype: the 8-bit dtype in which the cache stores tokens; None for that of the model.
      `decode` and `extend` read the rounded tokens, and `attend` the exact ones.
  """

  cache_dtype: CacheDtypeName | None = None

  def init_cache(
    self, batch: int, max_length: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike
  ) -> DenseCache:
    """An empty cache of one layer for `max_length` tokens a sequence."""
    shape = (batch, num_kv_heads, max_length, head_dim)
    tokens = TokenRows.empty(shape, self.cache_dtype or dtype)
    return DenseCache(tokens, jnp.zeros(batch, jnp.int32))

  def prefill(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    metadata: Documents,
    *,
    max_length: int,
  ) -> tuple[Float[Array, "B L H D"], DenseCache]:
    """Attends over right-padded prompts and stores them; decoding overwrites the padding."""
    o_BxLxHxD = self.attend(q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, metadata)
    return o_BxLxHxD, self.cache_prompt(k_BxLxNxD, v_BxLxNxD, metadata, max_length=max_length)

  def cache_prompt(
    self,
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    metadata: Documents,
    *,
    max_length: int,
  ) -> DenseCache:
    """The cache after right-padded prompts."""
    free = ((0, 0), (0, 0), (0, max_length - k_BxLxNxD.shape[1]), (0, 0))
    k_BxNxMxD, v_BxNxMxD = (jnp.pad(x.swapaxes(1, 2), free) for x in (k_BxLxNxD, v_BxLxNxD))
    tokens = TokenRows.pack(k_BxNxMxD, v_BxNxMxD, self.cache_dtype or k_BxNxMxD.dtype)
    return DenseCache(tokens, metadata.row_length)

  def decode(
    self,
    q_BxHxD: Float[Array, "B H D"],
    k_BxNxD: Float[Array, "B N D"],
    v_BxNxD: Float[Array, "B N D"],
    cache: DenseCache,
    layer: Int[Array, ""],
  ) -> tuple[Float[Array, "B H D"], DenseCache]:
    """Appends one token at each sequence's own end and attends to all tokens so far.

    A token beyond the cache's max_length is not stored. That cannot raise under jit, where lengths
    are unknown: the caller bounds the number of steps.
    """
    o_BxHxD, tokens, length = dense_step(
      q_BxHxD,
      k_BxNxD,
      v_BxNxD,
      cache.tokens,
      cache.length,
      layer,
      scale=q_BxHxD.shape[-1] ** -0.5,
    )
    return o_BxHxD, DenseCache(tokens, length)
