"""How important each key is, and which tokens stay focal. No gradient flows through here."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dga_jax.attention.documents import Documents, positions
from dga_jax.attention.layout import StreamingBlocks
from dga_jax.config import DGAConfig
from pallas_kernels.grouped_attention.reference import masked_softmax


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
  B, L, H, D = query_BxLxHxD.shape
  N = key_BxLxNxD.shape[2]
  samples = min(L, config.n_recent + config.n_random)

  def of_document(scores_BxNxL: Array, document: Array) -> tuple[Array, None]:
    inside_BxL = documents.index == document
    sample_BxS, drawn_BxS = sample_queries(documents, inside_BxL, samples, config)
    q_BxSxHxD = jnp.take_along_axis(query_BxLxHxD, sample_BxS[..., None, None], axis=1)
    sees_BxSxL = (
      drawn_BxS[..., None]
      & inside_BxL[:, None]
      & (positions(inside_BxL)[None, None] <= sample_BxS[..., None])
    )

    def of_kv_head(heads: tuple[Array, Array]) -> Array:
      q_BxSxRxD, k_BxLxD = heads
      logits_BxRxSxL = jnp.einsum(
        "bsrd,bld->brsl", q_BxSxRxD, k_BxLxD, preferred_element_type=jnp.float32
      ) / jnp.sqrt(jnp.float32(D))
      paid_BxRxSxL = masked_softmax(logits_BxRxSxL, sees_BxSxL[:, None])
      return paid_BxRxSxL.sum(axis=(1, 2)) / jnp.maximum(1, sees_BxSxL.sum(axis=1))

    q_NxBxSxRxD = jnp.moveaxis(q_BxSxHxD.reshape(B, samples, N, H // N, D), 2, 0)
    paid_NxBxL = jax.lax.map(of_kv_head, (q_NxBxSxRxD, jnp.moveaxis(key_BxLxNxD, 2, 0)))
    return scores_BxNxL + jnp.moveaxis(paid_NxBxL, 0, 1), None

  scores_BxNxL = jnp.zeros((B, N, L), jnp.float32)
  each = jnp.arange(max_documents, dtype=jnp.int32)
  return jax.lax.scan(of_document, scores_BxNxL, each)[0]


def sample_queries(
  documents: Documents, inside_BxL: Bool[Array, "B L"], samples: int, config: DGAConfig
) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
  """Positions in the row of one document's sampled queries, and which of them exist.

  Recent queries first. The rest are those whose draw is highest; a position's draw depends on
  the seed and on its place in the document alone, so that padding and packing change nothing.
  """
  recent_BxL = documents.position >= documents.length - config.n_recent
  draw_BxL = uniform_by_position(jax.random.key(config.seed), documents.position)
  priority_BxL = jnp.where(inside_BxL, jnp.where(recent_BxL, 2.0, draw_BxL), -1.0)
  priority_BxS, sample_BxS = jax.lax.top_k(priority_BxL, samples)
  return sample_BxS, priority_BxS >= 0


def random_scores(documents: Documents, heads: int, seed: int) -> Float[Array, "B N L"]:
  """Scores of the paper's random baseline (Table 5): uniform, one draw per head and place."""
  keys = jax.random.split(jax.random.key(seed), heads)
  return jnp.stack([uniform_by_position(key, documents.position) for key in keys], axis=1)


def select_focal(
  scores_BxNxL: Float[Array, "B N L"], documents: Documents, config: DGAConfig
) -> Bool[Array, "B N L"]:
  """The quota's highest scores of each document, ties to the earlier position; sinks first."""
  B, N, L = scores_BxNxL.shape
  sink_BxL = documents.position < config.sink_tokens
  scores_BxNxL = jnp.where(sink_BxL[:, None], jnp.inf, scores_BxNxL)
  last = jnp.iinfo(jnp.int32).max
  document_BxL = jnp.where(documents.is_token, documents.index, last)
  document_BxNxL = jnp.broadcast_to(document_BxL[:, None], (B, N, L))
  i_BxNxL = jnp.broadcast_to(positions(document_BxL), (B, N, L))
  *_, by_rank_BxNxL = jax.lax.sort((document_BxNxL, -scores_BxNxL, i_BxNxL), num_keys=3)
  rank_BxNxL = jnp.put_along_axis(
    jnp.zeros_like(i_BxNxL), by_rank_BxNxL, i_BxNxL, axis=-1, inplace=False
  )
  tokens_before_BxL = jnp.cumsum(documents.is_token, axis=-1) - 1 - documents.position
  quota_BxL = jnp.asarray(config.focal_quota(L))[documents.length]
  in_quota_BxNxL = rank_BxNxL - tokens_before_BxL[:, None] < quota_BxL[:, None]
  return in_quota_BxNxL & documents.is_token[:, None]


def select_focal_in_blocks(
  query_BxLxHxD: Float[Array, "B L H D"],
  key_BxLxNxD: Float[Array, "B L N D"],
  documents: Documents,
  num_blocks: int,
  config: DGAConfig,
) -> Bool[Array, "B N L"]:
  """Sinks, and in every complete block the f tokens that its last query attends to most.

  The scores are that query's softmax(q Kᵀ / √D) over the block alone, summed over the query
  heads of a KV head; ties go to the earlier token.
  """
  B, L, N, D = key_BxLxNxD.shape
  blocks = StreamingBlocks.of(documents, config)
  size = config.block_size
  start_Bxk = blocks.starts(num_blocks)
  place_Bxkxs = start_Bxk[..., None] + jnp.arange(size)[None, None]
  key_BxkxsxNxD = _take(key_BxLxNxD, place_Bxkxs)
  query_BxkxNxRxD = _take(query_BxLxHxD, place_Bxkxs[..., -1]).reshape(B, num_blocks, N, -1, D)
  scores_BxNxkxs = block_scores(query_BxkxNxRxD, key_BxkxsxNxD)
  _, chosen_BxNxkxf = jax.lax.top_k(scores_BxNxkxs, config.focal_in_block)
  focal_BxNxkf = (start_Bxk[:, None, :, None] + chosen_BxNxkxf).reshape(B, N, -1)
  row_Bx1, head_1xN = jnp.arange(B)[:, None, None], jnp.arange(N)[None, :, None]
  mask_BxNxL = jnp.broadcast_to(blocks.sink[:, None], (B, N, L))
  return mask_BxNxL.at[row_Bx1, head_1xN, focal_BxNxkf].set(True, mode="drop")


def block_scores(
  query: Float[Array, "*B N R D"], key: Float[Array, "*B s N D"]
) -> Float[Array, "B N *k s"]:
  """What one query pays to each key of its block: softmax(q Kᵀ / √D), summed over R heads."""
  logits = jnp.einsum("...nrd,...snd->...nrs", query, key, preferred_element_type=jnp.float32)
  scores = jax.nn.softmax(logits / jnp.sqrt(jnp.float32(query.shape[-1])), axis=-1).sum(axis=-2)
  return jnp.moveaxis(scores, -2, 1)


def _take(x_BxLxNxD: Array, index: Array) -> Array:
  """Rows of each batch entry by position; zeros for L and beyond."""
  return jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=0))(x_BxLxNxD, index)


def uniform_by_position(key: Array, position_BxL: Int[Array, "B L"]) -> Float[Array, "B L"]:
  """A repeatable uniform number in [0, 1) for each place in a document."""

  def draw(place: Array) -> Array:
    return jax.random.uniform(jax.random.fold_in(key, place))

  return jax.vmap(draw)(positions(position_BxL))[position_BxL]
