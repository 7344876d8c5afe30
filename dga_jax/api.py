"""The public op: checks of its arguments, then the steps of `dga_jax.attention.attend`."""

import jax
from jaxtyping import Array, Float

from dga_jax.attention import validation
from dga_jax.attention.attend import (
  attend,
  attend_with_plan,
  attention_kwargs,
  make_plan,
  merge_tokens,
  nan_where_invalid,
)
from dga_jax.attention.metadata import prepare
from dga_jax.attention.plan import GroupPlan
from dga_jax.attention.reference import number_documents, reference_attention
from dga_jax.attention.segments import find_documents
from dga_jax.attention.validation import Lengths, SegmentIds
from dga_jax.config import DGAConfig
from pallas_kernels import dispatch


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
  implementation: str | None = None,
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
    implementation: None for the one that `explain` says is taken, "reference" for the masks
      written out, or another name that `explain` lists.

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
  if implementation == "reference":
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
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  value: Float[Array, "B L N D"],
  *,
  config: DGAConfig,
  lengths: Lengths | None = None,
  segment_ids: SegmentIds | None = None,
) -> dict[str, str]:
  """Which implementation `dynamic_group_attention` takes by itself, and why not the others.

  Takes the op's arguments, or `jax.ShapeDtypeStruct`s of them, and computes nothing.

  Returns:
    For every implementation, in the order in which they are tried, "taken", "applies" or the
    reason why it does not.
  """
  reasons: dict[str, str | None] = {}
  target = dispatch.find_target(query)
  B, L = query.shape[:2]
  lengths, segment_ids = validation.rows(B, L, lengths, segment_ids)

  def trace(query: Array, key: Array, value: Array) -> Array:
    metadata = prepare(find_documents(B, L, lengths, segment_ids), config)
    merged = merge_tokens(query, key, value, metadata)
    options = attention_kwargs(query, config, scale=None)
    reasons.update(dispatch.report("grouped_attention", None, *merged, **options).reasons)
    return merged.query

  with dispatch.collect_reports(target):
    jax.eval_shape(trace, query, key, value)
  taken = next(name for name, reason in reasons.items() if reason is None)
  return {
    name: "taken" if name == taken else reason or "applies" for name, reason in reasons.items()
  }
