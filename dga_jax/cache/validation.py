"""Checks of the cache functions' arguments, made while tracing.

Each message names the argument, what it got, what it wants, and the remedy.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dga_jax.attention import validation as attention_validation
from dga_jax.cache.state import CompactCache
from dga_jax.config import DGAConfig


def prompt_fits(length: int, max_length: int) -> None:
  """A prompt is not longer than its cache."""
  if max_length < length:
    raise ValueError(
      f"max_length is {max_length}, but key holds prompts of up to {length} tokens; raise"
      " max_length (prompt and new tokens together) or shorten the prompts."
    )


def new_tokens(
  query: Array,
  key: Array,
  value: Array,
  cache: CompactCache,
  *,
  focal_scores: Array | None,
  axes: str,
  config: DGAConfig,
  layer: Any,
) -> None:
  """Query, key, value and focal scores fit each other, the cache and the config.

  Args:
    axes: of the query, "B H D" or "B T H D".
  """
  raw = cache.arrays.raw_key
  if raw.ndim != (4 if layer is None else 5):
    raise ValueError(
      f"layer is {layer} and cache.arrays.raw_key has shape {raw.shape}; pass layer for a cache"
      " with a leading axis of layers, and leave it out for a cache of one layer."
    )
  if isinstance(layer, int | np.integer) and not 0 <= layer < len(raw):
    raise ValueError(
      f"layer is {layer}, and the cache has {len(raw)} layers; layer must be from 0 to"
      f" {len(raw) - 1}."
    )
  B, N, _, D = raw.shape[-4:]
  shape = np.shape(query)
  if len(shape) != len(axes.split()) or (shape[0], shape[-1]) != (B, D) or shape[-2] % N:
    raise ValueError(
      f"query has shape {list(shape)}; it must be [{', '.join(axes.split())}] with B = {B} and"
      f" D = {D}, as the cache has, and H a multiple of its {N} KV heads."
    )
  *rows, H, _ = shape
  for name, x in (("query", query), ("key", key), ("value", value)):
    shape = (*rows, H if name == "query" else N, D)
    if np.shape(x) != shape or jnp.result_type(x) != raw.dtype:
      raise ValueError(
        f"{name} is {jnp.result_type(x)}{list(np.shape(x))}; beside this query and cache it must be"
        f" {raw.dtype}{list(shape)}."
      )
  attention_validation.is_causal(config, "a cache")
  cache.settings.require(config)
  attention_validation.focal_scores(focal_scores, key, config)


def room(cache: CompactCache, count: Any, *, layer: Any) -> None:
  """`count` new tokens, one number or one per sequence, fit the cache, where values are known.

  A known count is compared with max_length even if the lengths before it are traced.
  """
  length = cache.length if layer is None else cache.length[layer]
  if isinstance(count, jax.core.Tracer):
    return
  before = 0 if isinstance(length, jax.core.Tracer) else np.asarray(length)
  after = before + np.asarray(count)
  if after.size and after.max() > cache.max_length:
    raise ValueError(
      f"lengths reach {after.max()} tokens with the new ones, and the cache was made for"
      f" max_length={cache.max_length}; make it with a larger max_length."
    )
