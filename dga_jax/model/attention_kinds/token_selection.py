"""Methods that read a prompt with dense attention and select tokens for each decoding step.

They are baselines for evaluation. SnapKV and expected attention drop tokens of the prompt at its
end. Quest, ClusterKV and PQCache keep all tokens and read those that a query selects. The arrays
here hold every token, and a mask hides those that a method does not read; `prompt_memory` counts
what the method stores and reads.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from dga_jax.attention.attend import zero_padding
from dga_jax.attention.dense import dense_attention
from dga_jax.attention.segments import Documents
from dga_jax.model.attention_kinds.base import AttentionKind
from pallas_kernels.masks import masked_softmax
from pallas_kernels.products import einsum_float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SelectionCache:
  """All tokens, and what a method knows of them. While decoding, arrays have an axis of layers.

  Attributes:
    key: keys after RoPE; entries from `length` on are not read.
    value: values.
    length: tokens that each sequence has seen.
    index: of the method; a pytree of arrays [*layers, B, N, ...].
  """

  key: Float[Array, "*layers B N M D"]
  value: Float[Array, "*layers B N M D"]
  length: Int[Array, "*layers B"]
  index: Any


class PromptMemory(NamedTuple):
  """Memory of one KV head after a prompt, in keys: bytes over those of one key and its value.

  Attributes:
    stored: keys, values and index that the method keeps.
    read: what one decoding step reads of them, at most. Query heads that share the KV head may
      select different tokens.
  """

  stored: float
  read: float


class HeadShape(NamedTuple):
  """Sizes on which the memory of a KV head depends.

  Attributes:
    query_heads: R, query heads of the KV head.
    head_dim: D.
    bits: of one number of a key.
  """

  query_heads: int
  head_dim: int
  bits: int


class TokenSelectionAttention(AttentionKind):
  """Dense attention over prompts and whole sequences; decoding attends to selected tokens.

  Subclasses define `init_index`, `index_prompt`, `index_token`, `select` and `prompt_memory`.
  """

  one_document = True  # Each document would need a cache of its own.

  def init_index(
    self, batch: int, max_length: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike
  ) -> Any:
    """The index of an empty cache of one layer."""
    raise NotImplementedError

  def index_prompt(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    length_B: Int[Array, "B"],
    *,
    max_length: int,
  ) -> Any:
    """The index of right-padded prompts of `length_B` tokens."""
    raise NotImplementedError

  def index_token(
    self, key_BxNxMxD: Float[Array, "B N M D"], position_B: Int[Array, "B"], index: Any
  ) -> Any:
    """The index after the token at `position_B` was appended to the keys."""
    raise NotImplementedError

  def select(
    self,
    q_BxNxRxD: Float[Array, "B N R D"],
    key_BxNxMxD: Float[Array, "B N M D"],
    position_B: Int[Array, "B"],
    index: Any,
    layer: Int[Array, ""],
  ) -> Bool[Array, "B N r M"]:
    """The tokens that each query reads; r is R, or 1 where all query heads read the same.

    Tokens after `position_B`, the query's own position, may be selected and are not read.
    """
    raise NotImplementedError

  def prompt_memory(self, length: int, layer: int, shape: HeadShape) -> PromptMemory:
    """Memory of one KV head of a layer after a prompt of `length` tokens."""
    raise NotImplementedError

  def attend(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    metadata: Documents,
  ) -> Float[Array, "B L H D"]:
    """Dense causal attention; padding outputs 0."""
    return dense_attention(q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, metadata)

  def init_cache(
    self, batch: int, max_length: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike
  ) -> SelectionCache:
    """An empty cache of one layer for `max_length` tokens a sequence."""
    key = jnp.zeros((batch, num_kv_heads, max_length, head_dim), dtype)
    index = self.init_index(batch, max_length, num_kv_heads, head_dim, dtype)
    return SelectionCache(key, key, jnp.zeros(batch, jnp.int32), index)

  def prefill(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    metadata: Documents,
    *,
    max_length: int,
  ) -> tuple[Float[Array, "B L H D"], SelectionCache]:
    """Attends over right-padded prompts and indexes them."""
    o_BxLxHxD = self.attend(q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, metadata)
    q, k, v = zero_padding(metadata, q_BxLxHxD, k_BxLxNxD, v_BxLxNxD)
    free = ((0, 0), (0, 0), (0, max_length - k.shape[1]), (0, 0))
    return o_BxLxHxD, SelectionCache(
      key=jnp.pad(k.swapaxes(1, 2), free),
      value=jnp.pad(v.swapaxes(1, 2), free),
      length=metadata.row_length,
      index=self.index_prompt(q, k, v, metadata.row_length, max_length=max_length),
    )

  def decode(
    self,
    q_BxHxD: Float[Array, "B H D"],
    k_BxNxD: Float[Array, "B N D"],
    v_BxNxD: Float[Array, "B N D"],
    cache: SelectionCache,
    layer: Int[Array, ""],
  ) -> tuple[Float[Array, "B H D"], SelectionCache]:
    """Appends one token to every sequence and attends to the tokens that its query selects."""
    (B, H, D), N = q_BxHxD.shape, k_BxNxD.shape[1]
    row_B, position_B = jnp.arange(B), cache.length[layer]
    key = cache.key.at[layer, row_B, :, position_B].set(k_BxNxD, mode="drop")
    value = cache.value.at[layer, row_B, :, position_B].set(v_BxNxD, mode="drop")
    index = self.index_token(
      key[layer], position_B, jax.tree.map(lambda array: array[layer], cache.index)
    )
    q_BxNxRxD = q_BxHxD.reshape(B, N, H // N, D)
    selected_BxNxrxM = self.select(q_BxNxRxD, key[layer], position_B, index, layer)
    is_past_BxM = jnp.arange(key.shape[-2])[None] <= position_B[:, None]
    logits_BxNxRxM = D**-0.5 * einsum_float32("bnrd,bnmd->bnrm", q_BxNxRxD, key[layer])
    weights = masked_softmax(logits_BxNxRxM, selected_BxNxrxM & is_past_BxM[:, None, None])
    o_BxNxRxD = jnp.einsum("bnrm,bnmd->bnrd", weights.astype(value.dtype), value[layer])
    return o_BxNxRxD.reshape(B, H, D), SelectionCache(
      key,
      value,
      cache.length.at[layer].add(1),
      jax.tree.map(lambda all_layers, one: all_layers.at[layer].set(one), cache.index, index),
    )


class PromptEvictionAttention(TokenSelectionAttention):
  """Drops tokens of a prompt once, at its end; later tokens stay. Subclasses define `keep`.

  The index is a bool mask of the tokens that stay.

  Attributes:
    settings: has the field `capacity`, the largest number of tokens of a prompt that stay.
  """

  settings: Any

  def keep(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    length_B: Int[Array, "B"],
  ) -> Bool[Array, "B N L"]:
    """The tokens of right-padded prompts that stay. Padding may be marked."""
    raise NotImplementedError

  def init_index(
    self, batch: int, max_length: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike
  ) -> Array:
    """No token stays."""
    return jnp.zeros((batch, num_kv_heads, max_length), bool)

  def index_prompt(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    length_B: Int[Array, "B"],
    *,
    max_length: int,
  ) -> Array:
    """The tokens that `keep` keeps."""
    kept_BxNxL = self.keep(q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, length_B)
    is_token_BxL = jnp.arange(k_BxLxNxD.shape[1])[None] < length_B[:, None]
    free = ((0, 0), (0, 0), (0, max_length - k_BxLxNxD.shape[1]))
    return jnp.pad(kept_BxNxL & is_token_BxL[:, None], free)

  def index_token(self, key_BxNxMxD: Array, position_B: Array, index: Array) -> Array:
    """The new token stays."""
    return index.at[jnp.arange(len(position_B)), :, position_B].set(True, mode="drop")

  def select(
    self, q_BxNxRxD: Array, key_BxNxMxD: Array, position_B: Array, index: Array, layer: Array
  ) -> Array:
    """Every query reads all tokens that stay."""
    return index[:, :, None]

  def prompt_memory(self, length: int, layer: int, shape: HeadShape) -> PromptMemory:
    """The tokens that stay are stored and read."""
    kept = min(length, self.settings.capacity)
    return PromptMemory(kept, kept)


def mark_highest(score_BxNxL: Float[Array, "B N L"], count: int) -> Bool[Array, "B N L"]:
  """True for the `count` highest scores above −∞ of each row and head; ties: the earlier token."""
  L = score_BxNxL.shape[-1]
  highest, index_BxNxK = jax.lax.top_k(score_BxNxL, min(count, L))
  index_BxNxK = jnp.where(jnp.isneginf(highest), L, index_BxNxK)
  row_Bx1x1 = jnp.arange(score_BxNxL.shape[0])[:, None, None]
  head_1xNx1 = jnp.arange(score_BxNxL.shape[1])[None, :, None]
  marks = jnp.zeros(score_BxNxL.shape, bool)
  return marks.at[row_Bx1x1, head_1xNx1, index_BxNxK].set(True, mode="drop")
