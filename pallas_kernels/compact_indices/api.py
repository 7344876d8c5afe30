"""The one entry to placing positions: picks the implementation for the device."""

from jaxtyping import Array, Bool, Int

from pallas_kernels.compact_indices.xla import compact_indices_xla
from pallas_kernels.dispatch import choose

_MOST = 2**19  # positions of a row that lie in a TPU's VMEM at once
_MOST_IN_ALL = 2**24  # of all rows, for 256 of which scalar memory holds two numbers


def compact_indices(
  slot: Int[Array, "*rows L"],
  chosen: Bool[Array, "*rows L"],
  size: int,
  *,
  implementation: str | None = None,
) -> Int[Array, "*rows size"]:
  """The list whose entry slot[i] is i for every chosen i; L where it has none.

  Args:
    slot: int32; those of the chosen ascend along a row, none occurs twice, and what lies outside
      the list is left out.
    chosen: which positions are put in the list.
    size: of the list.
    implementation: "mosaic_tpu" (TPUs), "xla" (any device), or None for the first that runs on the
      device at hand.

  Raises:
    ValueError: if the implementation is unknown.
    NotImplementedError: if it is named and cannot compute this call; the message says why.
  """
  reason = None
  if 0 in slot.shape or size == 0:
    reason = "an array is empty"
  elif max(slot.shape[-1], size) > _MOST:
    reason = f"a row has {slot.shape[-1]} positions and {size} slots; mosaic_tpu takes {_MOST}"
  elif slot.size > _MOST_IN_ALL:
    reason = f"there are {slot.size} positions; mosaic_tpu takes {_MOST_IN_ALL}"
  if choose(implementation, {"mosaic_tpu": reason}, slot) == "xla":
    return compact_indices_xla(slot, chosen, size)
  from pallas_kernels.compact_indices.mosaic_tpu_compact_indices import compact_indices_mosaic_tpu

  return compact_indices_mosaic_tpu(slot, chosen, size)
