"""The fitted selector: a linear function of key and value scores the tokens of each KV head.

A block's f tokens with the highest scores stay focal (`DGAConfig.selector`). The score needs no
query, and the score of a token depends on earlier tokens alone. `dga fit_selector` fits the weights
(`dga_jax.calibration.selector_fit`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def selector_features(head_dim: int) -> int:
  """S = 2·D + 2, the weights of one KV head: of key, value and both norms.

  A constant would add the same number to all scores of a head, and the choice compares scores of
  one head only. So there is none.
  """
  return 2 * head_dim + 2


def features(
  key_BxLxNxD: Float[Array, "B L N D"], value_BxLxNxD: Float[Array, "B L N D"]
) -> Float[Array, "B L N S"]:
  """What the score is linear in, float32: key, value, ‖key‖ and ‖value‖.

  Args:
    key_BxLxNxD: before RoPE, any float dtype.
    value_BxLxNxD: likewise.
  """
  key, value = (x.astype(jnp.float32) for x in (key_BxLxNxD, value_BxLxNxD))
  return jnp.concatenate([key, value, _norm(key)[..., None], _norm(value)[..., None]], axis=-1)


def focal_scores(
  key_BxLxNxD: Float[Array, "B L N D"],
  value_BxLxNxD: Float[Array, "B L N D"],
  weights_NxS: Float[Array, "N S"],
) -> Float[Array, "B L N"]:
  """The focal scores w · features(key, value) of each token and KV head, float32.

  No gradient flows through the scores: they only choose.

  Args:
    key_BxLxNxD: before RoPE, any float dtype.
    value_BxLxNxD: likewise.
    weights_NxS: float32.
  """
  D = key_BxLxNxD.shape[-1]
  key, value = (x.astype(jnp.float32) for x in (key_BxLxNxD, value_BxLxNxD))
  w_1x1xNxS = weights_NxS[None, None]
  # Sums of products, not matrix products, which a GPU or a TPU computes in fewer bits.
  scores_BxLxN = (
    (key * w_1x1xNxS[..., :D]).sum(axis=-1)
    + (value * w_1x1xNxS[..., D : 2 * D]).sum(axis=-1)
    + _norm(key) * w_1x1xNxS[..., 2 * D]
    + _norm(value) * w_1x1xNxS[..., 2 * D + 1]
  )
  return jax.lax.stop_gradient(scores_BxLxN)


def _norm(x: Float[Array, "B L N D"]) -> Float[Array, "B L N"]:
  return jnp.sqrt(jnp.square(x).sum(axis=-1))
