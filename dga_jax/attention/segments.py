"""Row lengths and segment ids → the document of every token. Computed once a forward."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

RowKind = Literal["whole", "padded", "packed"]
IntArray = Array | np.ndarray


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["index", "start", "length", "position", "is_token", "is_last"],
  meta_fields=["rows", "count"],
)
@dataclasses.dataclass(frozen=True)
class Documents:
  """The document of every token. A document is a maximal run of equal segment ids. A pytree.

  Attributes:
    index: ordinal of the document in its row; −1 for padding.
    start: position of the document's first token; a padding token's own position.
    length: tokens of the document; 0 for padding.
    position: position of the token in its document, from 0.
    is_token: False for padding.
    is_last: True for the last token of each document.
    rows: "whole" where every row is one document of the full length, "padded" where rows have
      lengths but no segment ids, "packed" where they have segment ids. Static.
    count: the most documents of any row; None where lengths or segment ids are traced. Static.
  """

  index: Int[Array, "B L"]
  start: Int[Array, "B L"]
  length: Int[Array, "B L"]
  position: Int[Array, "B L"]
  is_token: Bool[Array, "B L"]
  is_last: Bool[Array, "B L"]
  rows: RowKind
  count: int | None

  @property
  def row_length(self) -> Int[Array, "B"]:
    """Tokens of each row's only document. Not for packed rows."""
    return self.length[:, 0]

  def extents(self, count: int) -> tuple[Int[Array, "B C"], Int[Array, "B C"]]:
    """Start and length of the first `count` documents of each row; length 0 for absent ones."""
    if self.rows == "whole" and count == 1:
      return self.start[:, :1], self.length[:, :1]
    B, L = self.index.shape
    each_C = jnp.arange(count, dtype=jnp.int32)
    inside_BxCxL = self.index[:, None] == each_C[None, :, None]
    i_BxCxL = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, count, L))
    start_BxC = jnp.where(inside_BxCxL, i_BxCxL, L).min(axis=-1)
    return start_BxC, inside_BxCxL.sum(axis=-1, dtype=jnp.int32)


def find_documents(
  batch: int,
  length: int,
  lengths: Int[IntArray, "B"] | None,
  segment_ids: Int[IntArray, "B L"] | None,
) -> Documents:
  """The documents of a batch of rows.

  Args:
    batch: B, rows.
    length: L, tokens of a row, padding included.
    lengths: tokens of each row; later tokens are padding. None for L.
    segment_ids: documents packed in the rows, as runs of equal ids; negative ids are padding.
  """
  i_BxL = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
  if lengths is None and segment_ids is None:
    zero_BxL = jnp.zeros((batch, length), jnp.int32)
    return Documents(
      index=zero_BxL,
      start=zero_BxL,
      length=zero_BxL + length,
      position=i_BxL,
      is_token=jnp.ones((batch, length), bool),
      is_last=i_BxL == length - 1,
      rows="whole",
      count=1,
    )
  ids_BxL = 0 * i_BxL if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
  if lengths is not None:
    ids_BxL = jnp.where(i_BxL < jnp.asarray(lengths)[:, None], ids_BxL, -1)
  is_token_BxL = ids_BxL >= 0
  outside = jnp.full((batch, 1), -1, ids_BxL.dtype)
  before_BxL = jnp.concatenate([outside, ids_BxL[:, :-1]], axis=1)
  after_BxL = jnp.concatenate([ids_BxL[:, 1:], outside], axis=1)
  is_first_BxL = is_token_BxL & (before_BxL != ids_BxL)
  is_last_BxL = is_token_BxL & (after_BxL != ids_BxL)
  start_BxL = jax.lax.cummax(jnp.where(is_first_BxL, i_BxL, 0), axis=1)
  start_BxL = jnp.where(is_token_BxL, start_BxL, i_BxL)
  end_BxL = jax.lax.cummin(jnp.where(is_last_BxL, i_BxL, length), axis=1, reverse=True)
  ordinal_BxL = jnp.cumsum(is_first_BxL, axis=1, dtype=jnp.int32) - 1
  return Documents(
    index=jnp.where(is_token_BxL, ordinal_BxL, -1),
    start=start_BxL,
    length=jnp.where(is_token_BxL, end_BxL - start_BxL + 1, 0),
    position=i_BxL - start_BxL,
    is_token=is_token_BxL,
    is_last=is_last_BxL,
    rows="padded" if segment_ids is None else "packed",
    count=count_documents(lengths, segment_ids),
  )


def count_documents(
  lengths: Int[IntArray, "B"] | None, segment_ids: Int[IntArray, "B L"] | None
) -> int | None:
  """The most documents of any row; None where lengths or segment ids are traced.

  Args:
    lengths: as for `find_documents`.
    segment_ids: as for `find_documents`.
  """
  if segment_ids is None:
    return 1
  if is_traced(segment_ids) or is_traced(lengths):
    return None
  ids_BxL = np.asarray(segment_ids)
  if lengths is not None:
    inside_BxL = np.arange(ids_BxL.shape[1])[None] < np.asarray(lengths)[:, None]
    ids_BxL = np.where(inside_BxL, ids_BxL, -1)
  before_BxL = np.pad(ids_BxL, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
  return int(((ids_BxL >= 0) & (ids_BxL != before_BxL)).sum(axis=1).max())


def is_traced(x: object) -> bool:
  """Whether the values of x are unknown while tracing, as under jit."""
  return isinstance(x, jax.core.Tracer)


def count_before(x: Bool[Array, "*rows L"] | Int[Array, "*rows L"]) -> Int[Array, "*rows L"]:
  """Exclusive cumulative sum along the row, int32."""
  x = x.astype(jnp.int32)
  return jnp.cumsum(x, axis=-1) - x


def at_document_end(x: Int[Array, "B *N L"], documents: Documents) -> Int[Array, "B *N L"]:
  """The value of x at the last token of each token's document. Padding keeps its own value."""
  if documents.rows == "whole":
    return jnp.broadcast_to(x[..., -1:], x.shape)
  last_BxL = documents.start + jnp.maximum(documents.length, 1) - 1
  return jnp.take_along_axis(x, last_BxL if x.ndim == 2 else last_BxL[:, None], axis=-1)


def at_document_start(x: Int[Array, "B *N L"], documents: Documents) -> Int[Array, "B *N L"]:
  """The value of x at the first token of each token's document, for x from `count_before`.

  Padding keeps its own value.
  """
  if documents.rows == "whole":
    return jnp.zeros_like(x)
  start = documents.start if x.ndim == 2 else documents.start[:, None]
  return jnp.take_along_axis(x, start, axis=-1)
