"""The entry point of stream compaction of positions."""

from jaxtyping import Array, Bool, Int

from pallas_kernels import dispatch


def compact_indices(
  slot: Int[Array, "*rows L"],
  chosen: Bool[Array, "*rows L"],
  size: int,
  *,
  implementation: dispatch.Implementation = None,
) -> Int[Array, "*rows size"]:
  """A list [*rows, size] int32 with list[slot[i]] = i for every chosen position i, else L.

  Args:
    slot: int32. The slots of chosen positions ascend along a row without repeats; positions whose
      slot is outside [0, size) are dropped.
    chosen: the positions to list.
    size: length of the list.
    implementation: "mosaic_tpu" (TPUs) or "xla" (any device); a tuple of names in order of
      preference; None for the first that can run the call.

  Raises:
    ValueError: if a name is unknown.
    NotImplementedError: if no named implementation can run this call; the message says why not.
  """
  index: Array = dispatch.run("compact_indices", implementation, slot, chosen, size)
  return index
