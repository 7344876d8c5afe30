"""Steps that would harm a run: told apart inside the step, which then changes nothing.

A step is bad if its loss, its gradient or the parameters after it are not finite numbers, or if its
loss is a spike: further above the mean of the last good steps than so many of their standard
deviations. What is compared
is part of the training state, so a run that is taken up again judges as one that never stopped.
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
    losses: the last ones, in a ring.
    count: how many there were in all.
  """

  losses: Float[Array, "W"]
  count: Int32[Array, ""]


def new_guard(config: GuardConfig) -> Guard:
  """One that has seen no step."""
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
    config: the rule.
    guard: what it has seen.
    loss: of the step.
    grad_norm: of its gradient.
    param_norm: of the parameters that it would lead to.
  """
  good = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(param_norm)
  if config.spike_sigmas is None:
    return good
  limit = jnp.mean(guard.losses) + config.spike_sigmas * jnp.std(guard.losses)
  return good & ((guard.count < config.spike_window) | (loss <= limit))


def seen(guard: Guard, loss: Float[Array, ""], good: Bool[Array, ""]) -> Guard:
  """The guard after a step."""
  place = guard.count % guard.losses.size
  losses = guard.losses.at[place].set(jnp.where(good, loss, guard.losses[place]))
  return Guard(losses, guard.count + good)


def choose[Tree: PyTree[Array]](good: Bool[Array, ""], new: Tree, old: Tree) -> Tree:
  """`new` after a good step, else `old`, but for counts of steps.

  Those go on: the learning rate is a function of the step, whatever happened before it.
  """

  def pick(new: Array, old: Array) -> Array:
    is_count = jnp.issubdtype(new.dtype, jnp.integer)
    return new if is_count else jnp.where(good, new, old)

  return jax.tree.map(pick, new, old)
