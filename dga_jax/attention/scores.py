"""Scores that rank keys for selection: attention of sampled queries, or random numbers.

No gradient flows through scores.
"""

import concurrent.futures
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dga_jax.attention.segments import Documents, find_documents
from dga_jax.config import DGAConfig
from dga_jax.sharding import head_part
from pallas_kernels.importance import sampled_importance


class SampledQueries(NamedTuple):
  """The queries of each document that rank its keys, C documents of S queries.

  A query sees the keys at positions [start, end): of its document those up to itself, or all of
  them in bidirectional attention. It does not exist, and sees nothing, where end is 0.
  """

  position: Int[Array, "B C S"]
  start: Int[Array, "B C S"]
  end: Int[Array, "B C S"]

  def of_document(self, document: Array | int) -> "SampledQueries":
    """The queries of one document, [B, S]."""
    return SampledQueries(
      *(jax.lax.dynamic_index_in_dim(x, document, axis=1, keepdims=False) for x in self)
    )


def sample_queries(documents: Documents, max_documents: int, config: DGAConfig) -> SampledQueries:
  """The `n_recent` last queries of each document and `n_random` earlier ones.

  A position's random draw depends on the seed and on the position in the document alone, so that
  padding and packing change nothing.

  Args:
    documents: of the rows.
    max_documents: C, static.
    config: n_recent, n_random and seed.
  """
  B, L = documents.index.shape
  samples = min(L, config.n_recent + config.n_random)
  if documents.rows == "whole":
    # Independent of the data: computed while tracing, so that the program neither draws nor sorts.
    position_BxCxS = jnp.broadcast_to(_sample_whole_row(L, samples, config), (B, 1, samples))
    exists_BxCxS = jnp.ones((B, 1, samples), bool)
  else:
    # One document at a time: all at once would take C rows of L priorities.
    position_CxBxS, exists_CxBxS = jax.lax.map(
      lambda document: _sample(documents, document, samples, config),
      jnp.arange(max_documents, dtype=jnp.int32),
    )
    position_BxCxS = jnp.moveaxis(position_CxBxS, 0, 1)
    exists_BxCxS = jnp.moveaxis(exists_CxBxS, 0, 1)
  start_BxC, length_BxC = documents.extents(max_documents)
  end_BxCxS = position_BxCxS + 1 if config.causal else (start_BxC + length_BxC)[..., None]
  return SampledQueries(
    position=position_BxCxS,
    start=jnp.broadcast_to(start_BxC[..., None], position_BxCxS.shape),
    end=jnp.where(exists_BxCxS, end_BxCxS, 0),
  )


@functools.lru_cache(maxsize=256)
def _sample_whole_row(length: int, samples: int, config: DGAConfig) -> np.ndarray:
  """int32 [S], computed in a thread of its own, which has no trace and no mesh of the caller."""

  @jax.jit
  def draw() -> Array:
    return _sample(find_documents(1, length, None, None), 0, samples, config)[0][0]

  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    return pool.submit(lambda: np.asarray(draw())).result()


def _sample(
  documents: Documents, document: Array | int, samples: int, config: DGAConfig
) -> tuple[Array, Array]:
  """[B, S] positions of one document's sampled queries, recent ones first, and their existence."""
  recent_BxL = documents.position >= documents.length - config.n_recent
  draw_BxL = uniform_by_position(jax.random.key(config.seed), documents.position)
  priority_BxL = jnp.where(recent_BxL, 2.0, draw_BxL)
  priority_BxL = jnp.where(documents.index == document, priority_BxL, -1.0)
  priority_BxS, position_BxS = jax.lax.top_k(priority_BxL, samples)
  return position_BxS, priority_BxS >= 0


def importance_scores(
  query_BxLxHxD: Float[Array, "B L H D"],
  key_BxLxNxD: Float[Array, "B L N D"],
  samples: SampledQueries,
) -> Float[Array, "B N L"]:
  """Attention that sampled queries pay to each key (Eq. 16 and 17 of the paper).

  s_j = Σ_q̃ softmax(q̃ Kᵀ / √D)_j / #{q̃ that can see j}, summed over the query heads of a KV head.
  A key that no sampled query sees scores 0.

  Args:
    query_BxLxHxD: any float dtype.
    key_BxLxNxD: same dtype.
    samples: the sampled queries q̃.

  Returns:
    float32, whatever the input dtype.
  """

  def of_document(samples_BxS: SampledQueries) -> Array:
    index_BxSx1x1 = samples_BxS.position[..., None, None]
    q_BxSxHxD = jnp.take_along_axis(query_BxLxHxD, index_BxSx1x1, axis=1)
    return sampled_importance(q_BxSxHxD, key_BxLxNxD, samples_BxS.start, samples_BxS.end)

  first_BxNxL = of_document(samples.of_document(0))
  max_documents = samples.position.shape[1]
  if max_documents == 1:
    return first_BxNxL
  return jax.lax.fori_loop(
    1,
    max_documents,
    lambda document, scores_BxNxL: scores_BxNxL + of_document(samples.of_document(document)),
    first_BxNxL,
  )


def random_scores(documents: Documents, heads: int, seed: int) -> Float[Array, "B N L"]:
  """Scores of the paper's random baseline (Table 5): uniform by KV head and position.

  Where a mesh splits the heads, each device's `heads` heads get the scores that they have among
  all heads.
  """
  part, parts = head_part()
  keys = jax.random.split(jax.random.key(seed), heads * parts)
  return jnp.stack(
    [uniform_by_position(keys[part * heads + head], documents.position) for head in range(heads)],
    axis=1,
  )


def uniform_by_position(key: Array, position_BxL: Int[Array, "B L"]) -> Float[Array, "B L"]:
  """A repeatable uniform number in [0, 1) for each position in a document."""

  def draw(position: Array) -> Array:
    return jax.random.uniform(jax.random.fold_in(key, position))

  i_L = jnp.arange(position_BxL.shape[1], dtype=jnp.int32)
  return jax.vmap(draw)(i_L)[position_BxL]
