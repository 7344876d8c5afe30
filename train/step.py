"""One optimizer step: the state and a batch in, the state and a few scalars out."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.stages import Wrapped
from jaxtyping import Array, Bool, Float, Int32, PyTree

from dga_jax.checkpoint import abstract_decoder
from dga_jax.model import Decoder
from dga_jax.sharding import make_mesh, parameter_shardings, zigzag_order
from train.bad_steps import choose, Guard, is_good, new_guard, seen
from train.config import TrainConfig
from train.distillation import dense_states
from train.gates import freeze_others
from train.loss import token_losses, weighted_loss
from train.optimizer import make_optimizer, make_schedule
from train.sharding import (
  batch_sharding,
  HostBatch,
  optimizer_shardings,
  replicated,
  shapes_on,
  shard_batch,
)

type Batch = dict[str, Array]
type Scalars = dict[str, Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that a step changes: a plain pytree, donated from step to step.

  Attributes:
    params: the model's parameters as a nested dict of arrays (the float32 masters).
    optimizer: optax's state.
    step: optimizer steps done, skipped ones counted.
    guard: the losses that a bad step is judged by.
  """

  params: PyTree[Array]
  optimizer: optax.OptState
  step: Int32[Array, ""]
  guard: Guard


@dataclasses.dataclass(frozen=True)
class Functions:
  """The jitted functions of the training loop.

  Attributes:
    graphdef: the decoder's structure; `nnx.merge` with the parameters makes the decoder.
    mesh: the devices of the run.
    shardings: of each array of the state on the mesh.
    shard_batch: transfers this process's rows of a batch (see `train.sharding`) to the mesh.
    init: makes the state before the first step.
    from_params: makes that state from given parameters, which are donated.
    step: one step; the state given to it is donated. Its scalars are the loss (nats per token, see
      `TrainConfig.distillation`), accuracy, grad_norm before clipping, param_norm after the update,
      learning_rate, tokens (those with a loss), and skipped: 1 if the step was bad and changed
      nothing, else 0.
  """

  graphdef: nnx.GraphDef
  mesh: Mesh
  shardings: TrainState
  shard_batch: Callable[[HostBatch], Batch]
  init: Callable[[], TrainState]
  from_params: Callable[[PyTree[Array]], TrainState]
  step: Wrapped  # (TrainState, Batch) -> (TrainState, Scalars)


def make_functions(config: TrainConfig, mesh: Mesh | None = None) -> Functions:
  """The jitted functions of a training run.

  Args:
    config: of the run.
    mesh: the devices; by default all devices, arranged by `config.mesh`.
  """
  mesh = make_mesh(config.mesh) if mesh is None else mesh
  graphdef, variables = abstract_decoder(config.model)
  optimizer = make_optimizer(config, variables)
  schedule = make_schedule(config)
  shardings = _state_shardings(optimizer, variables, mesh)

  # One jitted function makes parameters and optimizer state, so each device creates its shards
  # and never a whole array.
  def init() -> TrainState:
    model = Decoder(config.model, rngs=nnx.Rngs(config.seed))
    return from_params(nnx.to_pure_dict(nnx.state(model, nnx.Param)))

  def from_params(params: PyTree[Array]) -> TrainState:
    return TrainState(params, optimizer.init(params), jnp.int32(0), new_guard(config.guard))

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Scalars]:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      loss, accuracy, grads = mean_gradient(config, graphdef, state.params, batch)
    grads = jax.lax.with_sharding_constraint(grads, shardings.params)
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
    updated = (optax.apply_updates(state.params, updates), optimizer_state)
    grad_norm, param_norm = optax.tree.norm(grads), optax.tree.norm(updated[0])
    good = is_good(config.guard, state.guard, loss, grad_norm, param_norm)
    params, optimizer_state = choose(good, updated, (state.params, state.optimizer))
    scalars = {
      "loss": loss,
      "accuracy": accuracy,
      "grad_norm": grad_norm,
      "param_norm": param_norm,
      "learning_rate": jnp.float32(schedule(state.step)),
      "tokens": jnp.sum(batch["loss_mask"], dtype=jnp.float32),
      "skipped": 1 - jnp.float32(good),
    }
    guard = seen(state.guard, loss, good)
    return TrainState(params, optimizer_state, state.step + 1, guard), scalars

  return Functions(
    graphdef,
    mesh,
    shardings,
    shard_batch=functools.partial(shard_batch, mesh=mesh, micro_batches=config.grad_accumulation),
    init=jax.jit(init, out_shardings=shardings),
    from_params=jax.jit(from_params, donate_argnums=0, out_shardings=shardings),
    step=jax.jit(
      step,
      donate_argnums=0,
      compiler_options=step_options(mesh),
      in_shardings=(shardings, batch_sharding(mesh)),
      out_shardings=(shardings, replicated(mesh)),
    ),
  )


