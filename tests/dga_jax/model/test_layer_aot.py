"""The attention of a decoder layer compiled for TPUs without the hardware: what is transposed.

The TPU kernels read heads before tokens. XLA lets the projections write that layout, so that the
model's code keeps tokens before heads, which the GPU kernels read.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from benchmarks._tpu_layers import AttentionShape, compile_both_passes
from dga_jax import DGAConfig, dynamic_group_attention
from dga_jax.model import Decoder, ModelConfig
from tests.nightly import nightly_except
from tests.pallas_kernels.tpu import compile_for_tpu, TOPOLOGIES

pytestmark = pytest.mark.aot

SHAPE = AttentionShape(L=8192, H=8, N=2, D=128)
CONFIGS = {
  "streaming": DGAConfig(selection="streaming", min_focal_tokens=0),
  "global": DGAConfig(selection="global", min_focal_tokens=0),
}
# v6e and tpu7x transpose the products that make queries and keys, before RoPE.
TRANSPOSED = {"v5e": 0, "v5p": 0, "v6e": 2, "tpu7x": 2}
KV_ELEMENTS = SHAPE.L * SHAPE.N * SHAPE.D


def compile_attention(selection: str, chip: str, *, in_layer: bool) -> str:
  def attend(*qkv: jax.Array) -> jax.Array:
    return dynamic_group_attention(*qkv, config=CONFIGS[selection])

  text = compile_both_passes(attend, SHAPE, chip=chip, in_layer=in_layer).as_text()
  assert text is not None
  return text


def transposed_tokens(text: str) -> list[str]:
  """Instructions that transpose an array with tokens and a head dim, of KV size or larger.

  A copy that keeps the order of axes, such as one between HBM and VMEM, is not among them, nor what
  fusions copy while they compute.
  """
  computations = re.split(r"\n(?=%|ENTRY)", text)
  outside_fusions = "\n".join(x for x in computations if not x.startswith("%fused_computation"))
  array = r"%([\w.\-]+) = \w+\[([\d,]+)\]\{([\d,]+)[^}]*\}"
  order = {name: axes for name, _, axes in re.findall(array, outside_fusions)}
  moved = re.findall(array + r" (?:copy|transpose)\(%([\w.\-]+)", outside_fusions)
  found = []
  for name, shape, axes, operand in moved:
    sizes = [int(size) for size in shape.split(",")]
    has_tokens = {SHAPE.L, SHAPE.D} <= set(sizes) and math.prod(sizes) >= KV_ELEMENTS
    if has_tokens and order[operand] != axes:
      found.append(name)
  return found


@pytest.mark.parametrize("chip", nightly_except(TOPOLOGIES, "v5e", "v6e"))
def test_a_layer_transposes_nothing_but_products_of_queries_and_keys(chip: str):
  text = compile_attention("streaming", chip, in_layer=True)
  assert len(transposed_tokens(text)) == TRANSPOSED[chip]
  # The product with the output weights would be several times slower with two axes of heads.
  assert f"[1,{SHAPE.N},{SHAPE.H // SHAPE.N},{SHAPE.L},{SHAPE.D}]" not in text


def test_a_layer_with_global_selection_transposes_the_queries_once():
  """XLA's gather of the sampled queries reads tokens before heads."""
  assert len(transposed_tokens(compile_attention("global", "v5e", in_layer=True))) == 1


@pytest.mark.nightly
def test_the_scan_over_layers_transposes_no_array_of_heads():
  """What the backward pass needs of each layer is stacked heads first, too."""
  config = ModelConfig(
    vocab_size=256,
    num_layers=3,
    embed_dim=1024,
    num_heads=SHAPE.H,
    num_kv_heads=SHAPE.N,
    head_dim=SHAPE.D,
    mlp_dim=2048,
    dga=CONFIGS["streaming"],
  )
  structure, weights = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))

  def loss(weights: Any, tokens_BxL: jax.Array) -> jax.Array:
    return nnx.merge(structure, weights).hidden(tokens_BxL).astype(jnp.float32).sum()

  tokens = jax.ShapeDtypeStruct((1, SHAPE.L), jnp.int32)
  text = compile_for_tpu(jax.grad(loss), weights, tokens, chip="v5e").as_text()
  assert text is not None
  assert "grouped_attention_dq" in text
  assert transposed_tokens(text) == []


def test_the_op_alone_transposes_its_arguments_and_results():
  assert len(transposed_tokens(compile_attention("streaming", "v5e", in_layer=False))) >= 6
