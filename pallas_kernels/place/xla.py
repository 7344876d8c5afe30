"""Positions are placed by a scatter. Runs anywhere, and is the oracle."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def place_positions_xla(
  slot: Int[Array, "*rows L"], chosen: Bool[Array, "*rows L"], size: int
) -> Int[Array, "*rows size"]:
  """See `place_positions`."""
  L = slot.shape[-1]

  def place(slot_L: Array) -> Array:
    position_L = jnp.arange(L, dtype=jnp.int32)
    return jnp.full(size, L, jnp.int32).at[slot_L].set(position_L, mode="drop")

  slots = jnp.where(chosen, slot, size).reshape(-1, L)
  return jax.vmap(place)(slots).reshape(*slot.shape[:-1], size)
