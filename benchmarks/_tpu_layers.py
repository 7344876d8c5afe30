"""Both passes of attention, alone or inside a decoder layer, as programs for a TPU compiler."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from benchmarks._aot_tpu import compile_for_tpu
from dga_jax.model.config import ModelConfig
from dga_jax.model.layers import SelfAttention
from dga_jax.model.rope import rope_table

EMBED_DIM = 4096  # of the decoder layer

# Query [1, L, H, D], key and value [1, L, N, D] -> output [1, L, H, D].
type Attend = Callable[[Array, Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class AttentionShape:
  """Sizes of one program: batch 1, L tokens, H query heads, N KV heads, head dim D, bfloat16."""

  L: int
  H: int
  N: int
  D: int


def compile_both_passes(
  attend: Attend, shape: AttentionShape, *, chip: str, in_layer: bool
) -> jax.stages.Compiled:
  """Compiles the output and the gradients of all arguments.

  Args:
    attend: attention of all heads.
    shape: its sizes.
    chip: a name in CHIPS.
    in_layer: whether the program is the attention of a decoder layer (projections, RoPE, attention
      and output product), whose arguments are weights and states; or else attention alone.
  """
  function, arguments, out = (_layer if in_layer else _alone)(attend, shape)

  def both(arguments: Any, dout: Array) -> Any:
    out, pull = jax.vjp(function, *arguments)
    return out, pull(dout)

  return compile_for_tpu(both, arguments, out, chip=chip)


def _alone(attend: Attend, shape: AttentionShape) -> tuple[Attend, list[Any], Any]:
  """Attention, its arguments and its output."""
  query, key, value = (
    jax.ShapeDtypeStruct((1, shape.L, heads, shape.D), jnp.bfloat16)
    for heads in (shape.H, shape.N, shape.N)
  )
  return attend, [query, key, value], query


def _layer(attend: Attend, shape: AttentionShape) -> tuple[Callable[..., Array], list[Any], Any]:
  """The attention of a decoder layer, its arguments and its output."""
  config = ModelConfig(
    vocab_size=1,
    num_layers=1,
    embed_dim=EMBED_DIM,
    num_heads=shape.H,
    num_kv_heads=shape.N,
    head_dim=shape.D,
    mlp_dim=1,
    param_dtype="bfloat16",
  )
  structure, weights = nnx.split(nnx.eval_shape(lambda: SelfAttention(config, rngs=nnx.Rngs(0))))

  def run(weights: Any, x_BxLxE: Array) -> Array:
    positions_BxL = jnp.arange(shape.L, dtype=jnp.int32)[None]
    rope = rope_table(positions_BxL, config.rope_frequencies())
    module = nnx.merge(structure, weights)
    out_BxLxE: Array = module(x_BxLxE, rope, lambda *qkv: (attend(*qkv), None))[0]
    return out_BxLxE

  states = jax.ShapeDtypeStruct((1, shape.L, EMBED_DIM), jnp.bfloat16)
  return run, [weights, states], states
