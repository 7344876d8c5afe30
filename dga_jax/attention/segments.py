"""Where documents lie in a batch of ragged or packed rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["index", "start", "length"],
  meta_fields=["whole_rows"],
)
@dataclasses.dataclass(frozen=True)
class Documents:
  """For every token, the document that it belongs to. Padding has index −1 and length 0."""

  index: Int[Array, "B L"]  # ordinal of the document in its row
  start: Int[Array, "B L"]  # position of the document's first token
  length: Int[Array, "B L"]  # tokens in the document
  whole_rows: bool = False  # known while tracing: every row is one document of its full length

  @property
  def is_token(self) -> Bool[Array, "B L"]:
    """False for padding."""
    return self.index >= 0

  @property
  def position(self) -> Int[Array, "B L"]:
    """Position inside the document, counted from 0."""
    return positions(self.index)[None] - self.start

  @property
  def is_last(self) -> Bool[Array, "B L"]:
    """Whether the token is its document's last."""
    return self.is_token & (self.position == self.length - 1)

  def extents(self, count: int) -> tuple[Int[Array, "B C"], Int[Array, "B C"]]:
    """Start and length of the first `count` documents of each row; length 0 for absent ones."""
    if self.whole_rows and count == 1:
      return self.start[:, :1], self.length[:, :1]
    each_C = jnp.arange(count, dtype=jnp.int32)
    inside_BxCxL = self.index[:, None] == each_C[None, :, None]
    i_BxCxL = jnp.broadcast_to(positions(self.index), inside_BxCxL.shape)
    start_BxC = jnp.where(inside_BxCxL, i_BxCxL, self.index.shape[1]).min(axis=-1)
    return start_BxC, inside_BxCxL.sum(axis=-1, dtype=jnp.int32)


def positions(x_BxL: Array) -> Int[Array, "L"]:
  """0 … L − 1."""
  return jnp.arange(x_BxL.shape[-1], dtype=jnp.int32)


def find_documents(
  batch: int,
  length: int,
  lengths_B: Int[Array, "B"] | None,
  segment_ids_BxL: Int[Array, "B L"] | None,
) -> Documents:
  """Reads documents off row lengths and segment ids.

  A document is a maximal run of equal ids. Tokens at or beyond their row's length, and tokens
  with a negative id, are padding.
  """
  if lengths_B is None and segment_ids_BxL is None:
    nought_BxL = jnp.zeros((batch, length), jnp.int32)
    return Documents(nought_BxL, nought_BxL, nought_BxL + length, whole_rows=True)
  i_BxL = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
  ids_BxL = 0 * i_BxL if segment_ids_BxL is None else jnp.asarray(segment_ids_BxL, jnp.int32)
  if lengths_B is not None:
    ids_BxL = jnp.where(i_BxL < jnp.asarray(lengths_B)[:, None], ids_BxL, -1)
  token_BxL = ids_BxL >= 0
  outside = jnp.full((batch, 1), -1, ids_BxL.dtype)
  before_BxL = jnp.concatenate([outside, ids_BxL[:, :-1]], axis=1)
  after_BxL = jnp.concatenate([ids_BxL[:, 1:], outside], axis=1)
  first_BxL = token_BxL & (before_BxL != ids_BxL)
  last_BxL = token_BxL & (after_BxL != ids_BxL)
  start_BxL = jax.lax.cummax(jnp.where(first_BxL, i_BxL, 0), axis=1)
  end_BxL = jax.lax.cummin(jnp.where(last_BxL, i_BxL, length), axis=1, reverse=True)
  return Documents(
    index=jnp.where(token_BxL, jnp.cumsum(first_BxL, axis=1, dtype=jnp.int32) - 1, -1),
    start=jnp.where(token_BxL, start_BxL, i_BxL),
    length=jnp.where(token_BxL, end_BxL - start_BxL + 1, 0),
  )
