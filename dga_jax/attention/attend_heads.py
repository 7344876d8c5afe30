"""The op for heads with settings of their own: each class of heads under its setting."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from dga_jax.attention.attend import zero_padding
from dga_jax.attention.dense import dense_attention
from dga_jax.attention.head_classes import HeadClasses, switch_rows
from dga_jax.attention.segments import Documents
from dga_jax.head_budgets import FULL, HeadBudgets, split_row
from dga_jax.sharding import head_part
from pallas_kernels.dispatch import Implementation


def attend_heads(
  query: Float[Array, "B L H D"],
  key: Float[Array, "B L N D"],
  value: Float[Array, "B L N D"],
  budgets: HeadBudgets,
  documents: Documents,
  attend: Callable[..., Array],
  *,
  focal_scores: Float[Array, "B L N"] | None = None,
  scale: Any = None,
  implementation: Implementation = None,
) -> Float[Array, "B L H D"]:
  """Attention of every head under the setting of its KV head.

  Inside a `jax.shard_map` over mesh axes that split heads, the device takes its own part of the
  assignment.

  Args:
    query: the device's heads.
    key: likewise.
    value: likewise.
    budgets: of one layer and all of its KV heads.
    documents: the rows.
    attend: Dynamic Group Attention: (config, query, key, value, focal_scores) to the output.
    focal_scores: likewise, if a setting has the selector "fitted".
    scale: of the attention logits, default 1/√D.
    implementation: "xla" and "reference" run the heads with the setting "full" in XLA too.
  """
  part, parts = head_part()
  in_xla = implementation in ("xla", ("xla",), "reference", ("reference",))

  def attend_class(setting: int, query: Array, key: Array, value: Array, *scores: Array) -> Array:
    config = budgets.settings[setting]
    if config != FULL:
      own = scores[0][..., 0] if scores and config.selector == "fitted" else None
      return attend(config, query, key, value, own)
    query, key, value = zero_padding(documents, query, key, value)
    return dense_attention(
      query,
      key,
      value,
      documents,
      scale=scale,
      implementation="xla" if in_xla else None,
    )

  return switch_rows(
    split_row(budgets.assignment[0], parts),
    part,
    lambda row, *heads: HeadClasses(row).map(attend_class, *heads),
    query,
    key,
    value,
    *(() if focal_scores is None else (focal_scores[..., None],)),
  )
