"""Choices of focal tokens that `benchmarks.selector` compares, as scores of tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from dga_jax.config import DGAConfig
from dga_jax.model.rope import apply_rope, rope_table

_FUTURE_POSITIONS = 512  # Of expected attention, as in its paper.


def accumulated(
  q_BxLxHxD: Float[Array, "B L H D"], k_BxLxNxD: Float[Array, "B L N D"], config: DGAConfig
) -> Float[Array, "B L N"]:
  """Attention of each query to the tokens of its block up to itself, summed over the queries.

  The sums are float32. Tokens outside of complete blocks get 0.
  """
  weights = _block_attention(q_BxLxHxD, k_BxLxNxD, config)
  return _tokens(weights.sum(axis=(3, 4)).swapaxes(2, 3), q_BxLxHxD.shape[1], config)


def last_query(
  q_BxLxHxD: Float[Array, "B L H D"], k_BxLxNxD: Float[Array, "B L N D"], config: DGAConfig
) -> Float[Array, "B L N"]:
  """Attention of the last query of each block to the tokens of its block, as `accumulated`.

  These are the scores of the selector "last_query".
  """
  weights = _block_attention(q_BxLxHxD, k_BxLxNxD, config)
  return _tokens(weights[..., -1, :].sum(axis=3).swapaxes(2, 3), q_BxLxHxD.shape[1], config)


def _block_attention(
  q_BxLxHxD: Array, k_BxLxNxD: Array, config: DGAConfig
) -> Float[Array, "B g N R s s"]:
  """Causal attention within each complete block, float32."""
  H, N, D = q_BxLxHxD.shape[2], *k_BxLxNxD.shape[2:]
  q, k = (blocks_of(x, config) for x in (q_BxLxHxD, k_BxLxNxD))
  q = q.reshape(*q.shape[:3], N, H // N, D)
  products = jnp.einsum("bgcnrd,bgjnd->bgnrcj", q, k, preferred_element_type=jnp.float32)
  causal = jnp.tri(config.block_size, dtype=bool)[None, None, None, None]
  return jax.nn.softmax(jnp.where(causal, products * D**-0.5, -jnp.inf), axis=-1)


def expected_attention(
  q_BxLxHxD: Float[Array, "B L H D"],
  k_BxLxNxD: Float[Array, "B L N D"],
  v_BxLxNxD: Float[Array, "B L N D"],
  config: DGAConfig,
  frequencies: Float[np.ndarray, "F"],
) -> Float[Array, "B L N"]:
  """Expected attention (Devoto et al., arXiv 2510.00636) as a causal rule of a block.

  The queries before RoPE of all tokens from the first block to a block's end have the mean μ and
  the covariance Σ. R̄ is the mean RoPE rotation of the 512 positions from the first query that sees
  the block by its compact entries alone. The score of key k and value v is

      Σ_h softmax_block(k·R̄μ_h/√D + kᵀR̄Σ_hR̄ᵀk/(2D)) · ‖v‖,

  with the sum over the query heads of a KV head. The paper ranks all tokens of a prompt, with the
  statistics of the whole prompt; here the softmax is over the tokens of the block.

  Args:
    q_BxLxHxD: after RoPE at the positions 0 to L − 1.
    k_BxLxNxD: likewise.
    v_BxLxNxD: values.
    config: of the blocks.
    frequencies: ω of the model's RoPE.

  Returns:
    float32; 0 for tokens outside of complete blocks.
  """
  (_, L, H, D), N, s = q_BxLxHxD.shape, k_BxLxNxD.shape[2], config.block_size
  back = rope_table(-jnp.arange(L)[None], frequencies)
  q = blocks_of(apply_rope(q_BxLxHxD.astype(jnp.float32), back), config)
  k, v = (blocks_of(x.astype(jnp.float32), config) for x in (k_BxLxNxD, v_BxLxNxD))
  k_BxgxsxHxD = jnp.repeat(_mean_rotation_back(k, config, frequencies), H // N, axis=3)
  count_g = s * jnp.arange(1, q.shape[1] + 1)
  mean = q.sum(axis=2).cumsum(axis=1) / count_g[None, :, None, None]
  # A GPU multiplies float32 matrices in fewer bits by default.
  einsum = functools.partial(jnp.einsum, precision="highest")
  second = einsum("bgshd,bgshe->bghde", q, q).cumsum(axis=1)
  second = second / count_g[None, :, None, None, None]
  covariance = second - mean[..., :, None] * mean[..., None, :]
  linear = einsum("bgshd,bghd->bgsh", k_BxgxsxHxD, mean) * D**-0.5
  quadratic = einsum("bgshd,bghde,bgshe->bgsh", k_BxgxsxHxD, covariance, k_BxgxsxHxD) / (2 * D)
  expected = jax.nn.softmax(linear + quadratic, axis=2).reshape(*k.shape[:3], N, H // N)
  scores_BxgxsxN = expected.sum(axis=-1) * jnp.linalg.norm(v, axis=-1)
  return _tokens(scores_BxgxsxN, L, config)


def _mean_rotation_back(
  k_BxgxsxNxD: Array, config: DGAConfig, frequencies: np.ndarray
) -> Float[Array, "B g s N D"]:
  """R̄ᵀk for the keys of each block."""
  g, s = k_BxgxsxNxD.shape[1:3]
  first_g = config.sink_tokens + (jnp.arange(g) + 1 + config.local_window) * s
  table = rope_table(first_g[:, None] + jnp.arange(_FUTURE_POSITIONS)[None], frequencies)
  cos, sin = (x.mean(axis=1)[None, :, None, None] for x in table)
  k1, k2 = jnp.split(k_BxgxsxNxD, 2, axis=-1)
  return jnp.concatenate([k1 * cos + k2 * sin, k2 * cos - k1 * sin], axis=-1)


def value_size(v_BxLxNxD: Float[Array, "B L N D"], config: DGAConfig) -> Float[Array, "B L N"]:
  """log ‖v‖ of the tokens of complete blocks, float32; 0 elsewhere."""
  blocks = blocks_of(v_BxLxNxD.astype(jnp.float32), config)
  return _tokens(jnp.log(jnp.linalg.norm(blocks, axis=-1)), v_BxLxNxD.shape[1], config)


def value_distance(v_BxLxNxD: Float[Array, "B L N D"], config: DGAConfig) -> Float[Array, "B L N"]:
  """log ‖v − v̄‖ likewise, with the mean v̄ of the block's values."""
  blocks = blocks_of(v_BxLxNxD.astype(jnp.float32), config)
  distance = jnp.linalg.norm(blocks - blocks.mean(axis=2, keepdims=True), axis=-1)
  return _tokens(jnp.log(distance), v_BxLxNxD.shape[1], config)


