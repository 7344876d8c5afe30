"""Inputs of the attention benchmarks: random ones, and those of a model."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dga_jax import DGAConfig
from dga_jax.attention.attend import merge_tokens, Merged
from dga_jax.attention.block_entries import for_kernel
from dga_jax.attention.metadata import prepare
from dga_jax.attention.segments import find_documents
from pallas_kernels.grouped_attention import KVSources


@dataclasses.dataclass(frozen=True)
class Shape:
  """Sizes of one benchmark: batch 1, L tokens, H query heads, N KV heads, head dim D."""

  L: int
  H: int
  N: int
  D: int
  dtype: str = "bfloat16"

  def tokens(self, key: Array) -> tuple[Array, Array, Array]:
    """Random query [1, L, H, D], key and value [1, L, N, D]."""
    keys = jax.random.split(key, 3)
    heads = (self.H, self.N, self.N)
    q, k, v = (
      jax.random.normal(key, (1, self.L, n, self.D), self.dtype)
      for key, n in zip(keys, heads, strict=True)
    )
    return q, k, v

  def sources(self, config: DGAConfig, key: Array) -> tuple[Array, KVSources]:
    """The arguments of `grouped_attention` that the op computes from random tokens."""
    return merge(config, *self.tokens(key))


def load_inputs(path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Query [T, H, D], key and value [T, N, D] from a file of `benchmarks.model_inputs`."""
  with np.load(path) as arrays:
    return arrays["query"], arrays["key"], arrays["value"]


def repeat_to(
  shape: Shape, arrays: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> tuple[Array, Array, Array]:
  """Arrays of T tokens as [1, L, heads, D] in the dtype of `shape`, repeated or cut to L tokens."""

  def repeat(x_TxHxD: np.ndarray) -> Array:
    times = -(-shape.L // len(x_TxHxD))
    return jnp.asarray(np.tile(x_TxHxD, (times, 1, 1))[None, : shape.L], shape.dtype)

  query, key, value = map(repeat, arrays)
  return query, key, value


def merge(config: DGAConfig, query: Array, key: Array, value: Array) -> Merged:
  """The arguments of `grouped_attention`: the query and its KVSources, for unpadded sequences."""
  metadata = prepare(find_documents(query.shape[0], query.shape[1], None, None), config)
  merged = merge_tokens(query, key, value, metadata)
  return merged._replace(sources=for_kernel(merged.query, merged.sources, metadata))


def mean_visible(sources: KVSources) -> float:
  """Mean number of keys that a query attends to."""
  return sum(float((source.end - source.start).mean()) for source in sources)


def with_gradients(attention: Callable[..., Array], query: Array, sources: KVSources) -> Any:
  """The output, and the gradients of the query and the KV sources. The cotangent is the output."""
  out, pull = jax.vjp(lambda q, kv: attention(q, sources.with_kv(kv)), query, sources.kv)
  return out, pull(out)
