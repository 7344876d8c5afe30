"""The attention kinds by name: the class of their settings, and how a kind is made from them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dga_jax.choices import AttentionName
from dga_jax.config import DGAConfig
from dga_jax.head_budgets import HeadBudgets
from dga_jax.model.attention_kinds.base import AttentionKind
from dga_jax.model.attention_kinds.clusterkv import ClusterKVAttention, ClusterKVConfig
from dga_jax.model.attention_kinds.dense import DenseAttention
from dga_jax.model.attention_kinds.dga import DynamicGroupAttention
from dga_jax.model.attention_kinds.expected_attention import (
  ExpectedAttention,
  ExpectedAttentionConfig,
)
from dga_jax.model.attention_kinds.head_budgets import HeadBudgetsAttention
from dga_jax.model.attention_kinds.kv_merger import kv_merger, KVMergerConfig
from dga_jax.model.attention_kinds.lm_infinite import lm_infinite, LMInfiniteConfig
from dga_jax.model.attention_kinds.minference import MInferenceAttention, MInferenceConfig
from dga_jax.model.attention_kinds.pqcache import PQCacheAttention, PQCacheConfig
from dga_jax.model.attention_kinds.quest import QuestAttention, QuestConfig
from dga_jax.model.attention_kinds.sliding_window import sliding_window, SlidingWindowConfig
from dga_jax.model.attention_kinds.snapkv import SnapKVAttention, SnapKVConfig
from dga_jax.model.attention_kinds.streaming_llm import streaming_llm, StreamingLLMConfig
from dga_jax.model.attention_kinds.top_k_eviction import top_k_eviction, TopKEvictionConfig


class _Kind(NamedTuple):
  """An attention kind.

  Attributes:
    settings: class of the field of ModelConfig that has the kind's name; None for no settings.
    make: the kind, from its settings and the inverse frequencies ω [D/2] of the model's RoPE.
  """

  settings: type | None
  make: Callable[[Any, np.ndarray], AttentionKind]


_KINDS: dict[AttentionName, _Kind] = {
  "dga": _Kind(DGAConfig, lambda settings, _: DynamicGroupAttention(settings)),
  "dense": _Kind(None, lambda settings, _: DenseAttention()),
  "head_budgets": _Kind(HeadBudgets, lambda settings, _: HeadBudgetsAttention(settings)),
  "sliding_window": _Kind(SlidingWindowConfig, lambda settings, _: sliding_window(settings)),
  "streaming_llm": _Kind(StreamingLLMConfig, streaming_llm),
  "lm_infinite": _Kind(LMInfiniteConfig, lm_infinite),
  "minference": _Kind(MInferenceConfig, lambda settings, _: MInferenceAttention(settings)),
  "top_k_eviction": _Kind(TopKEvictionConfig, lambda settings, _: top_k_eviction(settings)),
  "kv_merger": _Kind(KVMergerConfig, lambda settings, _: kv_merger(settings)),
  "snapkv": _Kind(SnapKVConfig, lambda settings, _: SnapKVAttention(settings)),
  "quest": _Kind(QuestConfig, lambda settings, _: QuestAttention(settings)),
  "expected_attention": _Kind(
    ExpectedAttentionConfig,
    lambda settings, frequencies: ExpectedAttention(settings, tuple(frequencies)),
  ),
  "clusterkv": _Kind(ClusterKVConfig, lambda settings, _: ClusterKVAttention(settings)),
  "pqcache": _Kind(PQCacheConfig, lambda settings, _: PQCacheAttention(settings)),
}

# Settings by the name of the kind, for the kinds that have any.
ATTENTION_SETTINGS: dict[str, type] = {
  name: kind.settings for name, kind in _KINDS.items() if kind.settings
}


def make_kind(name: AttentionName, settings: Any, inverse_frequencies: np.ndarray) -> AttentionKind:
  """The attention kind of a name.

  Args:
    name: of the kind.
    settings: an instance of ATTENTION_SETTINGS[name]; None for a kind without settings.
    inverse_frequencies: ω [D/2] of the model's RoPE.
  """
  return _KINDS[name].make(settings, inverse_frequencies)
