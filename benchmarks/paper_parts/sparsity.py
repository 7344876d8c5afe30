"""ρ-sparsity of attention (Figure 2 of the paper, Table II of the authors' answers), and sinks.

A row of n attention weights α is ρ-sparse if its largest weight exceeds 1/(nρ). At most nρ of n
weights that sum to 1 can exceed this level. Summaries of the paper's Theorem 1 state the event
that no weight exceeds it. P_sparse(L, ρ) is the share of ρ-sparse rows with L keys.

A causal row with L keys is the same in every longer sequence. One forward pass therefore measures
all lengths. At each length L the rows of eight queries, at positions L to L + 7, are measured in
every layer and head.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from benchmarks._forward import chunked_causal_attention, embed, run_layers
from benchmarks.paper_parts.inputs import Inputs, rounded
from dga_jax.evaluation.jobs import Job
from dga_jax.model import Decoder

TASK = "sparsity"
LENGTHS = (*range(100, 1001, 100), 1500, 2000, 3000, 4000, 6000, 8000)
RHOS = (0.01, 0.02, 0.05, 0.1)
SINKS = 4  # First tokens that are measured apart.
WINDOW = 128  # Most recent tokens that are measured apart.
_QUERIES = 8  # Of each length.
_SEED = 0  # Of the random weights.


def make_jobs(
  inputs: Inputs, pieces: Sequence[tuple[int, int]] = ((2000, 2), (4000, 1), (8000, 1))
) -> Iterator[Job]:
  """One job for each corpus, for trained and random weights, and for each kind of piece.

  Args:
    inputs: the model and the texts.
    pieces: the largest length L to measure in a piece of text, and the number of pieces, each from
      the beginning of another document.
  """
  for longest, count in pieces:
    for weights in ("trained", "random"):
      for corpus in inputs.corpora:
        rows = inputs.rows(corpus, longest + _QUERIES - 1, 1)[:count]
        yield Job(
          fields={
            "task": TASK, "corpus": corpus, "weights": weights, "length": longest,
            "pieces": len(rows),
          },
          depends_on=[
            inputs.model.config.to_dict(), rows.sum(axis=1).tolist(),
            {"seed": _SEED, "queries": _QUERIES, "sinks": SINKS, "window": WINDOW},
          ],
          ticks=len(rows),
          run=functools.partial(_run, inputs, weights, rows, longest),
        )  # fmt: skip


def _run(
  inputs: Inputs, weights: str, rows: np.ndarray, longest: int, tick: Callable[[], Any]
) -> dict[str, Any]:
  model = inputs.model
  if weights == "random":
    model = nnx.jit(lambda: Decoder(model.config, rngs=nnx.Rngs(_SEED)))()
  graphdef, params = nnx.split(model)
  lengths = [length for length in LENGTHS if length <= longest]
  position_S = np.concatenate([length - 1 + np.arange(_QUERIES) for length in lengths])
  measured = []
  for row in rows:
    measured.append(
      jax.tree.map(np.asarray, _measure(graphdef, params, row[None, :-1], position_S))
    )
    tick()
  # Each array is [pieces, layers, queries, heads].
  stacked = {name: np.stack([one[name] for one in measured]) for name in measured[0]}
  keys_S = position_S + 1
  by_length = []
  for index, length in enumerate(lengths):
    at = slice(index * _QUERIES, (index + 1) * _QUERIES)
    own = {name: values[:, :, at] for name, values in stacked.items()}
    by_length.append(
      {
        "length": length,
        "rows": int(own["largest"].size),
        "p_sparse": {
          name: {str(rho): p_sparse(own[name], keys_S[at], rho) for rho in RHOS}
          for name in ("largest", "largest_unscaled", "largest_without_sinks")
        },
        "mass": {
          name: round(float(own[name].mean()), 5)
          for name in ("first", "sinks", "window", "top_1_percent", "top_10_percent")
        },
      }
    )
  heads = {name: rounded(own[name].mean(axis=(0, 2)), 4) for name in ("sinks", "window")}
  return {"by_length": by_length, "by_head": heads}


def p_sparse(largest: Float[np.ndarray, "P K S H"], keys_S: np.ndarray, rho: float) -> float:
  """The share of rows whose largest weight exceeds 1/(nρ), for n keys in the row."""
  return float((largest * (keys_S * rho)[None, None, :, None] > 1).mean())


@functools.partial(jax.jit, static_argnums=0)
def _measure(
  graphdef: nnx.GraphDef, params: Any, tokens_1xL: Array, position_S: Array
) -> dict[str, Array]:
  model = nnx.merge(graphdef, params)

  def attend(q: Array, k: Array, v: Array, _: None, layer: Any) -> tuple[Array, Any]:
    del layer
    statistics = row_statistics(q[0, position_S], k[0], position_S)
    return chunked_causal_attention(q, k, v), statistics

  return run_layers(model, embed(model, tokens_1xL), attend)[1]


def row_statistics(
  q_SxHxD: Float[Array, "S H D"], k_LxNxD: Float[Array, "L N D"], position_S: Int[Array, "S"]
) -> dict[str, Float[Array, "S H"]]:
  """Statistics of causal attention rows, float32.

  Args:
    q_SxHxD: the sampled queries.
    k_LxNxD: the keys.
    position_S: positions of the queries; query i sees the keys j ≤ i.

  Returns:
    "largest": the largest weight; "largest_unscaled": the same for logits without 1/√D;
    "largest_without_sinks": the largest weight when the row excludes the first `SINKS` keys;
    "first", "sinks", "window": the weight of the first key, of the first `SINKS`, and of the
    `WINDOW` most recent ones that are no sinks; "top_1_percent", "top_10_percent": the weight of
    the largest 1 and 10 % of the weights.
  """
  (S, H, D), (L, N) = q_SxHxD.shape, k_LxNxD.shape[:2]
  logits_SxHxL = jnp.einsum(
    "snrd,lnd->snrl", q_SxHxD.reshape(S, N, H // N, D), k_LxNxD,
    preferred_element_type=jnp.float32,
  ).reshape(S, H, L)  # fmt: skip
  j_L = jnp.arange(L)
  seen_Sx1xL = (j_L[None] <= position_S[:, None])[:, None]
  weight_SxHxL = jax.nn.softmax(jnp.where(seen_Sx1xL, D**-0.5 * logits_SxHxL, -jnp.inf))
  unscaled_SxHxL = jax.nn.softmax(jnp.where(seen_Sx1xL, logits_SxHxL, -jnp.inf))
  others_SxHxL = jnp.where(j_L[None, None] >= SINKS, weight_SxHxL, 0)
  without_SxHxL = jax.nn.softmax(
    jnp.where(seen_Sx1xL & (j_L >= SINKS)[None, None], D**-0.5 * logits_SxHxL, -jnp.inf)
  )
  recent_Sx1xL = (j_L[None] > position_S[:, None] - WINDOW)[:, None]
  running_SxHxL = jnp.cumsum(-jnp.sort(-weight_SxHxL, axis=-1), axis=-1)

  def mass_of_largest(share: float) -> Array:
    count_S = jnp.ceil(share * (position_S + 1)).astype(jnp.int32)
    return jnp.take_along_axis(running_SxHxL, count_S[:, None, None] - 1, axis=-1)[..., 0]

  return {
    "largest": weight_SxHxL.max(axis=-1),
    "largest_unscaled": unscaled_SxHxL.max(axis=-1),
    "largest_without_sinks": without_SxHxL.max(axis=-1),
    "first": weight_SxHxL[..., 0],
    "sinks": weight_SxHxL[..., :SINKS].sum(axis=-1),
    "window": jnp.where(recent_Sx1xL, others_SxHxL, 0).sum(axis=-1),
    "top_1_percent": mass_of_largest(0.01),
    "top_10_percent": mass_of_largest(0.1),
  }


def merge_lengths(results: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
  """Results of one corpus and kind of weights by length, averaged over rows.

  Longer pieces repeat the beginnings of shorter ones, so each length is taken from the shortest
  pieces that contain it.

  Returns:
    For each length the number of rows, "p_sparse" and "mass".
  """
  merged: dict[int, dict[str, Any]] = {}
  for length in LENGTHS:
    having = [r for r in results if any(one["length"] == length for one in r["by_length"])]
    if having:
      piece = min(r["length"] for r in having)
      found = [
        one
        for r in having
        for one in r["by_length"]
        if (r["length"], one["length"]) == (piece, length)
      ]
      rows = [one["rows"] for one in found]
      merged[length] = {
        "rows": sum(rows),
        "mass": _average([one["mass"] for one in found], rows),
        "p_sparse": {
          name: _average([one["p_sparse"][name] for one in found], rows)
          for name in found[0]["p_sparse"]
        },
      }
  return merged


def _average(values: Sequence[Mapping[str, float]], rows: Sequence[int]) -> dict[str, float]:
  return {
    name: float(np.average([one[name] for one in values], weights=rows)) for name in values[0]
  }
