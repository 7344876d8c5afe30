"""The entry point of grouped attention."""

from typing import Any

import jax
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.grouped_attention.kv_sources import HeadOrder, KVSources


def grouped_attention(
  query: Float[Array, "B L H D"],
  sources: KVSources,
  *,
  scale: float | Float[Array, ""],
  max_window: int,
  group_bias: float = 0.0,
  head_order: HeadOrder | None = None,
  implementation: dispatch.Implementation = None,
) -> Float[Array, "B L H D"]:
  """One softmax per query over one range of each of three key/value sources.

  For query (b, i) of head h, KV head n = ⌊h / (H / N)⌋, and s over the tokens [start, end) that
  the query sees of the focal, the group and the window source:

      out = Σ_s softmax_s(scale · q·k_s + bias_s) v_s,   bias_s = group_bias for groups, else 0

  Softmax statistics are float32. A query whose three ranges are empty gives 0, in value and
  gradient. Differentiable in the query, keys and values.

  Args:
    query: any float dtype; all keys and values share it.
    sources: keys, values and int32 ranges; see `KVSources`. A token outside all ranges must be
      finite.
    scale: multiplies the logits. Kernels take a static scale, so a traced one multiplies the
      queries, which are rounded to their dtype.
    max_window: static upper bound on end − start of one query's range of the window. The ranges of
      any b consecutive queries must cover at most b − 1 + max_window tokens.
    group_bias: added to the logits of groups.
    head_order: the order of work where KV heads see very different numbers of keys. It has an
      effect on the speed alone.
    implementation: "mosaic_gpu" (Hopper GPUs), "mosaic_tpu" (TPUs), "triton" (Ampere and newer
      GPUs), "jax_triton" (likewise; no gradient), "xla" or "reference" (any device); a tuple of
      names in order of preference; None for the first that can run the call, except "jax_triton"
      and "reference".

  Raises:
    ValueError: if a name is unknown.
    NotImplementedError: if no named implementation can run this call; the message says why not.
  """
  if isinstance(scale, jax.core.Tracer):
    query, scale = (query * scale).astype(query.dtype), 1.0
  options: dict[str, Any] = {
    "scale": float(scale),
    "group_bias": group_bias,
    "max_window": max_window,
    "head_order": head_order,
  }
  out: Array = dispatch.run("grouped_attention", implementation, query, sources, **options)
  return out
