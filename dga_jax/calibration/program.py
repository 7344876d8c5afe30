"""The program that calibration runs: a decoder whose KV heads follow candidates.

The candidates are static and the assignment of candidates to KV heads is an argument, so one
compiled program serves every assignment.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dga_jax.attention.segments import find_documents
from dga_jax.calibration.rows import Batch
from dga_jax.head_budgets import HeadSetting
from dga_jax.model import Decoder
from dga_jax.model.attention_kinds.base import AttentionKind
from dga_jax.model.attention_kinds.head_budgets import kind_of_setting
from dga_jax.model.rope import rope_table

_CHUNK = 256  # Targets of a row whose logits are computed at a time.


class Measured(NamedTuple):
  """Of each row of a batch.

  Attributes:
    loss: mean cross entropy of the targets in nats, float32.
    found: whether every target is the most likely token, which is whether greedy decoding
      generates the targets.
  """

  loss: Float[Array, "B"]
  found: Bool[Array, "B"]


class AssignedDecoder:
  """A decoder whose KV heads follow the candidates that an assignment names.

  Args:
    model: its parameters are used; its own attention kind is not.
    candidates: the settings to choose from.
  """

  def __init__(self, model: Decoder, candidates: Sequence[HeadSetting]) -> None:
    self.config = model.config
    self._graphdef, self._params = nnx.split(model)
    self._kinds = tuple(map(kind_of_setting, candidates))

  def embed(self, tokens_BxL: Int[Array | np.ndarray, "B L"]) -> Float[Array, "B L E"]:
    """The input of layer 0."""
    return embed(self._graphdef, self._params, jnp.asarray(tokens_BxL))

  def run_layers(
    self,
    x_BxLxE: Float[Array, "B L E"],
    assignment: Int[np.ndarray, "K N"],
    first: int,
    last: int,
  ) -> Float[Array, "B L E"]:
    """Runs the layers first … last − 1.

    The cost is that of the layers and candidates that are used: a candidate that no head of a
    layer follows is not computed in this layer.

    Args:
      x_BxLxE: the input of layer `first`; rows are whole documents of L tokens.
      assignment: the candidate of each of N KV heads in each of K layers, an index.
      first: the first layer.
      last: the layer whose input is returned; K for the output of the last layer.
    """
    return _run_layers(
      self._graphdef,
      self._kinds,
      self._params,
      x_BxLxE,
      jnp.asarray(assignment, jnp.int32),
      jnp.int32(first),
      jnp.int32(last),
    )

  def measure(self, x_BxLxE: Float[Array, "B L E"], batch: Batch) -> Measured:
    """The losses of a batch's targets, from the output of the last layer."""
    position, target, weight = map(jnp.asarray, batch[1:])
    return Measured(*_measure(self._graphdef, self._params, x_BxLxE, position, target, weight))


@functools.partial(jax.jit, static_argnums=0)
def embed(graphdef: nnx.GraphDef, params: Any, tokens_BxL: Array) -> Array:
  """The input of the first layer, [B, L, E] in the model's dtype."""
  model = nnx.merge(graphdef, params)
  return model.embedding[...][tokens_BxL].astype(model.config.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_layers(
  graphdef: nnx.GraphDef,
  kinds: tuple[AttentionKind, ...],
  params: Any,
  x_BxLxE: Array,
  assignment_KxN: Array,
  first: Array,
  last: Array,
) -> Array:
  model = nnx.merge(graphdef, params)
  config, (B, L) = model.config, x_BxLxE.shape[:2]
  documents = find_documents(B, L, None, None)
  metadata = [kind.prepare(documents) for kind in kinds]
  rope = rope_table(documents.position, config.rope_frequencies())
  structure, stacked = nnx.split(model.layers)

  def attend(setting_N: Array, q: Array, k: Array, v: Array, scores: Array | None = None) -> Array:
    setting_H = jnp.repeat(setting_N, config.num_heads // config.num_kv_heads)
    out_BxLxHxD = jnp.zeros_like(q)
    for index, kind in enumerate(kinds):
      follows_H = setting_H == index
      own_BxLxHxD = jax.lax.cond(
        follows_H.any(),
        functools.partial(kind.attend, metadata=metadata[index], **kind.focal_options(scores)),
        lambda q, k, v: jnp.zeros_like(q),
        q,
        k,
        v,
      )
      out_BxLxHxD = jnp.where(follows_H[None, None, :, None], own_BxLxHxD, out_BxLxHxD)
    return out_BxLxHxD

  def run_layer(layer: Array, x_BxLxE: Array) -> Array:
    one = nnx.merge(structure, jax.tree.map(lambda array: array[layer], stacked))
    setting_N = assignment_KxN[layer]
    return one(x_BxLxE, rope, lambda *heads: (attend(setting_N, *heads), None))[0]

  return jax.lax.fori_loop(first, last, run_layer, x_BxLxE)


@functools.partial(jax.jit, static_argnums=0)
def _measure(
  graphdef: nnx.GraphDef,
  params: Any,
  x_BxLxE: Array,
  position_BxS: Array,
  target_BxS: Array,
  weight_BxS: Array,
) -> tuple[Array, Array]:
  model = nnx.merge(graphdef, params)
  x_BxSxE = jnp.take_along_axis(x_BxLxE, position_BxS[..., None], axis=1)
  states_BxSxE = model.norm(x_BxSxE).astype(model.config.dtype)

  def score(one: tuple[Array, Array]) -> tuple[Array, Array]:
    logits_BxV = jax.nn.log_softmax(model.unembed(one[0]), axis=-1)
    nats_B = -jnp.take_along_axis(logits_BxV, one[1][:, None], axis=-1)[:, 0]
    return nats_B, jnp.argmax(logits_BxV, axis=-1) == one[1]

  targets = (states_BxSxE.swapaxes(0, 1), target_BxS.T)
  nats_SxB, is_right_SxB = jax.lax.map(score, targets, batch_size=_CHUNK)
  found_B = (is_right_SxB | (weight_BxS.T == 0)).all(axis=0)
  return (nats_SxB.T * weight_BxS).sum(axis=1), found_B
