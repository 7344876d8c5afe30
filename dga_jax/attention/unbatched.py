"""Arrays without a batch axis for the public op, and arguments of other ops that it refuses."""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax.numpy as jnp
import numpy as np

_REFUSED = {
  "bias": "DGA adds no bias to its logits: groups and focal tokens have no L×L matrix",
  "mask": "pass lengths for right padding and segment_ids for other padding and packed documents;"
  " dga_jax.flax.attention_fn converts masks of padding",
  "is_causal": "DGAConfig(causal=...) says whether attention is causal",
  "logits_soft_cap": "DGA does not cap its logits",
  "local_window_size": "DGAConfig(local_window=...) sets the window of raw blocks",
  "query_seq_lengths": "pass lengths; queries and keys have the same tokens",
  "key_value_seq_lengths": "pass lengths; queries and keys have the same tokens",
}


def accepts_unbatched[Op: Callable[..., Any]](op: Op) -> Op:
  """The op, which also takes arrays [L, H, D] and names the arguments that DGA does not have.

  Args:
    op: takes query, key and value [B, L, heads, D] and returns an array like the query.
  """

  @functools.wraps(op)
  def call(query: Any, key: Any, value: Any, **options: Any) -> Any:
    for name in options.keys() & _REFUSED.keys():
      raise ValueError(f"{name} is given, which {op.__name__} does not have: {_REFUSED[name]}.")
    if np.ndim(query) != 3:
      return op(query, key, value, **options)
    for name, x in (("key", key), ("value", value)):
      if np.ndim(x) != 3:
        raise ValueError(
          f"query has shape {np.shape(query)} and {name} has shape {np.shape(x)}; all arrays must"
          " have a batch axis, or none: [length, heads, head_dim]."
        )
    for name in ("lengths", "sharding"):
      if options.get(name) is not None:
        raise ValueError(
          f"{name} is given, and query has no batch axis: {name} describes the rows of a batch. Add"
          " a batch axis, or leave it out."
        )
    if options.get("focal_scores") is not None:
      options["focal_scores"] = jnp.asarray(options["focal_scores"])[None]
    if options.get("segment_ids") is not None:
      options["segment_ids"] = jnp.asarray(options["segment_ids"])[None]
    return op(query[None], key[None], value[None], **options)[0]

  return cast(Op, call)
