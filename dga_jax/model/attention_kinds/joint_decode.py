"""One decoding step of a layer whose heads have caches of several kinds, in one kernel."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, Float, Int

from dga_jax.attention.head_classes import HeadClasses
from dga_jax.attention.selection import comparable_scores
from dga_jax.cache import CompactCache
from dga_jax.cache.decode import block_rule, group_logit_bias
from dga_jax.config import DGAConfig
from dga_jax.head_budgets import HeadSetting
from dga_jax.model.attention_kinds.dense_cache import DenseCache
from dga_jax.model.attention_kinds.sink_window_cache import SinkWindowCache
from pallas_kernels.decode import (
  CompactHeads,
  has_heads_kernel,
  HeadCache,
  heads_step,
  TokenArrays,
  TokenHeads,
)
from pallas_kernels.head_range import HeadRange


def decode_jointly(
  q_BxHxD: Float[Array, "B H D"],
  k_BxNxD: Float[Array, "B N D"],
  v_BxNxD: Float[Array, "B N D"],
  caches: Sequence[Any],
  classes: HeadClasses,
  settings: Sequence[HeadSetting],
  layer: Int[Array, ""],
  *,
  focal_scores: Float[Array, "B N"] | None = None,
) -> tuple[Float[Array, "B H D"], tuple[Any, ...]] | None:
  """Appends a token to the cache of every class of heads and attends; None without a kernel for it.

  Args:
    q_BxHxD: query of the new token.
    k_BxNxD: its key.
    v_BxNxD: its value.
    caches: of each of `classes.settings`, stacked over layers. They are updated in place.
    classes: the setting of every KV head.
    settings: of the heads.
    layer: the layer to update and read.
    focal_scores: of the new token, if a setting has the selector "fitted".
  """
  D = q_BxHxD.shape[-1]
  heads = None
  if classes.are_adjacent:
    heads = [
      _heads(cache, settings[index], classes.heads_of(index), D)
      for index, cache in zip(classes.settings, caches, strict=True)
    ]
  if not has_heads_kernel(q_BxHxD, heads):
    return None
  assert heads is not None
  scores = None if focal_scores is None else comparable_scores(focal_scores)
  out_BxHxD, updated = heads_step(q_BxHxD, k_BxNxD, v_BxNxD, heads, layer, scores, scale=D**-0.5)
  return out_BxHxD, tuple(
    _with_arrays(cache, *each) for cache, each in zip(caches, updated, strict=True)
  )


def _heads(cache: Any, setting: HeadSetting, heads: HeadRange, head_dim: int) -> HeadCache:
  """The cache of a class in the form of the kernel."""
  if isinstance(cache, CompactCache):
    assert isinstance(setting, DGAConfig)
    cache.settings.require(setting)
    rule = block_rule(setting, head_dim)
    return CompactHeads(heads, cache.arrays, cache.lengths, rule, group_logit_bias(setting))
  if isinstance(cache, DenseCache):
    return TokenHeads(heads, TokenArrays(cache.tokens), cache.length, is_ring=False)
  arrays = TokenArrays(cache.ring, cache.sinks if cache.sinks.key.size else None)
  return TokenHeads(heads, arrays, cache.length, is_ring=True)


def _with_arrays(cache: Any, arrays: Any, length: Array) -> Any:
  """The inverse of `_heads`."""
  if isinstance(cache, CompactCache):
    lengths = cache.lengths._replace(length=length)
    return dataclasses.replace(cache, arrays=arrays, lengths=lengths)
  if isinstance(cache, DenseCache):
    return DenseCache(arrays.tokens, length)
  return SinkWindowCache(arrays.sinks or cache.sinks, arrays.tokens, length)
