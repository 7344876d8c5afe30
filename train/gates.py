"""Training of gates: which KV heads of a given model stay full.

A gate g in [0, 1] of each KV head mixes full attention into the compact one
(dga_jax/model/head_gates.py). All other parameters stay fixed. The mean of the gates stays
`TrainConfig.full_heads`, so heads compete for full attention, and no penalty needs a weight:

  v ← 0.9·v + gradient,   g ← project(g − learning_rate·v/‖v‖)

where `project` is the Euclidean projection on the gates in [0, 1] of this mean. One norm is that of
all gates: Adam would move every gate at the same speed, whatever the head is worth. All gates start
at the mean.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from train.config import TrainConfig

GATES = "head_gates"  # Their key in the parameters of a decoder.
_MOMENTUM = 0.9
_BISECTIONS = 40  # Of an interval of length below 2: more than float32 resolves.


def gates_shape(config: TrainConfig) -> tuple[int, int]:
  """Layers and KV heads."""
  return config.model.num_layers, config.model.num_kv_heads


def initial_gates(config: TrainConfig) -> Float[Array, "K N"]:
  """The gates before the first step."""
  return jnp.full(gates_shape(config), config.full_heads, jnp.dtype(config.model.param_dtype))


def freeze_others(params: dict[str, Any]) -> dict[str, Any]:
  """Parameters of which only the gates have a gradient."""
  return {
    name: value if name == GATES else jax.lax.stop_gradient(value) for name, value in params.items()
  }


def gate_optimizer(
  schedule: optax.Schedule, mean: float, shape: tuple[int, int]
) -> optax.GradientTransformation:
  """The rule of the module for the gates; all other parameters stay as they are.

  The state is that of the gates alone. It does not depend on the parameters, so that
  `train.sharding.optimizer_shardings` replicates it.

  Args:
    schedule: the learning rate by the number of steps done: the norm of an update.
    mean: of the gates.
    shape: of the gates, layers by KV heads.
  """
  rule = optax.chain(
    optax.trace(_MOMENTUM),
    optax.normalize_by_update_norm(),
    optax.scale_by_learning_rate(schedule),
    _stay_in_bounds(mean),
  )

  def init(params: optax.Params) -> optax.OptState:
    del params
    return rule.init(jnp.zeros(shape))

  def update(
    updates: Any, state: optax.OptState, params: Any = None
  ) -> tuple[optax.Updates, optax.OptState]:
    step, state = rule.update(updates[GATES], state, params[GATES])
    return jax.tree.map(jnp.zeros_like, updates) | {GATES: step}, state

  return optax.GradientTransformation(init, update)


def _stay_in_bounds(mean: float) -> optax.GradientTransformation:
  """Changes updates so that the updated parameters are projected."""

  def update(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
    return jax.tree.map(lambda step, x: project(x + step, mean) - x, updates, params)

  return optax.stateless(update)


def project(gates: Float[Array, "*heads"], mean: float) -> Float[Array, "*heads"]:
  """The nearest values in [0, 1] with a given mean: clip(gates − τ, 0, 1).

  Args:
    gates: any values.
    mean: in (0, 1).
  """

  def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
    low, high = bounds
    middle = (low + high) / 2
    is_low = jnp.clip(gates - middle, 0, 1).mean() > mean
    return jnp.where(is_low, middle, low), jnp.where(is_low, high, middle)

  low, high = jax.lax.fori_loop(0, _BISECTIONS, halve, (gates.min() - 1, gates.max()))
  return jnp.clip(gates - (low + high) / 2, 0, 1)
