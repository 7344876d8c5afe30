"""Stream compaction by a scatter. Runs on any device."""

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

  # Workaround: with --xla_gpu_deterministic_ops, XLA:GPU (jax 0.11.2) scatters out-of-range scalar
  # updates whose indices may repeat into the next row. Dropped positions therefore get slots of
  # their own, past the list, and the indices are unique.
  slots = jnp.where(chosen & (slot < size), slot, size + position_L).reshape(-1, L)
  return jax.vmap(place)(slots).reshape(*slot.shape[:-1], size)
