"""Attention of the heads of one class: those of a layer that follow one setting."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Float

from dga_jax.model.attention_kinds.base import AttentionKind

type QKV = tuple[Array, Array, Array]
type Options = dict[str, Any]  # From `AttentionKind.focal_options`.


# Several rows have classes of one setting with equally many heads. `jax.jit` traces and lowers such
# classes once for all rows, and the compiler compiles their kernels once.
@functools.partial(jax.jit, static_argnums=0)
def attend_class(
  kind: AttentionKind,
  metadata: Any,
  q: Float[Array, "B L H D"],
  k: Float[Array, "B L N D"],
  v: Float[Array, "B L N D"],
  *scores: Float[Array, "B L N 1"],
) -> Float[Array, "B L H D"]:
  """`AttentionKind.attend` of the heads of one class.

  Args:
    kind: of the class.
    metadata: of the kind.
    q: queries of these heads.
    k: keys.
    v: values.
    scores: from `with_channel`, of these heads.
  """
  return kind.attend(q, k, v, metadata, **own_scores(kind, scores))


@functools.partial(jax.jit, static_argnums=(0, 1))
def prefill_class(
  kind: AttentionKind, max_length: int, metadata: Any, options: Options, qkv: QKV
) -> tuple[Array, Any]:
  """`AttentionKind.prefill` of the heads of one class.

  Args:
    kind: of the class.
    max_length: of the cache.
    metadata: of the kind.
    options: from `own_scores`.
    qkv: queries, keys and values of these heads.
  """
  q, k, v = qkv
  return kind.prefill(q, k, v, metadata, max_length=max_length, **options)


def write_layer(stacked: Any, layer: Any, rank: Array) -> Any:
  """The stacked caches of layers with the cache of one of them."""
  return jax.tree.map(lambda all_layers, one: all_layers.at[rank].set(one), stacked, layer)


def with_channel(
  focal_scores: Float[Array, "*rows N"] | None,
) -> tuple[Float[Array, "*rows N 1"], ...]:
  """The scores [..., N, 1], whose last axes are those of keys; () for None."""
  return () if focal_scores is None else (focal_scores[..., None],)


def own_scores(kind: AttentionKind, scores: Sequence[Float[Array, "*rows N 1"]]) -> Options:
  """`focal_options` of the kind of a class, from the class's part of `with_channel`."""
  return kind.focal_options(scores[0][..., 0] if scores else None)
