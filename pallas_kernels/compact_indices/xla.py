"""Positions are placed by a scatter. Runs anywhere, and is the oracle."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def compact_indices_xla(
  slot: Int[Array, "*rows L"], chosen: Bool[Array, "*rows L"], size: int
) -> Int[Array, "*rows size"]:
  """See `compact_indices`."""
  L = slot.shape[-1]
  position_L = jnp.arange(L, dtype=jnp.int32)

  def place(slot_L: Array) -> Array:
    row = jnp.full(size, L, jnp.int32)
    return row.at[slot_L].set(position_L, mode="drop", unique_indices=True)

  # What is left out has slots of its own behind the list. Of single numbers at indices that may
  # repeat, XLA on GPUs under --xla_gpu_deterministic_ops puts those behind a row into the next one.
  slots = jnp.where(chosen & (slot < size), slot, size + position_L).reshape(-1, L)
  return jax.vmap(place)(slots).reshape(*slot.shape[:-1], size)
