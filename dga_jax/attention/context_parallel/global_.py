"""Global and random selection on a sequence split over devices."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dga_jax.attention.attend import merge_scale
from dga_jax.attention.context_parallel.scores import sharded_importance_scores
from dga_jax.attention.context_parallel.sharded_plan import ShardedPlan
from dga_jax.attention.context_parallel.zigzag import ZigzagShards
from dga_jax.attention.metadata import AttentionMetadata, RankingMetadata
from dga_jax.attention.plan import GroupPlan
from dga_jax.attention.scores import random_scores
from dga_jax.attention.selection import select_by_score
from pallas_kernels.dispatch import Implementation
from pallas_kernels.gather import take_rows
from pallas_kernels.group_merge import Entries, merge_groups
from pallas_kernels.grouped_attention import KVSources


def global_sources(
  query: Float[Array, "B P H D"],
  key: Float[Array, "B P N D"],
  value: Float[Array, "B P N D"],
  metadata: AttentionMetadata,
  shards: ZigzagShards,
  *,
  implementation: Implementation,
) -> KVSources:
  """The keys and values that this device's queries attend to, and the range that each query sees.

  Scores are gathered, so that every device makes the same plan. The device that holds a focal token
  sends it to all devices, and the device that holds the last member of a group sends the group.
  The members of a group before the chunk of its last member, fewer than m, are fetched first.

  Args:
    query: the tokens of this device.
    key: the tokens of this device.
    value: the tokens of this device.
    metadata: of the whole sequence.
    shards: the tokens that each device holds.
    implementation: of the merge.
  """
  config, documents, ranking = metadata.config, metadata.documents, metadata.by_selection
  assert isinstance(ranking, RankingMetadata)
  if ranking.samples is not None:
    scores_BxNxL = sharded_importance_scores(query, key, ranking.samples, shards)
  else:
    scores_BxNxL = random_scores(documents, key.shape[2], config.seed)
  selection = select_by_score(scores_BxNxL, documents, ranking.quotas, config)
  plan = ShardedPlan.from_plan(GroupPlan.from_selection(selection, metadata), shards)

  # One exchange carries keys and values, joined along the last axis.
  kv = jnp.concatenate([key, value], axis=-1)
  kv = jnp.concatenate([plan.fetch_halo(kv), kv], axis=1)
  key, value = jnp.split(kv, 2, axis=-1)
  _, merged = merge_groups(
    jnp.pad(query, ((0, 0), (2 * plan.halo, 0), (0, 0), (0, 0))),
    key,
    value,
    *plan.local_layout(),
    scale=merge_scale(config, query.shape[-1]),
    reorder_window=False,
    implementation=implementation,
  )
  focal, group = plan.all_gather(
    jnp.concatenate([merged.focal_key, merged.focal_value], axis=-1),
    jnp.concatenate([merged.group_key, merged.group_value], axis=-1),
  )
  window = take_rows(kv, plan.window_index())
  entries = [half for x in (focal, group, window) for half in jnp.split(x, 2, axis=-1)]
  return plan.local_visibility().sources(Entries(*entries))
