"""Quest (Tang et al., arXiv 2406.10774): a query reads the pages with the highest bounds."""

import dataclasses
import math
from typing import ClassVar, Self

import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from dga_jax.model.attention_kinds.baseline_settings import BaselineSettings
from dga_jax.model.attention_kinds.token_selection import (
  HeadShape,
  mark_highest,
  PromptMemory,
  TokenSelectionAttention,
)


@dataclasses.dataclass(frozen=True)
class QuestConfig(BaselineSettings):
  """Pages of adjacent tokens, of which every query reads a few.

  A page is described by the minimum and the maximum of each channel of its keys. With the query q,
  Σ_d max(q_d·min_d, q_d·max_d) bounds q·k for the keys k of the page. A query head reads the
  budget // page_size pages with the highest bounds. All tokens stay. Every query head selects for
  itself, as in the paper; the page of the query's own token competes with the others.

  Attributes:
    budget: tokens that a query head reads.
    page_size: tokens of a page.
    dense_layers: first layers, in which queries read all tokens.
  """

  budget: int = 1024
  page_size: int = 16
  dense_layers: int = 2

  _LEAST: ClassVar = {"budget": 1, "page_size": 1}

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.budget < self.page_size:
      raise ValueError(
        f"QuestConfig.budget is {self.budget}; it must be at least page_size={self.page_size}."
      )

  def with_budget(self, keys: int) -> Self:
    """A query head reads at most `keys` tokens."""
    return self._with_budget(keys, self.page_size, budget=keys)


@dataclasses.dataclass(frozen=True)
class QuestAttention(TokenSelectionAttention):
  """Dense attention over the prompt; decoding reads selected pages."""

  name = "quest"

  settings: QuestConfig

  def init_index(
    self, batch: int, max_length: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike
  ) -> tuple[()]:
    """Empty: the bounds of the pages are computed from the keys in every step."""
    return ()

  def index_prompt(
    self,
    q_BxLxHxD: Array,
    k_BxLxNxD: Array,
    v_BxLxNxD: Array,
    length_B: Array,
    *,
    max_length: int,
  ) -> tuple[()]:
    """See `init_index`."""
    return ()

  def index_token(self, key_BxNxMxD: Array, position_B: Array, index: tuple[()]) -> tuple[()]:
    """See `init_index`."""
    return ()

  def select(
    self,
    q_BxNxRxD: Float[Array, "B N R D"],
    key_BxNxMxD: Float[Array, "B N M D"],
    position_B: Int[Array, "B"],
    index: tuple[()],
    layer: Int[Array, ""],
  ) -> Bool[Array, "B N R M"]:
    """The tokens of the pages with the highest bounds."""
    B, N, M, D = key_BxNxMxD.shape
    R, size = q_BxNxRxD.shape[2], self.settings.page_size
    pages = math.ceil(M / size)
    free = ((0, 0), (0, 0), (0, pages * size - M), (0, 0))
    key = jnp.pad(key_BxNxMxD, free).reshape(B, N, pages, size, D).astype(jnp.float32)
    is_past_BxP = jnp.arange(pages * size)[None] <= position_B[:, None]
    is_past = is_past_BxP.reshape(B, 1, pages, size, 1)
    lowest_BxNxPxD = jnp.where(is_past, key, jnp.inf).min(axis=3)
    highest_BxNxPxD = jnp.where(is_past, key, -jnp.inf).max(axis=3)
    has_token_BxP = is_past.any(axis=3)[:, 0, :, 0]
    lowest, highest = (
      jnp.where(has_token_BxP[:, None, :, None], x, 0)[:, :, None]
      for x in (lowest_BxNxPxD, highest_BxNxPxD)
    )
    q = q_BxNxRxD.astype(jnp.float32)[:, :, :, None]
    bound_BxNxRxP = jnp.maximum(q * lowest, q * highest).sum(axis=-1)
    bound_BxNxRxP = jnp.where(has_token_BxP[:, None, None], bound_BxNxRxP, -jnp.inf)
    chosen_BxNRxP = mark_highest(
      bound_BxNxRxP.reshape(B, N * R, pages), self.settings.budget // size
    )
    chosen_BxNxRxM = jnp.repeat(chosen_BxNRxP.reshape(B, N, R, pages), size, axis=-1)[..., :M]
    return chosen_BxNxRxM | (layer < self.settings.dense_layers)

  def prompt_memory(self, length: int, layer: int, shape: HeadShape) -> PromptMemory:
    """All tokens and two vectors for each page, the size of one key and value, are stored."""
    settings = self.settings
    if layer < settings.dense_layers:
      return PromptMemory(length, length)
    pages = math.ceil(length / settings.page_size)
    chosen = settings.budget // settings.page_size * settings.page_size
    return PromptMemory(length + pages, pages + min(length, shape.query_heads * chosen))
