"""Attention of the heads of one class: those of a layer that follow one setting."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array, Float

from dga_jax.attention.segments import is_traced
from dga_jax.model.attention_kinds.base import AttentionKind

type QKV = tuple[Array, Array, Array]
type Options = dict[str, Any]  # From `AttentionKind.focal_options`.


def _lowered_once(static_argnums: tuple[int, ...]) -> Callable[..., Any]:
  """Decorates a function of a class of heads.

  Several rows have classes of one setting with equally many heads. In a traced program `jax.jit`
  traces and lowers such classes once for all rows, and the compiler compiles their kernels once.
  Concrete arrays are not traced, which would hide their device from the choice of kernels.
  """

  def decorate[**P, T](function: Callable[P, T]) -> Callable[P, T]:
    shared = jax.jit(function, static_argnums=static_argnums)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
      run: Callable[P, T] = shared if any(map(is_traced, jax.tree.leaves(args))) else function
      return run(*args, **kwargs)

    return call

  return decorate


@_lowered_once((0,))
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


@_lowered_once((0, 1))
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
