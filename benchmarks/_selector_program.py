"""The loss of a row under a choice of focal tokens and a rule of merging."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from benchmarks._forward import embed
from benchmarks._selector_choices import (
  accumulated,
  blocks_of,
  expected_attention,
  last_query,
  ranks,
  value_distance,
  value_size,
)
from benchmarks._selector_forms import Form, own_features, scan_layers, score, shared_features
from dga_jax.attention.attend import attend_prepared, merge_tokens
from dga_jax.attention.dense import dense_attention
from dga_jax.attention.metadata import prepare
from dga_jax.attention.segments import find_documents
from dga_jax.attention.selection import comparable_scores
from dga_jax.calibration.selector_fit import attend_and_rate, beyond_window, FitBlocks
from dga_jax.config import DGAConfig
from dga_jax.model import Decoder
from dga_jax.model.rope import RopeTable

CHOICES = (
  "dense",
  "last_query",
  "random",
  "accumulated",
  "expected",
  "oracle",
  "oracle_value",
  "oracle_distance",
  "form",
)
MERGES = ("query", "scores", "mean", "oracle")


def second_half_loss(
  graphdef: nnx.GraphDef,
  params: Any,
  row_T: Int[Array, "T"],
  form: Form,
  *,
  choice: str,
  merge: str,
  config: DGAConfig,
  seed: int,
) -> Float[Array, ""]:
  """Mean loss in nats of the second half of a row, with the same attention in all layers.

  Each choice is a program of its own. A program that branches on the choice waits for the host at
  every branch of every layer, which takes most of the time on a GPU that other processes use.

  Args:
    graphdef: of the model, whose layers are stacked.
    params: of the model.
    row_T: L tokens and the token that follows them.
    form: scores the tokens for the choice "form"; of all layers.
    choice: one of CHOICES. "dense" is dense attention, the others are DGA.
    merge: one of MERGES. "query" is the op's rule. The others merge the members of a group by the
      softmax of the choice's scores, by their mean, or by the oracle's attention.
    config: of the blocks, with the selector "fitted".
    seed: of the random choice.
  """
  model: Decoder = nnx.merge(graphdef, params)
  L = row_T.shape[0] - 1
  documents = find_documents(1, L, None, None)

  def attend(
    q: Array, k: Array, v: Array, normed: Array, layer: Array, form: Form, rope: RopeTable
  ) -> tuple[Array, None]:
    def rated() -> Array:
      return attend_and_rate(q, k, v, beyond_window(L, FitBlocks.of_row(L, config)))[1]

    def of_form() -> Array:
      own_NxLxS = jnp.moveaxis(own_features(k, v, rope)[0], 1, 0)
      shared_LxU = shared_features(normed, config)[0]
      scores_NxL = score(form, own_NxLxS[:, None], shared_LxU[None])[:, 0]
      return comparable_scores(scores_NxL.T[None])

    if choice == "dense":
      return dense_attention(q, k, v, documents), None
    frequencies = model.config.rope_frequencies()
    key = jax.random.fold_in(jax.random.key(seed), layer)
    scores = {
      "last_query": lambda: last_query(q, k, config),
      "random": lambda: jax.random.uniform(key, k.shape[:3]),
      "accumulated": lambda: accumulated(q, k, config),
      "expected": lambda: expected_attention(q, k, v, config, frequencies),
      "oracle": rated,
      "oracle_value": lambda: rated() + value_size(v, config),
      "oracle_distance": lambda: rated() + value_distance(v, config),
      "form": of_form,
    }[choice]()
    logits = {
      "query": lambda: None,
      "scores": lambda: scores,
      "mean": lambda: jnp.zeros_like(scores),
      "oracle": rated,
    }[merge]()
    return _attend_by(q, k, v, scores, logits, config), None

  states, _ = scan_layers(model, embed(model, row_T[None, :-1]), attend, form)
  return mean_loss(model, states, row_T)


def mean_loss(model: Decoder, states_1xLxE: Array, row_T: Array) -> Float[Array, ""]:
  """Mean cross entropy of the targets in the second half."""
  L = states_1xLxE.shape[1]
  logits = model.unembed(states_1xLxE[:, L // 2 :]).astype(jnp.float32)
  logs = jax.nn.log_softmax(logits, axis=-1)
  return -jnp.take_along_axis(logs, row_T[None, L // 2 + 1 :, None], axis=-1).mean()


def _attend_by(
  q: Array, k: Array, v: Array, scores: Array, logits: Array | None, config: DGAConfig
) -> Array:
  """The op with these scores. Members are merged by the softmax of `logits`, if there are any."""
  metadata = prepare(find_documents(1, q.shape[1], None, None), config)
  merged = merge_tokens(q, k, v, metadata, focal_scores=ranks(scores, config))
  if logits is None:
    return attend_prepared(merged, metadata)
  weights_gxsxN = member_weights(scores, logits, config)[0]

  def replaced(of_groups: Array, tokens: Array) -> Array:
    blocks = blocks_of(tokens.astype(jnp.float32), config)[0]
    means = jnp.einsum("gsn,gsnd->gnd", weights_gxsxN, blocks).astype(tokens.dtype)
    return of_groups.at[0, : means.shape[0]].set(means)

  groups = merged.sources.group
  groups = groups._replace(key=replaced(groups.key, k), value=replaced(groups.value, v))
  sources = merged.sources._replace(group=groups)
  return attend_prepared(merged._replace(sources=sources), metadata)


def member_weights(
  scores_BxLxN: Float[Array, "B L N"], logits_BxLxN: Float[Array, "B L N"], config: DGAConfig
) -> Float[Array, "B g s N"]:
  """Softmax of the logits over the members of each block; 0 for its focal tokens.

  Args:
    scores_BxLxN: choose the focal tokens.
    logits_BxLxN: of the weights; −∞ counts as the least float32.
  """
  lowest = jnp.finfo(jnp.float32).min
  scores, logits = (
    blocks_of(x[..., None], config)[..., 0]
    for x in (scores_BxLxN, jnp.maximum(logits_BxLxN, lowest))
  )
  _, chosen_BxgxNxf = jax.lax.top_k(scores.swapaxes(2, 3), config.focal_in_block)
  is_focal = jax.nn.one_hot(chosen_BxgxNxf, config.block_size, dtype=bool).any(axis=3)
  return jax.nn.softmax(jnp.where(is_focal.swapaxes(2, 3), -jnp.inf, logits), axis=2)