def ranks(scores_BxLxN: Float[Array, "B L N"], config: DGAConfig) -> Float[Array, "B L N"]:
  """The number of tokens of a token's block with a lower score; of equals the earlier is higher.

  The op rounds focal scores to 8 significant bits, which keep all ranks up to 256.
  """
  assert config.block_size <= 256
  descending = jnp.argsort(-blocks_of(scores_BxLxN[..., None], config)[..., 0], axis=2, stable=True)
  rank_BxgxsxN = config.block_size - 1 - jnp.argsort(descending, axis=2)
  return _tokens(rank_BxgxsxN.astype(jnp.float32), scores_BxLxN.shape[1], config)


def blocks_of(x_BxLxNxD: Float[Array, "B L N D"], config: DGAConfig) -> Float[Array, "B g s N D"]:
  """The tokens of complete blocks."""
  B, L, s = *x_BxLxNxD.shape[:2], config.block_size
  g = (L - config.sink_tokens) // s
  inside = x_BxLxNxD[:, config.sink_tokens : config.sink_tokens + g * s]
  return inside.reshape(B, g, s, *x_BxLxNxD.shape[2:])


def _tokens(scores_BxgxsxN: Array, length: int, config: DGAConfig) -> Float[Array, "B L N"]:
  """Scores of a row from those of its complete blocks, 0 elsewhere."""
  B, g, s, N = scores_BxgxsxN.shape
  after = length - config.sink_tokens - g * s
  scores_BxTxN = scores_BxgxsxN.reshape(B, g * s, N)
  return jnp.pad(scores_BxTxN, ((0, 0), (config.sink_tokens, after), (0, 0)))
