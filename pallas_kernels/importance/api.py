"""The one entry to the importance of keys: picks the implementation for the device."""

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import choose
from pallas_kernels.importance.xla import sampled_importance_xla


def sampled_importance(
  query_BxSxHxD: Float[Array, "B S H D"],
  key_BxLxNxD: Float[Array, "B L N D"],
  start_BxS: Int[Array, "B S"],
  end_BxS: Int[Array, "B S"],
  *,
  implementation: str | None = None,
) -> Float[Array, "B N L"]:
  """Attention that sampled queries pay to each key, per query that sees it.

  With query s of row b seeing keys [start, end), and R query heads to a KV head:

      score_j = Σ_s Σ_r softmax(q_sr Kᵀ / √D)_j / #{s that see j}

  Not differentiable: it ranks keys.

  Args:
    query_BxSxHxD: any float dtype. Head h belongs to KV head ⌊h / (H/N)⌋.
    key_BxLxNxD: same dtype.
    start_BxS: int32, first key that a query sees.
    end_BxS: int32, at most L. A query with end ≤ start sees nothing and counts nowhere.
    implementation: "triton" (Ampere and newer GPUs; no float64) or "xla" (any device); None for
        the first that does.

  Returns:
    float32; 0 for keys that no query sees. A non-finite key makes NaN of the scores of all keys
    that its queries see, and touches no other.

  Raises:
    ValueError: if the implementation is unknown.
    NotImplementedError: if it cannot compute this call.
  """
  arrays = (query_BxSxHxD, key_BxLxNxD, start_BxS, end_BxS)
  dtype = key_BxLxNxD.dtype
  wide = f"dtype is {dtype}; triton has none wider than float32" if dtype.itemsize > 4 else None
  taken = choose(implementation, {"triton": wide}, query_BxSxHxD, key_BxLxNxD)
  if taken == "xla":
    return sampled_importance_xla(*arrays)
  # Imported when used: it loads a compiler that most machines have no use for.
  from pallas_kernels.importance.triton_importance import sampled_importance_triton

  return sampled_importance_triton(*arrays)
