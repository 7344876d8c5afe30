"""One program for all choices of focal tokens and all weights of merging that are compared."""

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
from dga_jax.attention.metadata import prepare
from dga_jax.attention.segments import find_documents
from dga_jax.attention.selection import comparable_scores
from dga_jax.calibration.selector_fit import attend_and_rate, beyond_window, FitBlocks
from dga_jax.config import DGAConfig
from dga_jax.model import Decoder
from dga_jax.model.rope import RopeTable

# The argument `choice` of the program is an index into CHOICES, `merge` one into MERGES.
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
  choice: Int[Array, ""],
  merge: Int[Array, ""],
  *,
  config: DGAConfig,
  seed: int,
) -> Float[Array, ""]:
  """Mean loss in nats of the second half of a row, with the same attention in all layers.

  The program has one attention call, which takes the scores of the choice as its argument.

  Args:
    graphdef: of the model, whose layers are stacked.
    params: of the model.
    row_T: L tokens and the token that follows them.
    form: scores the tokens for the choice "form"; of all layers.
    choice: index into CHOICES. "dense" is dense attention, the others are DGA.
    merge: index into MERGES. "query" is the op's rule. The others merge the members of a group by
      the softmax of the choice's scores, by their mean, or by the oracle's attention.
    config: of the blocks, with the selector "fitted".
    seed: of the random choice.
  """
  model: Decoder = nnx.merge(graphdef, params)
  L = row_T.shape[0] - 1
  with_dense = [i for i, name in enumerate(CHOICES) if name.startswith(("dense", "oracle"))]
  needs_dense = (choice == jnp.array(with_dense)).any() | (merge == MERGES.index("oracle"))

  def attend(
    q: Array, k: Array, v: Array, normed: Array, layer: Array, form: Form, rope: RopeTable
  ) -> tuple[Array, None]:
    blocks = FitBlocks.of_row(L, config)
    dense, rated = jax.lax.cond(
      needs_dense,
      lambda: attend_and_rate(q, k, v, beyond_window(L, blocks)),
      lambda: (jnp.zeros_like(q), jnp.zeros(k.shape[:3])),
    )

    def of_form() -> Array:
      own_NxLxS = jnp.moveaxis(own_features(k, v, rope)[0], 1, 0)
      shared_LxU = shared_features(normed, config)[0]
      scores_NxL = score(form, own_NxLxS[:, None], shared_LxU[None])[:, 0]
      return comparable_scores(scores_NxL.T[None])

    frequencies = model.config.rope_frequencies()
    key = jax.random.fold_in(jax.random.key(seed), layer)
    scores = [
      lambda: last_query(q, k, config),
      lambda: jax.random.uniform(key, k.shape[:3]),
      lambda: accumulated(q, k, config),
      lambda: expected_attention(q, k, v, config, frequencies),
      lambda: rated,
      lambda: rated + value_size(v, config),
      lambda: rated + value_distance(v, config),
      of_form,
    ]

    def with_scores() -> Array:
      return _attend_by(q, k, v, jax.lax.switch(choice - 1, scores), rated, merge, config)

    return jax.lax.cond(choice == 0, lambda: dense, with_scores), None

  states, _ = scan_layers(model, embed(model, row_T[None, :-1]), attend, form)
  return mean_loss(model, states, row_T)


def mean_loss(model: Decoder, states_1xLxE: Array, row_T: Array) -> Float[Array, ""]:
  """Mean cross entropy of the targets in the second half."""
  L = states_1xLxE.shape[1]
  logits = model.unembed(states_1xLxE[:, L // 2 :]).astype(jnp.float32)
  logs = jax.nn.log_softmax(logits, axis=-1)
  return -jnp.take_along_axis(logs, row_T[None, L // 2 + 1 :, None], axis=-1).mean()


def _attend_by(
  q: Array, k: Array, v: Array, scores: Array, oracle: Array, merge: Array, config: DGAConfig
) -> Array:
  """The op with these scores, and with its groups replaced unless `merge` is 0."""
  metadata = prepare(find_documents(1, q.shape[1], None, None), config)
  merged = merge_tokens(q, k, v, metadata, focal_scores=ranks(scores, config))
  logits = jax.lax.switch(
    merge, [lambda: scores, lambda: scores, lambda: jnp.zeros_like(scores), lambda: oracle]
  )
  weights_gxsxN = member_weights(scores, logits, config)[0]

  def replaced(of_groups: Array, tokens: Array) -> Array:
    blocks = blocks_of(tokens.astype(jnp.float32), config)[0]
    means = jnp.einsum("gsn,gsnd->gnd", weights_gxsxN, blocks).astype(tokens.dtype)
    return jnp.where(merge == 0, of_groups, of_groups.at[0, : means.shape[0]].set(means))

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
