"""The keys, values and visible ranges of grouped attention: one record from the op to a kernel.

Letters: B batch, L queries, H query heads, N KV heads, D head dim, S tokens of one source,
n KV heads of the ranges (N, or 1 where all heads share them).
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

# Runs of adjacent KV heads, (first, count) of each, that cover all heads.
type Runs = tuple[tuple[int, int], ...]


class HeadOrder(NamedTuple):
  """The order in which kernels deal the work of heads to their programs: costly work first. Static.

  Attributes:
    keys: the heads whose queries see the most keys come first.
    entries: the heads whose queries see the most focal tokens and groups come first.
  """

  keys: Runs
  entries: Runs


class KVSource(NamedTuple):
  """Keys and values, and the contiguous range of them that each query sees.

  Query i of KV head n attends to tokens [start, end) of the source. Both never decrease along L,
  so a tile of queries needs one contiguous slice of the source. An empty range has end ≤ start.
  """

  key: Float[Array, "B S N D"]
  value: Float[Array, "B S N D"]
  start: Int32[Array, "B n L"]
  end: Int32[Array, "B n L"]


class KVSources(NamedTuple):
  """The three sources that one softmax covers, in the order in which kernels visit them."""

  focal: KVSource  # tokens that keep their own key and value
  group: KVSource  # merged groups, whose logits carry `group_bias`
  window: KVSource  # raw tokens near the query

  @property
  def kv(self) -> tuple[tuple[Array, Array], ...]:
    """(key, value) of each source: the arrays that have gradients."""
    return tuple((source.key, source.value) for source in self)

  def with_kv(self, kv: Iterable[tuple[Array, Array]]) -> "KVSources":
    """The same ranges of other keys and values."""
    pairs = zip(self, kv, strict=True)
    return KVSources(*(s._replace(key=key, value=value) for s, (key, value) in pairs))


# `KVSource` and `KVSources` whose fields are a kernel's references, or block specs.
type KVSourceRef = Any
type KVSourcesRef = Any


def kv_cotangent(gradients: Iterable[tuple[Array, Array]]) -> KVSources:
  """The cotangent of `KVSources` from (dk, dv) of each source; integer ranges have none."""
  none: Any = None
  return KVSources(*(KVSource(dk, dv, none, none) for dk, dv in gradients))


def pad_ranges(sources: KVSources, length: int) -> KVSources:
  """Repeats the last query's ranges up to `length` queries."""

  def pad(x_BxnxL: Array) -> Array:
    return jnp.pad(x_BxnxL, ((0, 0), (0, 0), (0, length - x_BxnxL.shape[-1])), mode="edge")

  return KVSources(*(s._replace(start=pad(s.start), end=pad(s.end)) for s in sources))
