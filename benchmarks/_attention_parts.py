"""The parts of Dynamic Group Attention that the attention benchmarks time.

Every part takes query [1, L, H, D], key and value [1, L, N, D] of one document as one argument.
"""

from typing import Any

import jax
from jax import Array

from benchmarks._inputs import merge
from dga_jax import DGAConfig, dynamic_group_attention
from dga_jax.attention.attend import make_plan
from dga_jax.attention.metadata import prepare
from dga_jax.attention.segments import find_documents
from pallas_kernels.dispatch import Implementation


def whole_op(
  config: DGAConfig, implementation: Implementation, arrays: tuple[Array, Array, Array]
) -> Array:
  """The op: importance, selection, reordering, merging and attention."""
  return dynamic_group_attention(*arrays, config=config, implementation=implementation)


def summaries(config: DGAConfig, arrays: tuple[Array, Array, Array]) -> Any:
  """The steps before attention: importance, selection, reordering and merging."""
  sources = merge(config, *arrays).sources
  if config.selection != "streaming":
    return sources
  # The window's keys and values are the op's inputs, and a returned input would be copied.
  return sources.focal, sources.group, sources.window.start, sources.window.end


def choice(config: DGAConfig, arrays: tuple[Array, Array, Array]) -> Any:
  """Importance and selection: the order of the tokens, and the ranges that queries see.

  Streaming selection of one document has no such part: it chooses and merges in one kernel.
  """
  query, key, _ = arrays
  metadata = prepare(find_documents(query.shape[0], query.shape[1], None, None), config)
  plan = make_plan(query, key, metadata)
  return plan.layout, plan.visibility


def cudnn_dense(arrays: tuple[Array, Array, Array]) -> Array:
  """cuDNN's dense causal attention."""
  return jax.nn.dot_product_attention(*arrays, is_causal=True, implementation="cudnn")
