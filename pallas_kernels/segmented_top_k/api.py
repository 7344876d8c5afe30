"""The entry point of segmented top-k."""

from jaxtyping import Array, Bool, Float

from pallas_kernels import dispatch
from pallas_kernels.segmented_top_k.segments import Segments


def segmented_top_k(
  scores_BxNxL: Float[Array, "B N L"],
  segments: Segments,
  *,
  implementation: dispatch.Implementation = None,
) -> Bool[Array, "B N L"]:
  """A mask of exactly the `quota` highest scores of each segment; ties go to the earlier position.

  0.0 and −0.0 are equal, and NaN is below −∞; XLA on a CPU treats subnormals as zeros. Positions
  in no segment are False. On one device all implementations give the same mask, bit for bit.

  Args:
    scores_BxNxL: float32.
    segments: of the rows, shared by all N.
    implementation: "triton" (Ampere and newer GPUs), "mosaic_tpu" (TPUs) or "xla" (any device); a
      tuple of names in order of preference; None for the first that can run the call.

  Raises:
    ValueError: if a name is unknown.
    NotImplementedError: if no named implementation can run this call; the message says why not.
  """
  mask_BxNxL: Array = dispatch.run("segmented_top_k", implementation, scores_BxNxL, segments)
  return mask_BxNxL
