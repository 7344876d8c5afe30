"""A decoder whose layers have different attention kinds, run layer by layer."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dga_jax.attention.segments import find_documents
from dga_jax.evaluation.losses import cross_entropy_from_states
from dga_jax.model import Decoder
from dga_jax.model.attention_kinds.base import AttentionKind
from dga_jax.model.rope import rope_table


def losses_by_kinds(
  model: Decoder, kinds: Sequence[AttentionKind], tokens: Int[Array | np.ndarray, "B T"]
) -> Float[Array, "B L"]:
  """The loss of each next token in nats, over whole sequences: float32 [B, L].

  One program is compiled for each attention kind, not for each list of kinds.

  Args:
    model: its parameters are used, its own attention kind is not.
    kinds: the attention kind of each layer; hashable.
    tokens: rows of inputs and their next tokens.

  Raises:
    ValueError: `kinds` does not have one entry for each layer.
  """
  if len(kinds) != model.config.num_layers:
    raise ValueError(
      f"kinds has {len(kinds)} entries; it must have {model.config.num_layers}, one a layer."
    )
  graphdef, params = nnx.split(model)
  x_BxLxE = _embed(graphdef, params, tokens[:, :-1])
  for layer, kind in enumerate(kinds):
    x_BxLxE = _layer(graphdef, kind, params, jnp.int32(layer), x_BxLxE)
  return _losses(graphdef, params, x_BxLxE, tokens[:, 1:])


@functools.partial(jax.jit, static_argnums=0)
def _embed(graphdef: nnx.GraphDef, params: Any, tokens_BxL: Array) -> Float[Array, "B L E"]:
  model = nnx.merge(graphdef, params)
  return model.embedding[tokens_BxL].astype(model.config.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _layer(
  graphdef: nnx.GraphDef, kind: AttentionKind, params: Any, layer: Array, x_BxLxE: Array
) -> Float[Array, "B L E"]:
  model = nnx.merge(graphdef, params)
  config = model.config
  B, L = x_BxLxE.shape[:2]
  rope = rope_table(jnp.broadcast_to(jnp.arange(L)[None], (B, L)), config.rope_frequencies())
  structure, stacked = nnx.split(model.layers)
  one = jax.tree.map(lambda array: array[layer], stacked)

  def attend(q: Array, k: Array, v: Array, scores: Array | None = None) -> tuple[Array, None]:
    metadata = kind.prepare(find_documents(B, L, None, None))
    return kind.attend(q, k, v, metadata, **kind.focal_options(scores)), None

  return nnx.merge(structure, one)(x_BxLxE, rope, attend)[0]


@functools.partial(jax.jit, static_argnums=0)
def _losses(
  graphdef: nnx.GraphDef, params: Any, x_BxLxE: Array, targets_BxL: Array
) -> Float[Array, "B L"]:
  model = nnx.merge(graphdef, params)
  states_BxLxE = model.norm(x_BxLxE).astype(model.config.dtype)
  return cross_entropy_from_states(model, states_BxLxE, targets_BxL)
