"""The one entry to selection by score: picks the implementation for the device."""

from jaxtyping import Array, Bool, Float

from pallas_kernels.dispatch import choose
from pallas_kernels.segmented_top_k.segments import Ranges
from pallas_kernels.segmented_top_k.xla import segmented_top_k_xla

_MOST = 2**19  # scores of a row that lie in a TPU's VMEM at once


def segmented_top_k(
  scores_BxNxL: Float[Array, "B N L"], ranges: Ranges, *, implementation: str | None = None
) -> Bool[Array, "B N L"]:
  """Exactly the `quota` highest scores of each range, ties to the earlier position.

  0.0 and −0.0 are equal; NaN is lower than −∞; XLA on a CPU takes subnormals for zeros. Positions
  in no range are False. On one device all implementations give the same mask, bit for bit.

  Args:
    scores_BxNxL: float32.
    ranges: of the rows, the same for all N.
    implementation: "triton" (Ampere and newer GPUs), "mosaic_tpu" (TPUs) or "xla" (any device);
        None for the first that runs on the device at hand.

  Raises:
    ValueError: if the implementation is unknown.
    NotImplementedError: if it is named and cannot compute this call.
  """
  L = scores_BxNxL.shape[-1]
  reason = f"a row has {L} scores; mosaic_tpu takes {_MOST}" if L > _MOST else None
  taken = choose(implementation, {"triton": None, "mosaic_tpu": reason}, scores_BxNxL)
  if taken == "xla":
    return segmented_top_k_xla(scores_BxNxL, ranges)
  # Imported when used: they load compilers that most machines have no use for.
  if taken == "mosaic_tpu":
    from pallas_kernels.segmented_top_k.mosaic_tpu_top_k import segmented_top_k_mosaic_tpu

    return segmented_top_k_mosaic_tpu(scores_BxNxL, ranges)
  from pallas_kernels.segmented_top_k.triton_top_k import segmented_top_k_triton

  return segmented_top_k_triton(scores_BxNxL, ranges)
