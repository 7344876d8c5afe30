"""Positions are placed by a scatter. Runs anywhere, and is the oracle."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def place_positions_xla(
  slot: Int[Array, "*rows L"], chosen: Bool[Array, "*rows L"], size: int
) -> Int[Array, "*rows size"]:
  """See `place_positions`."""
  L = slot.shape[-1]
  position_L = jnp.arange(L, dtype=jnp.int32)

  def place(slot_L: Array) -> Array:
    row = jnp.full(size, L, jnp.int32)
    return row.at[slot_L].set(position_L, mode="drop", unique_indices=True)

  # What is left out has slots of its own behind the list. Where indices repeat, XLA on GPUs under
  # --xla_gpu_deterministic_ops takes one behind a row for the next row's first.
  slots = jnp.where(chosen & (slot < size), slot, size + position_L).reshape(-1, L)
  return jax.vmap(place)(slots).reshape(*slot.shape[:-1], size)
