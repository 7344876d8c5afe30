"""Groups of every layer and KV head of a model over one sound."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dga_jax.api import plan_groups
from dga_jax.attention.plan import GroupPlan
from dga_jax.attention.segments import find_documents
from dga_jax.config import DGAConfig
from dga_jax.model import Decoder
from dga_jax.model.rope import rope_table

FOCAL = -1
RAW = -2


def groups_by_layer(
  model: Decoder, tokens_T: Int[np.ndarray, "T"], config: DGAConfig
) -> Int[np.ndarray, "Y N T"]:
  """The group of each token under `config`, for every layer and KV head.

  Each layer attends with the model's own attention kind. Its queries and keys then choose the focal
  tokens and the groups of `config`.

  Args:
    model: with stacked layers.
    tokens_T: token ids of one document.
    config: with the selector "last_query".

  Returns:
    int32: the number of the token's group, `FOCAL`, or `RAW` for a member of an incomplete group.
  """
  graphdef, params = nnx.split(model)
  x_1xTxE = model.embedding[jnp.asarray(tokens_T)[None]].astype(model.config.dtype)
  groups = []
  for layer in range(model.config.num_layers):
    x_1xTxE, plan = _run_layer(graphdef, config, params, x_1xTxE, jnp.int32(layer))
    groups.append(_group_numbers(plan))
  return np.stack(groups)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_layer(
  graphdef: nnx.GraphDef, config: DGAConfig, params: Any, x_1xTxE: Array, layer: Array
) -> tuple[Float[Array, "1 T E"], GroupPlan]:
  model = nnx.merge(graphdef, params)
  structure, stacked = nnx.split(model.layers)
  one = nnx.merge(structure, jax.tree.map(lambda array: array[layer], stacked))
  T = x_1xTxE.shape[1]
  rope = rope_table(jnp.arange(T)[None], model.config.rope_frequencies())
  kind = model.config.make_attention()

  def attend(q: Array, k: Array, v: Array, scores: Array | None = None) -> tuple[Array, GroupPlan]:
    metadata = kind.prepare(find_documents(1, T, None, None))
    out_1xTxHxD = kind.attend(q, k, v, metadata, **kind.focal_options(scores))
    return out_1xTxHxD, plan_groups(q, k, config=config)

  out_1xTxE, plan = one(x_1xTxE, rope, attend)
  return out_1xTxE, plan


def _group_numbers(plan: GroupPlan) -> Int[np.ndarray, "N T"]:
  """The numbers of `groups_by_layer` for one layer, of the first row."""
  focal_NxT = np.asarray(plan.focal_mask)[0]
  numbers_NxT = np.where(focal_NxT, FOCAL, RAW).astype(np.int32)
  T = focal_NxT.shape[1]
  members_NxKxM = np.asarray(plan.layout.member_index)[0]
  is_complete_NxK = (members_NxKxM < T).all(axis=2)
  for numbers_T, members_KxM, complete_K in zip(
    numbers_NxT, members_NxKxM, is_complete_NxK, strict=True
  ):
    kept = np.flatnonzero(complete_K)
    numbers_T[members_KxM[kept]] = kept[:, None]
  return numbers_NxT
