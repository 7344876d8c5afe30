"""Gathers by position that XLA compiles; out-of-range positions give a fill value."""

import functools

import jax
from jaxtyping import Array, Float, Int, Shaped


def take_rows(
  x_BxLxNxD: Float[Array, "B L N D"], index_BxNxS: Int[Array, "B N S"]
) -> Float[Array, "B S N D"]:
  """Gathers each head's own positions along L; a position of L or more gives zeros."""
  of_row = jax.vmap(_take, in_axes=(1, 0), out_axes=1)
  return jax.vmap(of_row)(x_BxLxNxD, index_BxNxS)


def take_positions(
  x: Shaped[Array, "B L *T"], index: Int[Array, "B *k"], *, fill: int = 0
) -> Shaped[Array, "B ..."]:
  """Gathers [B, *k, *T] along L, the same positions for all of *T; L or more gives `fill`."""
  return jax.vmap(functools.partial(_take, fill=fill))(x, index)


def _take(x: Array, index: Array, fill: int = 0) -> Array:
  return x.at[index].get(mode="fill", fill_value=fill)
