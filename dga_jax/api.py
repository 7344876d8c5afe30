"""The public op: checks of its arguments, then the steps of `dga_jax.attention.attend`."""

import functools
from typing import Any

import jax
from jaxtyping import Array, Float

from dga_jax.attention import validation
from dga_jax.attention.attend import (
  attend,
  attend_with_plan,
  make_plan,
  nan_where_invalid,
)
from dga_jax.attention.metadata import prepare
from dga_jax.attention.plan import GroupPlan
from dga_jax.attention.reference import number_documents, reference_attention
from dga_jax.attention.segments import find_documents
from dga_jax.attention.validation import Lengths, SegmentIds
from dga_jax.cache import decode_step, empty_cache
from dga_jax.config import DGAConfig
from dga_jax.explanation import Explanation
from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation

ArrayOrShape = Array | jax.ShapeDtypeStruct


def dynamic_group_attention(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  value: Float[Array, "B L N D"],
  *,
  config: DGAConfig,
  plan: GroupPlan | None = None,
  lengths: Lengths | None = None,
  segment_ids: SegmentIds | None = None,
  scale: float | None = None,
  implementation: Implementation = None,
) -> Float[Array, "B L H D"]:
  """Causal attention over focal tokens, merged groups and the raw tokens of one open group.

  Zhang et al., ICML 2025 (arXiv 2505.22107), Algorithm 1, masked before the softmax. Query i
  attends, in one softmax, to the focal tokens j ≤ i, to the groups that end by then, each a
  weighted mean of m tokens' keys and values (Eq. 14), and to the raw members of the group whose
  span it lies in.

  Args:
    query: any float dtype, which all arrays share. Softmax statistics are float32.
    key: N KV heads, N dividing H; query head h belongs to KV head ⌊h / (H/N)⌋.
    value: as key.
    config: every switch of the mechanism.
    plan: fixes the split. Default: `plan_groups(query, key, config=config, ...)`.
    lengths: tokens of each row, the rest being right padding. Default: all L.
    segment_ids: runs of equal ids are documents packed in a row; a negative id is padding. Each
      row and document is computed exactly as it would be alone; padded queries give 0.
    scale: of the attention logits, default 1/√D. The choice of focal tokens always uses 1/√D,
      and the merge weights follow `config.aggregation_scale`.
    implementation: of attention: None for the fastest that applies, a name that `explain` lists, or
      a tuple of names in order of preference. "reference" computes the whole op with L×L masks.
      "xla" also merges groups in XLA.

  Returns:
    The query's shape and dtype. Differentiable in query, key and value.

  Raises:
    ValueError: names the argument that does not fit and what it must be.
    NotImplementedError: if the named implementation cannot compute this call, and why.
  """
  validation.query_and_key(query, key)
  validation.value_like_key(value, key)
  validation.softmax_scale(scale)
  validation.implementation(implementation)
  B, L, _, D = query.shape
  lengths, segment_ids = validation.rows(B, L, lengths, segment_ids)
  whole = lengths is None and segment_ids is None
  documents = find_documents(B, L, lengths, segment_ids)
  if plan is not None:
    plan.check_fits(query, key, config, None if whole else documents)
  if implementation in ("reference", ("reference",)):
    if plan is None:
      plan = make_plan(query, key, prepare(documents, config))
    out_BxLxHxD = reference_attention(
      query,
      key,
      value,
      plan.focal_mask,
      plan.documents.index if whole else number_documents(B, L, lengths, segment_ids),
      config=config,
      scale=D**-0.5 if scale is None else scale,
    )
    return nan_where_invalid(out_BxLxHxD, plan.invalid)
  if plan is not None:
    return attend_with_plan(query, key, value, plan, scale=scale, implementation=implementation)
  metadata = prepare(documents, config)
  return attend(query, key, value, metadata, scale=scale, implementation=implementation)


def plan_groups(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  *,
  config: DGAConfig,
  lengths: Lengths | None = None,
  segment_ids: SegmentIds | None = None,
) -> GroupPlan:
  """Chooses focal tokens and groups for every row, document and KV head.

  Global selection ranks keys by the attention of sampled queries (Eq. 16, 17 of the paper).
  Streaming selection lets the last query of each block choose within the block. Random selection
  draws. Each row and document is planned exactly as it would be alone. No gradient flows through
  the choice.

  Args:
    query: any float dtype. Query head h belongs to KV head ⌊h / (H/N)⌋.
    key: same dtype as query.
    config: settings of the mechanism.
    lengths: tokens of each row, an int array or a list; later tokens are padding. Default: all L.
    segment_ids: runs of equal ids are documents packed in a row; negative ids are padding. An int
      array or a list of lists.

  Returns:
    A plan for `dynamic_group_attention`; `plan.focal_mask` is bool [B, N, L].

  Raises:
    ValueError: names the argument that does not fit and what it must be. Under jit, segment_ids
      need config.max_documents (see `DGAConfig`).
  """
  validation.query_and_key(query, key)
  B, L = query.shape[:2]
  lengths, segment_ids = validation.rows(B, L, lengths, segment_ids)
  return make_plan(query, key, prepare(find_documents(B, L, lengths, segment_ids), config))


def explain(
  query: Float[ArrayOrShape, "B L H D"],
  key: Float[ArrayOrShape, "B L N D"],
  value: Float[ArrayOrShape, "B L N D"],
  *,
  config: DGAConfig,
  lengths: Lengths | None = None,
  segment_ids: SegmentIds | None = None,
  implementation: Implementation = None,
) -> Explanation:
  """Which implementation runs each op of a call, and why not the others. Computes nothing.

      print(dga_jax.explain(query, key, value, config=config))

  The ops are those of `dynamic_group_attention` with these arguments, and those of a decoding step
  over the cache of such prompts.

  Args:
    query: of the call, or its `jax.ShapeDtypeStruct`.
    key: likewise.
    value: likewise.
    config: as for `dynamic_group_attention`.
    lengths: likewise.
    segment_ids: likewise.
    implementation: likewise.

  Raises:
    ValueError: as for `dynamic_group_attention`.
    NotImplementedError: likewise.
  """
  (B, L, _, D), N, dtype = query.shape, key.shape[2], key.dtype

  def decode(query: Array, key: Array, value: Array) -> Any:
    cache = jax.tree.map(lambda x: x[None], empty_cache(config, B, L + 1, N, D, dtype))
    return decode_step(query[:, 0], key[:, 0], value[:, 0], cache, 0, config)

  call = functools.partial(
    dynamic_group_attention,
    config=config,
    lengths=lengths,
    segment_ids=segment_ids,
    implementation=implementation,
  )
  target = dispatch.find_target(query, key, value)
  with dispatch.collect_reports(target) as reports:
    jax.eval_shape(call, query, key, value)
    jax.eval_shape(decode, query, key, value)
  return Explanation.from_reports(str(target), reports)
