"""Skips updates with a non-finite or spiking loss; the check runs inside the jitted step.

A step is bad if its loss, its gradient or the updated parameters are not finite, or if its loss is
a spike: it exceeds the mean of the last good losses by a number of their standard deviations. These
losses are part of the training state, so a resumed run judges like an uninterrupted one.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, PyTree

from train.config import GuardConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guard:
  """The losses of good steps.

  Attributes:
    losses: the last ones, in a ring buffer.
    count: number of good steps so far.
  """

  losses: Float[Array, "W"]
  count: Int32[Array, ""]


def new_guard(config: GuardConfig) -> Guard:
  """The guard before the first step."""
  return Guard(jnp.zeros(config.spike_window, jnp.float32), jnp.int32(0))


def is_good(
  config: GuardConfig,
  guard: Guard,
  loss: Float[Array, ""],
  grad_norm: Float[Array, ""],
  param_norm: Float[Array, ""],
) -> Bool[Array, ""]:
  """Whether a step may change the state.

  Args:
    config: when a loss is a spike.
    guard: the losses of the steps before.
    loss: of the step.
    grad_norm: of its gradient.
    param_norm: of the updated parameters.
  """
  good = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(param_norm)
  if config.spike_sigmas is None:
    return good
  limit = jnp.mean(guard.losses) + config.spike_sigmas * jnp.std(guard.losses)
  return good & ((guard.count < config.spike_window) | (loss <= limit))


def seen(guard: Guard, loss: Float[Array, ""], good: Bool[Array, ""]) -> Guard:
  """The guard after a step."""
  slot = guard.count % guard.losses.size
  losses = guard.losses.at[slot].set(jnp.where(good, loss, guard.losses[slot]))
  return Guard(losses, guard.count + good)


def choose[Tree: PyTree[Array]](good: Bool[Array, ""], new: Tree, old: Tree) -> Tree:
  """`new` after a good step, else `old`; integers, which count steps, are always `new`.

  The learning rate is a function of the step, also after a skipped one.
  """

  def pick(new: Array, old: Array) -> Array:
    is_count = jnp.issubdtype(new.dtype, jnp.integer)
    return new if is_count else jnp.where(good, new, old)

  return jax.tree.map(pick, new, old)
