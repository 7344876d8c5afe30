"""The one entry to selection by score: picks the implementation for the device."""

from jaxtyping import Array, Bool, Float

from pallas_kernels.select.ranges import Ranges
from pallas_kernels.select.xla import select_highest_xla
from pallas_kernels.target import takes_triton


def select_highest(
  scores_BxNxL: Float[Array, "B N L"], ranges: Ranges, *, implementation: str | None = None
) -> Bool[Array, "B N L"]:
  """Exactly the `quota` highest scores of each range, ties to the earlier position.

  0.0 and −0.0 are equal; NaN is lower than −∞; XLA on a CPU takes subnormals for zeros. Positions
  in no range are False. On one device all implementations give the same mask, bit for bit.

  Args:
    scores_BxNxL: float32.
    ranges: of the rows, the same for all N.
    implementation: "triton" (Ampere and newer GPUs) or "xla" (any device); None for the first
        that runs on the device at hand.

  Raises:
    ValueError: if the implementation is unknown.
    NotImplementedError: if it is named and cannot compute this call.
  """
  if not takes_triton(implementation, scores_BxNxL):
    return select_highest_xla(scores_BxNxL, ranges)
  # Imported when used: it loads a compiler that most machines have no use for.
  from pallas_kernels.select.triton_select import select_highest_triton

  return select_highest_triton(scores_BxNxL, ranges)
