"""Attention kinds: one small object each, made from the model's config by name."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int

from dga_jax.model.attention_kinds.dense import DenseAttention
from dga_jax.model.attention_kinds.dga import DynamicGroupAttention
from dga_jax.model.attention_kinds.kv_merger import kv_merger
from dga_jax.model.attention_kinds.minference import MInferenceAttention
from dga_jax.model.attention_kinds.sink_window import WindowAttention
from dga_jax.model.attention_kinds.top_k_eviction import top_k_eviction
from dga_jax.model.config import ModelConfig
from dga_jax.model.rope import inverse_frequencies


class AttentionKind(Protocol):
  """What the decoder asks of an attention kind; queries and keys carry their rotary positions.

  Segment ids: consecutive runs of equal ids are documents, a negative id is padding, whose output
  is 0. Lengths: rows are right-padded, and the output is 0 from the length on.
  """

  def attend(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    *,
    segment_ids: Int[Array, "B L"] | None,
    lengths: Int[Array, "B"] | None,
  ) -> Float[Array, "B L H D"]:
    """Causal attention over whole sequences."""

  def init_cache(
    self, batch: int, max_length: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike
  ) -> Any:
    """An empty cache of one layer: a pytree of arrays."""

  def prefill(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    *,
    lengths: Int[Array, "B"] | None,
    max_length: int,
  ) -> tuple[Float[Array, "B L H D"], Any]:
    """Attends over a right-padded prompt and stores it in a new cache for max_length tokens."""

  def decode(
    self,
    q_BxHxD: Float[Array, "B H D"],
    k_BxNxD: Float[Array, "B N D"],
    v_BxNxD: Float[Array, "B N D"],
    cache: Any,
    layer: Int[Array, ""],
  ) -> tuple[Float[Array, "B H D"], Any]:
    """Appends one token to every sequence and attends to all that its cache holds.

    `cache` holds all layers, stacked on a leading axis, and `layer` says which one is meant. So
    a token is written in place, where taking a layer out and putting it back would copy it.
    """


@runtime_checkable
class ExtendingKind(Protocol):
  """An attention kind whose cache takes several tokens at once."""

  def extend(
    self,
    q_BxTxHxD: Float[Array, "B T H D"],
    k_BxTxNxD: Float[Array, "B T N D"],
    v_BxTxNxD: Float[Array, "B T N D"],
    cache: Any,
    layer: Int[Array, ""],
    *,
    counts: Int[Array, "B"],
  ) -> tuple[Float[Array, "B T H D"], Any]:
    """Appends `counts` of T tokens to each sequence and attends; the cache is as for `decode`.

    Output in the padding has no meaning.
    """


def _sliding_window(config: ModelConfig) -> AttentionKind:
  return WindowAttention(config.sliding_window.window)


def _streaming_llm(config: ModelConfig) -> AttentionKind:
  settings = config.streaming_llm
  return WindowAttention(settings.window, settings.sinks, "in_cache", _omega(config))


def _lm_infinite(config: ModelConfig) -> AttentionKind:
  settings = config.lm_infinite
  return WindowAttention(
    settings.local_window, settings.global_tokens, "at_most_window", _omega(config)
  )


def _omega(config: ModelConfig) -> np.ndarray:
  return inverse_frequencies(config.head_dim, base=config.rope_base, scaling=config.rope_scaling)


_FACTORIES: dict[str, Callable[[ModelConfig], AttentionKind]] = {
  "dga": lambda config: DynamicGroupAttention(config.dga),
  "dense": lambda config: DenseAttention(),
  "sliding_window": _sliding_window,
  "streaming_llm": _streaming_llm,
  "lm_infinite": _lm_infinite,
  "minference": lambda config: MInferenceAttention(config.minference),
  "top_k_eviction": lambda config: top_k_eviction(config.top_k_eviction),
  "kv_merger": lambda config: kv_merger(config.kv_merger),
}


def make_attention(config: ModelConfig) -> AttentionKind:
  """The attention kind that `config.attention` names."""
  return _FACTORIES[config.attention](config)
