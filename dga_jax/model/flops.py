"""Sizes and costs by formula: parameters, and floating-point operations of a training token."""

import math
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from dga_jax.cache.layout import cache_layout, cache_size
from dga_jax.config import DGAConfig
from dga_jax.head_budgets import FULL, HeadSetting, SinkWindow
from dga_jax.model.attention_kinds.kv_merger import KVMergerConfig
from dga_jax.model.attention_kinds.top_k_eviction import TopKEvictionConfig
from dga_jax.model.config import ModelConfig
from dga_jax.model.decoder import Decoder


def parameter_count(config: ModelConfig) -> int:
  """Number of parameters, by abstract evaluation: nothing is allocated."""
  model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def flops_per_token(config: ModelConfig, context_length: int) -> float:
  """Operations that training needs for one token of a sequence of `context_length` tokens.

    6·P + 12·layers·H·D·keys

  P counts the weights that multiply a token, with the unembedding and without the embedding table:
  two operations each forward, four backward. Attention of a query takes q·K and w·V, each 2·D
  operations per key forward and twice that backward. `keys` is the mean over causal queries of the
  keys that the attention kind attends to, see `mean_keys`. Recomputation (remat) and DGA's choice
  and merging of tokens are not counted. A utilization (MFU) computed from this number is therefore
  a lower bound.

  Raises:
    ValueError: if context_length is below 1.
  """
  heads = config.num_heads * config.head_dim
  kv_heads = config.num_kv_heads * config.head_dim
  attention = config.embed_dim * (2 * heads + 2 * kv_heads)
  mlp = 3 * config.embed_dim * config.mlp_dim
  weights = config.num_layers * (attention + mlp) + config.embed_dim * config.vocab_size
  return 6 * weights + 12 * config.num_layers * heads * mean_keys(config, context_length)


def mean_keys(config: ModelConfig, context_length: int) -> float:
  """Keys that a query attends to, averaged over the positions of a sequence.

  Dense: (L + 1)/2. DGA: focal tokens + groups + raw tokens of the incomplete group or block.
  Streaming selection is exact. Global and random selection are counted with the inclusive rule and
  with evenly spread focal tokens, an approximation. The baselines are exact, except MInference: its
  vertical and slash keys are counted as disjoint, an upper bound. For head budgets it is also the
  mean over all heads.

  Raises:
    ValueError: if context_length is below 1.
  """
  if context_length < 1:
    raise ValueError(f"context_length is {context_length}; it must be at least 1.")
  seen_L = np.arange(1, context_length + 1)
  return float(_seen_keys(config, seen_L).mean())


def cache_keys(config: ModelConfig, max_length: int) -> float:
  """Keys that the cache of a sequence holds, averaged over the KV heads of all layers.

  Times 2·layers·N·D and the bytes of a number this is the size of the cache, unless it has entries
  in 8 bits. For attention="dense", "head_budgets", and "dga" with streaming selection.

  Args:
    config: of the model.
    max_length: tokens of the sequence, prompt and new ones together.

  Raises:
    ValueError: the attention kind is another one, or max_length is below 1.
  """
  if max_length < 1:
    raise ValueError(f"max_length is {max_length}; it must be at least 1.")
  settings: dict[HeadSetting, int]
  match config.attention:
    case "dense":
      settings = {FULL: 1}
    case "dga" if config.dga.selection == "streaming":
      settings = {config.dga: 1}
    case "head_budgets" if config.head_budgets is not None:
      settings = config.head_budgets.counts()
    case _:
      raise ValueError(
        f"attention is {config.attention!r}; cache_keys counts 'dense', 'head_budgets', and 'dga' "
        "with streaming selection. Measure other caches with dga_jax.evaluation.variants.Family."
      )
  return mean_head_keys(settings, max_length)


def mean_head_keys(heads: Mapping[HeadSetting, int], max_length: int) -> float:
  """The mean of `setting_keys` over heads, given as the number of heads of each setting."""
  held = sum(setting_keys(setting, max_length) * count for setting, count in heads.items())
  return held / sum(heads.values())


def setting_keys(setting: HeadSetting, max_length: int) -> int:
  """Keys that the cache of one KV head holds for a sequence of at most `max_length` tokens."""
  if isinstance(setting, DGAConfig):
    return cache_size(config=setting, max_length=max_length).total
  if isinstance(setting, SinkWindow):
    return min(setting.sinks + setting.window, max_length)
  return max_length


def _seen_keys(config: ModelConfig, seen_L: np.ndarray) -> np.ndarray:
  if config.attention == "head_budgets" and config.head_budgets is not None:
    counts = config.head_budgets.counts()
    keys = [_setting_seen_keys(setting, seen_L) for setting in counts]
    return np.average(keys, axis=0, weights=list(counts.values()))
  if config.attention == "dga":
    streaming = config.dga.selection == "streaming"
    return _streaming_keys(config.dga, seen_L) if streaming else _global_keys(config.dga, seen_L)
  if config.attention == "top_k_eviction":
    return _bounded_keys(config.top_k_eviction, seen_L)
  if config.attention == "kv_merger":
    return _bounded_keys(config.kv_merger, seen_L)
  bounds = {
    "sliding_window": config.sliding_window.window,
    "streaming_llm": config.streaming_llm.sinks + config.streaming_llm.window,
    "lm_infinite": config.lm_infinite.global_tokens + config.lm_infinite.local_window,
    "minference": config.minference.vertical + config.minference.slash,
  }
  # The other kinds read whole sequences with dense attention.
  return np.minimum(seen_L, bounds.get(config.attention, len(seen_L)))


def _setting_seen_keys(setting: HeadSetting, seen_L: np.ndarray) -> np.ndarray:
  if isinstance(setting, DGAConfig):
    return _streaming_keys(setting, seen_L)
  if isinstance(setting, SinkWindow):
    return np.minimum(seen_L, setting.sinks + setting.window)
  return seen_L


def _bounded_keys(settings: TopKEvictionConfig | KVMergerConfig, seen_L: np.ndarray) -> np.ndarray:
  if settings.dense_prompt:
    return seen_L
  whole_L = (seen_L - 1) // settings.interval * settings.interval
  return np.minimum(whole_L, settings.entries) + seen_L - whole_L


def _streaming_keys(dga: DGAConfig, seen_L: np.ndarray) -> np.ndarray:
  layout = cache_layout(dga)
  token = layout.locate(seen_L - 1, dga.sink_tokens)
  compact_L = layout.earlier_blocks(token, prefix=dga.sink_tokens).compact_end
  return compact_L + layout.raw_tokens(token) + 1


def _global_keys(dga: DGAConfig, seen_L: np.ndarray) -> np.ndarray:
  L = len(seen_L)
  r = int(dga.focal_quota(L)[L])
  other_L = seen_L * (L - r) // L
  groups_L, raw_L = np.divmod(other_L, dga.group_size)
  return seen_L - other_L + groups_L + (raw_L if dga.complementary else 0)
