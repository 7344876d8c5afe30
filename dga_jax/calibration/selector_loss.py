"""The loss of the selector's fit, ListNet's: cross entropy of a block's target and its scores."""

import functools

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

STEPS = 200  # Of Adam.
LEARNING_RATE = 1e-2  # Of the first step, for standardised features; it falls as a cosine to 0.
BATCH_TOKENS = 16384  # Tokens of a step.


@functools.partial(jax.jit, static_argnames="steps")
def minimise_cross_entropy(
  start_NxS: Float[Array, "N S"],
  features_NxgxsxS: Float[Array, "N g s S"],
  target_Nxgxs: Float[Array, "N g s"],
  *,
  steps: int = STEPS,
) -> Float[Array, "N S"]:
  """Weights w of each KV head that minimise the cross entropy of its blocks.

  With the target t and the scores z = w·x of the tokens of a block, the loss is the mean over the
  blocks of

      −Σ_j softmax(t)_j · log softmax(z)_j   (Cao et al., Learning to rank, ICML 2007).

  So a token counts as much as its part of the block's exp(t). The loss is convex in w. Adam takes
  steps of random blocks.

  Args:
    start_NxS: w of the first step.
    features_NxgxsxS: x of g blocks of s tokens.
    target_Nxgxs: t, finite.
    steps: of Adam.
  """
  g, s = target_Nxgxs.shape[1:]
  count = max(1, min(g, BATCH_TOKENS // s))
  mean_NxS = features_NxgxsxS.mean(axis=(1, 2))
  deviation_NxS = features_NxgxsxS.std(axis=(1, 2))
  size_NxS = jnp.sqrt(jnp.square(features_NxgxsxS).mean(axis=(1, 2)))
  # A feature that differs by rounding alone is constant: its weight is 0.
  varies_NxS = deviation_NxS > 1e-5 * size_NxS
  scale_NxS = jnp.where(varies_NxS, 1.0 / deviation_NxS, 0.0)
  optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))

  def loss(weights_NxS: Array, blocks: Array) -> Array:
    x = (features_NxgxsxS[:, blocks] - mean_NxS[:, None, None]) * scale_NxS[:, None, None]
    # A GPU multiplies float32 matrices in fewer bits by default.
    scores = jnp.einsum("ngsx,nx->ngs", x, weights_NxS, precision="highest")
    share = jax.nn.softmax(target_Nxgxs[:, blocks], axis=-1)
    return -(share * jax.nn.log_softmax(scores, axis=-1)).sum(axis=-1).mean(axis=-1).sum()

  def step(
    carry: tuple[Array, optax.OptState], key: Array
  ) -> tuple[tuple[Array, optax.OptState], None]:
    weights, state = carry
    gradient = jax.grad(loss)(weights, jax.random.randint(key, (count,), 0, g))
    updates, state = optimizer.update(gradient, state)
    return (optax.apply_updates(weights, updates), state), None

  first = start_NxS * deviation_NxS
  keys = jax.random.split(jax.random.key(0), steps)
  (weights_NxS, _), _ = jax.lax.scan(step, (first, optimizer.init(first)), keys)
  return weights_NxS * scale_NxS
