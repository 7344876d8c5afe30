"""The entry point of the importance of keys."""

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch


def sampled_importance(
  query_BxSxHxD: Float[Array, "B S H D"],
  key_BxLxNxD: Float[Array, "B L N D"],
  start_BxS: Int[Array, "B S"],
  end_BxS: Int[Array, "B S"],
  *,
  implementation: dispatch.Implementation = None,
) -> Float[Array, "B N L"]:
  """Mean attention that sampled queries pay to each key (Eq. 16, 17 of arXiv 2505.22107).

  Query s of row b sees keys [start, end). With R query heads of a KV head:

      score_j = Σ_s Σ_r softmax(q_sr Kᵀ / √D)_j / #{s that see j}

  Not differentiable: the scores only rank keys.

  Args:
    query_BxSxHxD: any float dtype. Head h belongs to KV head ⌊h / (H/N)⌋.
    key_BxLxNxD: same dtype.
    start_BxS: int32, first key that a query sees.
    end_BxS: int32, at most L. A query with end ≤ start sees nothing and counts for no key.
    implementation: "triton" (Ampere and newer GPUs; no float64), "mosaic_tpu" (TPUs; bfloat16 and
      float32, D ≤ 256) or "xla" (any device); a tuple of names in order of preference; None for the
      first that can run the call.

  Returns:
    float32 scores; 0 for keys that no query sees. A non-finite key makes the scores of all keys
    that its queries see NaN, and no others.

  Raises:
    ValueError: if a name is unknown.
    NotImplementedError: if no named implementation can run this call; the message says why not.
  """
  scores_BxNxL: Array = dispatch.run(
    "sampled_importance", implementation, query_BxSxHxD, key_BxLxNxD, start_BxS, end_BxS
  )
  return scores_BxNxL
