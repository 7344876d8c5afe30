"""AdamW with linear warm-up, cosine decay and clipping by the global norm (optax)."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from train.config import TrainConfig
from train.gates import gate_optimizer, gates_shape


def make_schedule(config: TrainConfig) -> optax.Schedule:
  """Learning rate by the number of steps done before.

  Step 1 takes the first part of a line from 0 to the peak at step `warmup_steps`; a cosine then
  falls to `final_rate` of the peak at the last step.
  """
  rate_after = optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=config.warmup_steps,
    decay_steps=config.num_steps,
    end_value=config.learning_rate * config.optimizer.final_rate,
  )
  return lambda steps_before: rate_after(steps_before + 1)


def make_optimizer(config: TrainConfig, variables: nnx.State) -> optax.GradientTransformation:
  """AdamW for parameters given as a nested dict; of a model with gates the rule of train/gates.py.

  Args:
    config: the training config.
    variables: the model's parameters, possibly abstract, with the names of their axes.
  """
  if config.model.head_gates:
    return gate_optimizer(make_schedule(config), config.full_heads, gates_shape(config))
  settings = config.optimizer
  return optax.chain(
    optax.clip_by_global_norm(settings.clip_norm),
    with_moment_dtype(
      jnp.dtype(settings.moment_dtype),
      optax.adamw(
        make_schedule(config),
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        mask=decay_mask(variables),
      ),
    ),
  )


def with_moment_dtype(
  dtype: jnp.dtype, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
  """The optimizer with its moments stored in a dtype; it computes in float32.

  optax has an option for the first moment alone.
  """
  if dtype == jnp.float32:
    return optimizer

  def cast(state: optax.OptState, dtype: jnp.dtype) -> optax.OptState:
    return jax.tree.map(
      lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state
    )

  def init(params: optax.Params) -> optax.OptState:
    return cast(optimizer.init(params), dtype)

  def update(
    updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
  ) -> tuple[optax.Updates, optax.OptState]:
    updates, state = optimizer.update(updates, cast(state, jnp.dtype(jnp.float32)), params)
    return updates, cast(state, dtype)

  return optax.GradientTransformation(init, update)


def decay_mask(variables: nnx.State) -> PyTree[bool]:
  """Which parameters decay: matrices, which have the axis "embed" and another axis of the model.

  Scales of norms are vectors, and so are biases, stored as heads by channels.
  """
  names = nnx.to_pure_dict(nnx.get_partition_spec(variables))
  return jax.tree.map(
    lambda axes: "embed" in axes and any(axis not in ("layers", "embed") for axis in axes),
    names,
    is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
  )
