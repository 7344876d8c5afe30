"""What both entries of the op return, and index arithmetic that implementations share."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


class Entries(NamedTuple):
  """The three key sources of grouped attention.

  Kernels copy rows by tiles: an array may hold a few rows of zeros after the asked ones.
  """

  focal_key: Float[Array, "B r N D"]
  focal_value: Float[Array, "B r N D"]
  group_key: Float[Array, "B k N D"]
  group_value: Float[Array, "B k N D"]
  window_key: Float[Array, "B w N D"]
  window_value: Float[Array, "B w N D"]


def block_starts(start: Int[Array, "B k"] | None, key: Array, size: int) -> Int[Array, "B k"]:
  """First position of each block; None is as many blocks of `size` tokens as fit a row."""
  if start is not None:
    return start
  B, L = key.shape[:2]
  start_k = size * jnp.arange(L // size, dtype=jnp.int32)
  return jnp.broadcast_to(start_k, (B, L // size))


def block_indices(
  start_Bxk: Int[Array, "B k"], chosen_BxNxkxf: Int[Array, "B N k f"], members: int, length: int
) -> tuple[Int[Array, "B N kf"], Int[Array, "B N k m"], Int[Array, "B N k"]]:
  """Positions of the focal tokens, the members and the last token of blocks; L where none.

  Args:
    start_Bxk: first position of each block, L and beyond where there is none.
    chosen_BxNxkxf: places in the block of its focal tokens, ascending.
    members: m, tokens of a block that are not focal.
    length: L.
  """
  B, N, k, f = chosen_BxNxkxf.shape
  # The chosen c_0 < c_1 < …: c_i − i members come before c_i, so member j lies behind c_i where
  # c_i − i ≤ j.
  before_BxNxkxf = chosen_BxNxkxf - jnp.arange(f, dtype=jnp.int32)[None, None, None]
  j_m = jnp.arange(members, dtype=jnp.int32)[None, None, None, :, None]
  behind_BxNxkxm = (before_BxNxkxf[..., None, :] <= j_m).sum(axis=-1, dtype=jnp.int32)
  start_BxNxkx1 = jnp.broadcast_to(start_Bxk[:, None, :, None], (B, N, k, 1))
  exists = start_BxNxkx1 < length
  focal = jnp.where(exists, start_BxNxkx1 + chosen_BxNxkxf, length)
  member = jnp.where(exists, start_BxNxkx1 + j_m[..., 0] + behind_BxNxkxm, length)
  last = jnp.where(exists, start_BxNxkx1 + (members + f - 1), length)
  return focal.reshape(B, N, k * f), member, last[..., 0]
