"""PQCache (Zhang et al., arXiv 2407.12820): product-quantised keys choose the tokens to read."""

import dataclasses
from typing import ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from dga_jax.model.attention_kinds.baseline_settings import BaselineSettings
from dga_jax.model.attention_kinds.k_means import k_means, nearest_centroid
from dga_jax.model.attention_kinds.token_selection import (
  HeadShape,
  mark_highest,
  PromptMemory,
  TokenSelectionAttention,
)


@dataclasses.dataclass(frozen=True)
class PQCacheConfig(BaselineSettings):
  """Codes of keys, from which the product with a query is estimated.

  The channels of a key are cut into `parts`. k-means finds 2^bits centroids of each part of the
  prompt's keys after the sinks, and a key's code names the nearest centroid of each part. A query
  estimates q·k by the product with the centroids of the code. The softmax of the estimates over the
  tokens between the sinks and the recent tokens, summed over the query heads of a KV head, chooses
  `top_k` tokens. Sinks, the last `recent` tokens before the query's own, and its own are read too.
  A new token has the code of the nearest centroids. All tokens stay. A prompt with at most 2^bits
  tokens after the sinks is read whole.

  The parts and bits are the paper's; sinks, and equally many recent and chosen tokens, are those of
  the authors' scripts, here with a fifth of 4096 tokens. Centroids start at evenly spaced keys.

  Attributes:
    top_k: tokens that estimates choose.
    recent: last tokens.
    sinks: first tokens.
    parts: of a key; must divide its channels.
    bits: of a code of one part.
    iterations: of k-means.
  """

  top_k: int = 406
  recent: int = 406
  sinks: int = 32
  parts: int = 2
  bits: int = 6
  iterations: int = 20

  _LEAST: ClassVar = {"top_k": 1, "parts": 1, "bits": 1, "iterations": 1}

  def with_budget(self, keys: int) -> Self:
    """The same sinks; the rest of `keys` in halves, recent and chosen tokens."""
    rest = keys - self.sinks
    return self._with_budget(keys, self.sinks + 2, recent=rest // 2, top_k=rest - rest // 2)


class Codes(NamedTuple):
  """Of the keys of a sequence. While decoding, arrays have a leading axis of layers."""

  centroid: Float[Array, "*layers B N P C d"]
  code: Int[Array, "*layers B N P M"]
  has_codes: Bool[Array, "*layers B"]  # False for prompts that are read whole


@dataclasses.dataclass(frozen=True)
class PQCacheAttention(TokenSelectionAttention):
  """Dense attention over the prompt; decoding reads the tokens that codes choose."""

  name = "pqcache"

  settings: PQCacheConfig

  def init_index(
    self, batch: int, max_length: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike
  ) -> Codes:
    """No codes.

    Raises:
      ValueError: the parts do not divide the channels of a key.
    """
    settings = self.settings
    if head_dim % settings.parts:
      raise ValueError(
        f"PQCacheConfig.parts is {settings.parts}; it must divide the {head_dim} channels of a key."
      )
    shape = (batch, num_kv_heads, settings.parts)
    return Codes(
      jnp.zeros((*shape, 2**settings.bits, head_dim // settings.parts), jnp.float32),
      jnp.zeros((*shape, max_length), jnp.int32),
      jnp.zeros(batch, bool),
    )

  def index_prompt(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    length_B: Int[Array, "B"],
    *,
    max_length: int,
  ) -> Codes:
    """Finds the centroids and the codes of the prompt's keys."""
    B, L, N, D = k_BxLxNxD.shape
    settings = self.settings
    empty = self.init_index(B, max_length, N, D, k_BxLxNxD.dtype)
    count = jnp.int32(2**settings.bits)
    i_L = jnp.arange(L)
    is_point_BxL = (i_L[None] >= settings.sinks) & (i_L[None] < length_B[:, None])

    def of_part(x_Lxd: Array, is_point_L: Array) -> tuple[Array, Array]:
      centroids = k_means(
        x_Lxd,
        is_point_L,
        count,
        most_clusters=2**settings.bits,
        metric="euclidean",
        iterations=settings.iterations,
      )
      return centroids, nearest_centroid(x_Lxd, centroids, count, "euclidean")

    parts_BxNxPxLxd = self._split(k_BxLxNxD.swapaxes(1, 2))
    of_head = jax.vmap(of_part, in_axes=(0, None))
    of_row = jax.vmap(of_head, in_axes=(0, None))
    centroid, code_BxNxPxL = jax.vmap(of_row)(parts_BxNxPxLxd, is_point_BxL)
    code = empty.code.at[..., :L].set(code_BxNxPxL)
    return Codes(centroid, code, length_B - settings.sinks > count)

  def index_token(
    self, key_BxNxMxD: Float[Array, "B N M D"], position_B: Int[Array, "B"], index: Codes
  ) -> Codes:
    """The code of the new key."""
    B = len(position_B)
    position_Bx1x1x1 = position_B[:, None, None, None]
    key_BxNx1xD = jnp.take_along_axis(key_BxNxMxD, position_Bx1x1x1, axis=2)
    count = jnp.int32(2**self.settings.bits)

    def code_of(x_1xd: Array, centroids: Array) -> Array:
      return nearest_centroid(x_1xd, centroids, count, "euclidean")[0]

    code_of = jax.vmap(jax.vmap(jax.vmap(code_of)))
    code_BxNxP = code_of(self._split(key_BxNx1xD), index.centroid)
    row_B, code = jnp.arange(B), index.code
    return index._replace(code=code.at[row_B, :, :, position_B].set(code_BxNxP, mode="drop"))

  def select(
    self,
    q_BxNxRxD: Float[Array, "B N R D"],
    key_BxNxMxD: Float[Array, "B N M D"],
    position_B: Int[Array, "B"],
    index: Codes,
    layer: Int[Array, ""],
  ) -> Bool[Array, "B N 1 M"]:
    """Sinks, recent tokens, and the tokens with the highest estimates."""
    settings, (_, _, M, D) = self.settings, key_BxNxMxD.shape
    j_M = jnp.arange(M)
    is_recent_BxM = j_M[None] >= position_B[:, None] - settings.recent
    is_candidate_BxM = (j_M[None] >= settings.sinks) & ~is_recent_BxM
    q_BxNxPxRxd = self._split(q_BxNxRxD.astype(jnp.float32))
    table_BxNxPxRxC = jnp.einsum("bnprd,bnpcd->bnprc", q_BxNxPxRxd, index.centroid)
    code = jnp.broadcast_to(index.code[:, :, :, None], (*table_BxNxPxRxC.shape[:4], M))
    estimate_BxNxRxM = jnp.take_along_axis(table_BxNxPxRxC, code, axis=-1).sum(axis=2)
    logits_BxNxRxM = jnp.where(is_candidate_BxM[:, None, None], estimate_BxNxRxM / D**0.5, -jnp.inf)
    weight_BxNxM = jax.nn.softmax(logits_BxNxRxM).sum(axis=2)
    score_BxNxM = jnp.where(is_candidate_BxM[:, None], weight_BxNxM, -jnp.inf)
    chosen_BxNxM = mark_highest(score_BxNxM, settings.top_k)
    always_BxM = ~is_candidate_BxM | ~index.has_codes[:, None]
    return (chosen_BxNxM | always_BxM[:, None])[:, :, None]

  def prompt_memory(self, length: int, layer: int, shape: HeadShape) -> PromptMemory:
    """All tokens, the codes and the centroids are stored; a step reads all codes."""
    settings, coded = self.settings, max(length - self.settings.sinks, 0)
    if coded <= 2**settings.bits:
      return PromptMemory(length, length)
    codes = coded * settings.parts * settings.bits / (2 * shape.head_dim * shape.bits)
    centroids = 2**settings.bits / 2  # D numbers for each, half of a key and its value.
    chosen = settings.sinks + settings.recent + settings.top_k
    return PromptMemory(length + codes + centroids, min(length, chosen) + codes + centroids)

  def _split(self, x: Float[Array, "B N S D"]) -> Float[Array, "B N P S d"]:
    """The parts of keys or queries."""
    B, N, S, D = x.shape
    parts = self.settings.parts
    return x.reshape(B, N, S, parts, D // parts).transpose(0, 1, 3, 2, 4)
