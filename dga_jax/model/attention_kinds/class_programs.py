"""Attention of the heads of one class: heads of a layer with one setting, see `HeadClasses`.

Several rows of `HeadBudgets` have classes of one setting with equally many heads. `jax.jit` traces
and lowers such classes once for all rows, and the compiler compiles their kernels once.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax import Array

from dga_jax.model.attention_kinds.base import AttentionKind


@functools.partial(jax.jit, static_argnums=0)
def attend_class(
  kind: AttentionKind, metadata: Any, q: Array, k: Array, v: Array, *scores: Array
) -> Array:
  """`attend` of the heads of one class."""
  return kind.attend(q, k, v, metadata, **own_scores(kind, scores))


@functools.partial(jax.jit, static_argnums=(0, 1))
def prefill_class(
  kind: AttentionKind,
  max_length: int,
  metadata: Any,
  options: dict[str, Any],
  qkv: tuple[Array, Array, Array],
) -> tuple[Array, Any]:
  """`prefill` of the heads of one class."""
  q, k, v = qkv
  return kind.prefill(q, k, v, metadata, max_length=max_length, **options)


def with_channel(focal_scores: Array | None) -> tuple[Array, ...]:
  """The scores [..., N, 1], whose last axes are those of keys; () for None."""
  return () if focal_scores is None else (focal_scores[..., None],)


def own_scores(kind: AttentionKind, scores: Sequence[Array]) -> dict[str, Any]:
  """`focal_options` of the kind of a class, from the class's part of `with_channel`."""
  return kind.focal_options(scores[0][..., 0] if scores else None)
