"""How important each key is, and which tokens stay focal. No gradient flows through here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dga_jax.attention.segments import Documents, find_documents, positions
from dga_jax.config import DGAConfig
from dga_jax.sharding import axis_index_and_size
from pallas_kernels.importance import sampled_importance
from pallas_kernels.segmented_top_k import segmented_top_k, Segments


def importance_scores(
  query_BxLxHxD: Float[Array, "B L H D"],
  key_BxLxNxD: Float[Array, "B L N D"],
  documents: Documents,
  max_documents: int,
  config: DGAConfig,
) -> Float[Array, "B N L"]:
  """Attention that sampled queries pay to each key (Eq. 16 and 17 of the paper).

  s_j = Σ_q̃ softmax(q̃ Kᵀ / √D)_j / #{q̃ that can see j}, over the `n_recent` last queries of
  the document and `n_random` earlier ones, summed over the query heads of a KV head. A key that
  no sampled query sees scores 0. Float32 whatever the input.
  """
  samples = min(query_BxLxHxD.shape[1], config.n_recent + config.n_random)
  start_BxC, _ = documents.extents(max_documents)

  def of_document(document: Array | int) -> Array:
    sample_BxS, drawn_BxS = sample_queries(documents, documents.index == document, samples, config)
    q_BxSxHxD = jnp.take_along_axis(query_BxLxHxD, sample_BxS[..., None, None], axis=1)
    start_Bx1 = jax.lax.dynamic_slice_in_dim(start_BxC, document, 1, axis=1)
    end_BxS = jnp.where(drawn_BxS, sample_BxS + 1, 0)
    start_BxS = jnp.broadcast_to(start_Bx1, end_BxS.shape)
    return sampled_importance(q_BxSxHxD, key_BxLxNxD, start_BxS, end_BxS)

  first_BxNxL = of_document(0)
  if max_documents == 1:
    return first_BxNxL
  return jax.lax.fori_loop(
    1,
    max_documents,
    lambda document, scores_BxNxL: scores_BxNxL + of_document(document),
    first_BxNxL,
  )


def sample_queries(
  documents: Documents, inside_BxL: Bool[Array, "B L"], samples: int, config: DGAConfig
) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
  """Positions in the row of one document's sampled queries, and which of them exist.

  Recent queries first. The rest are those whose draw is highest; a position's draw depends on
  the seed and on its place in the document alone, so that padding and packing change nothing.
  """
  B, L = inside_BxL.shape
  if documents.whole_rows:
    # The same positions whatever the data: no program has to draw and sort them again.
    with jax.ensure_compile_time_eval():
      sample_S = np.asarray(_sample_whole_row(L, samples, config))
    return jnp.broadcast_to(sample_S, (B, samples)), jnp.ones((B, samples), bool)
  return _sample(documents, inside_BxL, samples, config)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sample_whole_row(length: int, samples: int, config: DGAConfig) -> Int[Array, "S"]:
  documents = find_documents(1, length, None, None)
  return _sample(documents, documents.is_token, samples, config)[0][0]


def _sample(
  documents: Documents, inside_BxL: Array, samples: int, config: DGAConfig
) -> tuple[Array, Array]:
  recent_BxL = documents.position >= documents.length - config.n_recent
  draw_BxL = uniform_by_position(jax.random.key(config.seed), documents.position)
  priority_BxL = jnp.where(inside_BxL, jnp.where(recent_BxL, 2.0, draw_BxL), -1.0)
  priority_BxS, sample_BxS = jax.lax.top_k(priority_BxL, samples)
  return sample_BxS, priority_BxS >= 0


def random_scores(documents: Documents, heads: int, seed: int) -> Float[Array, "B N L"]:
  """Scores of the paper's random baseline (Table 5): uniform, one draw per head and place.

  Where a mesh splits the heads, these `heads` draw as they do among all of them.
  """
  part, parts = axis_index_and_size("tensor")
  keys = jax.random.split(jax.random.key(seed), heads * parts)
  return jnp.stack(
    [uniform_by_position(keys[part * heads + head], documents.position) for head in range(heads)],
    axis=1,
  )


def select_focal(
  scores_BxNxL: Float[Array, "B N L"],
  documents: Documents,
  max_documents: int,
  config: DGAConfig,
) -> Bool[Array, "B N L"]:
  """The quota's highest scores of each document, ties to the earlier position; sinks first."""
  L = scores_BxNxL.shape[-1]
  if config.sink_tokens:
    sink_BxL = documents.position < config.sink_tokens
    scores_BxNxL = jnp.where(sink_BxL[:, None], jnp.inf, scores_BxNxL)
  start_BxC, length_BxC = documents.extents(max_documents)
  quota_BxC = jnp.asarray(config.focal_quota(L))[length_BxC]
  return segmented_top_k(scores_BxNxL, Segments(start_BxC, length_BxC, quota_BxC))


def uniform_by_position(key: Array, position_BxL: Int[Array, "B L"]) -> Float[Array, "B L"]:
  """A repeatable uniform number in [0, 1) for each place in a document."""

  def draw(place: Array) -> Array:
    return jax.random.uniform(jax.random.fold_in(key, place))

  return jax.vmap(draw)(positions(position_BxL))[position_BxL]
