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
  """The list whose entry slot[i] is i for every chosen i; L where it has none.

  Args:
    slot: int32; those of the chosen ascend along a row, none occurs twice, and what lies outside
      the list is left out.
    chosen: which positions are put in the list.
    size: of the list.
    implementation: "mosaic_tpu" (TPUs) or "xla" (any device); a tuple of names in order of
      preference; None for the first that can run the call.

  Raises:
    ValueError: if a name is unknown.
    NotImplementedError: if no named implementation can run this call; the message says why not.
  """
  index: Array = dispatch.run("compact_indices", implementation, slot, chosen, size)
  return index
