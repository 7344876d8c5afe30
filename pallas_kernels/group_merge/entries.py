"""The result of group merging, and the index arithmetic of its backends."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


class Entries(NamedTuple):
  """Keys and values of the three sources of grouped attention.

  Kernels copy whole tiles: focal and group arrays may have more rows than were asked for. The
  further rows follow the asked ones and are zeros.
  """

  focal_key: Float[Array, "B S_focal N D"]  # S_focal ≥ r
  focal_value: Float[Array, "B S_focal N D"]
  group_key: Float[Array, "B S_group N D"]  # S_group ≥ k
  group_value: Float[Array, "B S_group N D"]
  window_key: Float[Array, "B S_window N D"]
  window_value: Float[Array, "B S_window N D"]


def num_blocks(length: int, size: int, first: int) -> int:
  """How many whole blocks of `size` tokens follow one another in a row from token `first` on."""
  return max(0, length - first) // size


def block_starts(
  start: Int[Array, "B k"] | None, key: Array, size: int, first: int
) -> Int[Array, "B k"]:
  """First position of each block; None is for consecutive blocks from token `first` on."""
  if start is not None:
    return start
  B, L = key.shape[:2]
  k = num_blocks(L, size, first)
  start_k = first + size * jnp.arange(k, dtype=jnp.int32)
  return jnp.broadcast_to(start_k, (B, k))


def block_indices(
  start_Bxk: Int[Array, "B k"], chosen_BxNxkxf: Int[Array, "B N k f"], members: int, length: int
) -> tuple[Int[Array, "B N kf"], Int[Array, "B N k m"], Int[Array, "B N k"]]:
  """Positions of the focal tokens, the members and the last token of each block; L for none.

  Args:
    start_Bxk: first position of each block; L or more for no block.
    chosen_BxNxkxf: offsets in the block of its focal tokens, ascending.
    members: m, the tokens of a block that are not focal.
    length: L.
  """
  B, N, k, f = chosen_BxNxkxf.shape
  # With chosen offsets c_0 < c_1 < …, c_i − i members precede c_i, so member j follows c_i if
  # c_i − i ≤ j.
  before_BxNxkxf = chosen_BxNxkxf - jnp.arange(f, dtype=jnp.int32)[None, None, None]
  j_m = jnp.arange(members, dtype=jnp.int32)[None, None, None, :, None]
  focal_before_BxNxkxm = (before_BxNxkxf[..., None, :] <= j_m).sum(axis=-1, dtype=jnp.int32)
  start_BxNxkx1 = jnp.broadcast_to(start_Bxk[:, None, :, None], (B, N, k, 1))
  exists = start_BxNxkx1 < length
  focal = jnp.where(exists, start_BxNxkx1 + chosen_BxNxkxf, length)
  member = jnp.where(exists, start_BxNxkx1 + j_m[..., 0] + focal_before_BxNxkxm, length)
  last = jnp.where(exists, start_BxNxkx1 + (members + f - 1), length)
  return focal.reshape(B, N, k * f), member, last[..., 0]