def step_options(mesh: Mesh) -> dict[str, bool]:
  """XLA options for a training step; empty except for GPUs.

  Both concern the arrays that the forward pass over the layers stacks for the backward pass. XLA
  can fuse the product or kernel that makes such an array with its copy into the stack. The result
  of the product also has other users, for which XLA computes it a second time. XLA also fills the
  stacks with zeros, although every element is overwritten.
  """
  if mesh.devices.flat[0].platform != "gpu":
    return {}
  return {
    "xla_gpu_enable_dynamic_slice_fusion": False,
    "xla_gpu_enable_dus_accumulator_zero_init_elimination": True,
  }


def _state_shardings(
  optimizer: optax.GradientTransformation, variables: nnx.State, mesh: Mesh
) -> TrainState:
  params = parameter_shardings(variables, mesh)
  shapes = shapes_on(nnx.to_pure_dict(variables), params)
  whole: Any = replicated(mesh)
  return TrainState(
    params, optimizer_shardings(optimizer, shapes, mesh), whole, Guard(whole, whole)
  )


def mean_gradient(
  config: TrainConfig, graphdef: nnx.GraphDef, params: PyTree[Array], batch: Batch
) -> tuple[Float[Array, ""], Float[Array, ""], PyTree[Array]]:
  """Loss, accuracy and gradient, each the mean over the batch's tokens with a loss.

  The loss is that of `TrainConfig.distillation`. Of a model with gates only these have a gradient.

  The batch is cut into `grad_accumulation` micro-batches, which run in sequence. Each adds its sum
  divided by the token count of the whole batch, which is exact for any distribution of the tokens.
  """
  tokens = jnp.maximum(jnp.sum(batch["loss_mask"], dtype=jnp.float32), 1.0)

  def loss_share(
    params: PyTree[Array], micro_batch: Batch
  ) -> tuple[Float[Array, ""], Float[Array, ""]]:
    if config.model.head_gates:
      params = freeze_others(params)
    model = nnx.merge(graphdef, params)
    inputs_BxL, documents = micro_batch["inputs"], _documents(config, micro_batch)
    teacher_BxLxE = None
    if config.distillation:
      teacher_BxLxE = dense_states(graphdef, params, inputs_BxL, documents)
    loss, correct = weighted_loss(
      model.unembedder(),
      model.hidden(inputs_BxL, **documents),
      _in_order_of_states(micro_batch["targets"]),
      _in_order_of_states(micro_batch["loss_mask"]) / tokens,
      chunk=config.loss_chunk,
      teacher_BxLxE=teacher_BxLxE,
      distillation=config.distillation,
    )
    return loss, correct / tokens

  def accumulate(sums: PyTree[Array], micro_batch: Batch) -> tuple[PyTree[Array], None]:
    shares = jax.value_and_grad(loss_share, has_aux=True)(params, micro_batch)
    return jax.tree.map(jnp.add, sums, shares), None

  zeros = ((jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, params))
  ((loss, accuracy), grads), _ = jax.lax.scan(accumulate, zeros, micro_batches(config, batch))
  return loss, accuracy, grads


def batch_losses(
  config: TrainConfig, graphdef: nnx.GraphDef, params: PyTree[Array], batch: Batch
) -> tuple[Float[Array, "B L"], Bool[Array, "B L"]]:
  """Loss of every token, and whether its target is the most likely token; see `token_losses`."""
  model = nnx.merge(graphdef, params)
  hidden_BxLxE = model.hidden(batch["inputs"], **_documents(config, batch))
  targets_BxL = _in_order_of_states(batch["targets"])
  losses = token_losses(model.unembedder(), hidden_BxLxE, targets_BxL, chunk=config.loss_chunk)
  order_L = zigzag_order(targets_BxL.shape[1])
  if order_L is None:
    return losses
  back_L = np.argsort(order_L)
  return losses[0][:, back_L], losses[1][:, back_L]


def _in_order_of_states(x_BxL: Array) -> Array:
  """An array of a batch in the order of `Decoder.hidden`, which is that of the tokens or zigzag."""
  order_L = zigzag_order(x_BxL.shape[1])
  return x_BxL if order_L is None else x_BxL[:, order_L]


def _documents(config: TrainConfig, batch: Batch) -> Batch:
  """The documents of the rows, as arguments of the decoder.

  A row with one document at most is a right-padded row and needs no mask of documents, which
  cuDNN's dense attention does not support.
  """
  segment_ids_BxL = batch["segment_ids"]
  if config.data.max_documents == 1:
    return {"lengths": jnp.sum(segment_ids_BxL >= 0, axis=1, dtype=jnp.int32)}
  return {"segment_ids": segment_ids_BxL}


def micro_batches(config: TrainConfig, batch: Batch) -> Batch:
  """The batch's arrays [B, ...] as [grad_accumulation, B / grad_accumulation, ...].

  Consecutive rows go to different micro-batches, so each device has its rows of every micro-batch
  already.
  """
  pieces = config.grad_accumulation

  def deal(x: Array) -> Array:
    return jnp.moveaxis(x.reshape(-1, pieces, *x.shape[1:]), 1, 0)

  return {name: deal(x) for name, x in batch.items()}
