"""The entry point of selection by score."""

from jaxtyping import Array, Bool, Float

from pallas_kernels import dispatch
from pallas_kernels.segmented_top_k.segments import Ranges


def segmented_top_k(
  scores_BxNxL: Float[Array, "B N L"],
  ranges: Ranges,
  *,
  implementation: dispatch.Implementation = None,
) -> Bool[Array, "B N L"]:
  """Exactly the `quota` highest scores of each range, ties to the earlier position.

  0.0 and −0.0 are equal; NaN is lower than −∞; XLA on a CPU takes subnormals for zeros. Positions
  in no range are False. On one device all implementations give the same mask, bit for bit.

  Args:
    scores_BxNxL: float32.
    ranges: of the rows, the same for all N.
    implementation: "triton" (Ampere and newer GPUs), "mosaic_tpu" (TPUs) or "xla" (any device); a
      tuple of names in order of preference; None for the first that can run the call.

  Raises:
    ValueError: if a name is unknown.
    NotImplementedError: if no named implementation can run this call; the message says why not.
  """
  mask_BxNxL: Array = dispatch.run("segmented_top_k", implementation, scores_BxNxL, ranges)
  return mask_BxNxL
