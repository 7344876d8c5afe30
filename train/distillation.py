"""Distillation from the same weights with dense attention."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from dga_jax.model import Decoder


def dense_states(
  graphdef: nnx.GraphDef, params: PyTree[Array], tokens_BxL: Array, documents: dict[str, Array]
) -> Float[Array, "B L E"]:
  """The final states of the decoder with dense attention in all heads; without a gradient.

  Args:
    graphdef: of the decoder.
    params: its parameters.
    tokens_BxL: token ids.
    documents: the other arguments of `Decoder.hidden`.
  """
  model: Decoder = nnx.merge(graphdef, jax.lax.stop_gradient(params))
  # The attention kind is no part of the parameters.
  model.config = dataclasses.replace(model.config, attention="dense", head_gates=False)
  return model.hidden(tokens_BxL, **documents)


def divergence(
  logits: Float[Array, "*S V"], teacher_logits: Float[Array, "*S V"]
) -> Float[Array, "*S"]:
  """KL(teacher‖model) = Σ p·(log p − log q) in nats, float32 logits; p is the teacher's."""
  log_q, log_p = (jax.nn.log_softmax(x, axis=-1) for x in (logits, teacher_logits))
  return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
