"""Loss on long documents: over whole sequences, with less context, and token by token."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dga_jax.model import Decoder

_CHUNK = 256  # Positions whose logits are computed at a time.


@functools.partial(jax.jit, static_argnums=0)
def teacher_forced(
  graphdef: nnx.GraphDef, params: Any, tokens: Int[Array, "B T"]
) -> Float[Array, "B L"]:
  """The loss of each next token in nats, over whole sequences: float32 [B, L].

  With global selection, and every attention kind in which later queries choose what earlier queries
  see, this loss is not achievable in autoregressive decoding; see `decoded`.
  """
  model = nnx.merge(graphdef, params)
  return cross_entropy_from_states(model, model.hidden(tokens[:, :-1]), tokens[:, 1:])


@functools.partial(jax.jit, static_argnums=(0, 3))
def decoded(
  graphdef: nnx.GraphDef, params: Any, tokens: Int[Array, "B T"], targets: int
) -> Float[Array, "B T"]:
  """The loss of each of the last T = `targets` tokens in nats, as in decoding: float32 [B, T].

  The tokens before the targets are prefilled; then one token at a time is decoded with the cache.
  """
  model = nnx.merge(graphdef, params)
  L = tokens.shape[1] - 1
  prompt = L - targets + 1
  logits_BxV, cache = model.prefill(tokens[:, :prompt], max_length=L)

  def step(carry: tuple[Any, Array], token_B: Array) -> tuple[tuple[Any, Array], Array]:
    cache, logits_BxV = carry
    nats_B = _cross_entropy(logits_BxV, token_B)
    logits_BxV, cache = model.decode(token_B, cache)
    return (cache, logits_BxV), nats_B

  carry = (cache, logits_BxV)
  (_, logits_BxV), nats_TxB = jax.lax.scan(step, carry, tokens[:, prompt:L].T)
  return jnp.concatenate([nats_TxB.T, _cross_entropy(logits_BxV, tokens[:, L])[:, None]], axis=1)


def batches(rows: Int[np.ndarray, "B S"], size: int) -> Iterator[Int[np.ndarray, "b S"]]:
  """Batches of `size` rows; the last batch may have fewer."""
  for start in range(0, len(rows), size):
    yield rows[start : start + size]


def fill(batch: Int[np.ndarray, "b S"], size: int) -> Int[Array, "B S"]:
  """Repeats the last row up to `size` rows, so that all batches share a program."""
  index = np.minimum(np.arange(size), len(batch) - 1)
  return jax.device_put(jnp.asarray(batch[index]))


def restarted(
  rows: Int[np.ndarray, "B T"], context: int, targets: int, start_ids: Sequence[int]
) -> Int[np.ndarray, "B S"]:
  """The rows' last `targets` tokens after `context` tokens of text.

  Each row starts with the tokens that start a document, as whole rows do.

  Args:
    rows: inputs and their next tokens.
    context: tokens of text before the targets.
    targets: last tokens of each row.
    start_ids: tokens that start a document.

  Raises:
    ValueError: the rows have less context.
  """
  most = rows.shape[1] - targets - len(start_ids)
  if not 1 <= context <= most:
    raise ValueError(f"context is {context}; it must be from 1 to {most}, the context of the rows.")
  start = np.tile(np.array(start_ids, rows.dtype), (len(rows), 1))
  return np.concatenate([start, rows[:, rows.shape[1] - targets - context :]], axis=1)


def cross_entropy_from_states(
  model: Decoder, states_BxLxE: Float[Array, "B L E"], targets_BxL: Int[Array, "B L"]
) -> Float[Array, "B L"]:
  """The cross entropy in nats, float32 [B, L], with the logits of few positions at a time."""
  B, L, E = states_BxLxE.shape
  chunk = min(_CHUNK, L)
  padded = -(-L // chunk) * chunk
  states = jnp.pad(states_BxLxE, ((0, 0), (0, padded - L), (0, 0))).reshape(B, -1, chunk, E)
  targets = jnp.pad(targets_BxL, ((0, 0), (0, padded - L))).reshape(B, -1, chunk)
  nats_CxBxc = jax.lax.map(
    lambda one: _cross_entropy(model.unembed(one[0]), one[1]),
    (states.swapaxes(0, 1), targets.swapaxes(0, 1)),
  )
  return nats_CxBxc.swapaxes(0, 1).reshape(B, padded)[:, :L]


def _cross_entropy(logits: Float[Array, "*S V"], target: Int[Array, "*S"]) -> Float[Array, "*S"]:
  log_probability = jax.nn.log_softmax(logits, axis=-1)
  return -jnp.take_along_axis(log_probability, target[..., None], axis=-1)[..., 0]
