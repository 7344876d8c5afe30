"""Decoders with weights in 8 bits: rounding, equality with dequantized weights, and refusals."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dga_jax import DGAConfig, HeadBudgets
from dga_jax.evaluation.variants import Family, Variant
from dga_jax.generation import ContinuousBatching, Request, Sampling
from dga_jax.generation.weights import compute_weights
from dga_jax.loading import with_attention
from dga_jax.model import (
  apply_budgets,
  Decoder,
  ModelConfig,
  quantize_weights,
  quantized,
  weight_name,
)
from dga_jax.sharding import make_mesh, MeshConfig
from pallas_kernels.quantized_product import quantized_product
from tests.dga_jax.model.random_decoder import random_decoder
from tests.rounding import assert_close

CONFIG = ModelConfig(
  vocab_size=61,
  num_layers=2,
  embed_dim=32,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=48,
  dga=DGAConfig(selection="streaming", group_size=5, sink_tokens=2, local_window=1),
  dtype="float32",
  qkv_bias=True,
  qk_norm=True,
)
MODEL = random_decoder(CONFIG)
NAMES = ("int8", "fp8")
# Half of the largest distance between adjacent numbers, over the largest number of the type.
ROUNDING = {"int8": 0.5 / 127, "fp8": 16 / 448}
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 40), dtype=np.int32)
forward = nnx.jit(Decoder.__call__)


def dequantized(model: Decoder) -> Decoder:
  """The decoder with the weights scale · numbers of a quantized one, in float32."""
  layers: Any = model.layers
  copy: Any = nnx.clone(MODEL)

  def matrices(projection: Any, *shapes: tuple[int, ...]) -> list[jax.Array]:
    numbers = projection.numbers[...].astype(jnp.float32)
    numbers *= projection.scale[...][..., None]
    parts = np.split(np.swapaxes(numbers, -1, -2), np.cumsum([_outputs(s) for s in shapes])[:-1], 2)
    return [jnp.asarray(part.reshape(2, *shape)) for part, shape in zip(parts, shapes, strict=True)]

  attention, mlp = copy.layers.attention, copy.layers.mlp
  query, key, value = matrices(layers.qkv, (32, 4, 8), (32, 2, 8), (32, 2, 8))
  attention.query[...], attention.key[...], attention.value[...] = query, key, value
  (attention.out[...],) = matrices(layers.out, (4, 8, 32))
  mlp.gate[...], mlp.up[...] = matrices(layers.gate_up, (32, 48), (32, 48))
  (mlp.down[...],) = matrices(layers.down, (48, 32))
  return copy


def _outputs(shape: tuple[int, ...]) -> int:
  return shape[2] if shape == (4, 8, 32) else int(np.prod(shape[1:]))


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_decoder_with_dequantized_weights(name: Any) -> None:
  model = quantize_weights(MODEL, name)
  assert weight_name(model) == name
  assert weight_name(MODEL) is None
  plain = dequantized(model)
  np.testing.assert_allclose(forward(model, TOKENS), forward(plain, TOKENS), rtol=2e-5, atol=2e-5)
  original: Any = MODEL.layers
  changed: Any = plain.layers
  for which in ("gate", "up", "down"):  # Within half a step of a channel's largest weight.
    weight, rounded = (np.asarray(getattr(x.mlp, which)[...]) for x in (original, changed))
    largest = np.abs(weight).max(axis=1, keepdims=True)
    assert (np.abs(weight - rounded) <= ROUNDING[name] * largest * (1 + 1e-5)).all()
    assert not np.array_equal(weight, rounded)


@pytest.mark.parametrize("name", NAMES)
def test_decoding_equals_the_forward_pass(name: Any) -> None:
  model = quantize_weights(MODEL, name)
  logits = forward(model, TOKENS)
  unstacked = model.unstack_layers()
  assert weight_name(unstacked) == name
  step, cache = nnx.jit(Decoder.decode), unstacked.init_cache(2, 40)
  for position in range(20):
    found, cache = step(unstacked, TOKENS[:, position], cache)
    np.testing.assert_allclose(found, logits[:, position], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("name", NAMES)
def test_gpu_kernels_decode_as_exactly_as_xla(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
  """The sizes are multiples of the kernel's tiles. With fp8 normalised rows are float16."""
  config = dataclasses.replace(CONFIG, embed_dim=64, head_dim=16, mlp_dim=96, dtype="bfloat16")

  def logits(dtype: Any, implementation: str) -> np.ndarray:
    product = functools.partial(quantized_product, implementation=implementation)
    monkeypatch.setattr(quantized, "quantized_product", product)

    def decode(model: Decoder, token_B: jax.Array, cache: Any) -> Any:
      return model.decode(token_B, cache)

    of_dtype = random_decoder(dataclasses.replace(config, dtype=dtype))
    model = quantize_weights(of_dtype, name).unstack_layers()
    step, cache, found = nnx.jit(decode), model.init_cache(2, 40), []
    for position in range(20):
      row, cache = step(model, jnp.asarray(TOKENS[:, position]), cache)
      found.append(np.asarray(row, np.float32))
    return np.stack(found)

  with jax.default_matmul_precision("highest"):
    exact = logits("float32", "xla")
  plain = logits("bfloat16", "xla")
  assert_close(logits("bfloat16", "triton"), exact, terms=96, plain=plain)


def test_unstacked_layers_have_the_same_numbers() -> None:
  one = quantize_weights(MODEL, "int8").unstack_layers()
  other = quantize_weights(MODEL.unstack_layers(), "int8")
  jax.tree.map(
    np.testing.assert_array_equal, *(nnx.to_pure_dict(nnx.state(x)) for x in (one, other))
  )


def test_generation_keeps_the_weights_in_8_bits() -> None:
  model = quantize_weights(random_decoder(dataclasses.replace(CONFIG, dtype="bfloat16")), "fp8")
  sizes = [x.dtype.itemsize for x in jax.tree.leaves(compute_weights(model)) if x.size >= 32 * 32]
  assert sorted(set(sizes)) == [1, 2]  # The embedding table and the unembedding have 16 bits.
  float32 = quantize_weights(MODEL, "int8")
  prompt = TOKENS[0, :9].tolist()
  batch = ContinuousBatching(
    float32, [Request(prompt, 3, Sampling(temperature=0.0))], slots=1, stop_ids=()
  )
  (tokens,) = batch.run().tokens
  for token in tokens:
    assert token == int(forward(float32, np.array([prompt]))[0, -1].argmax())
    prompt = [*prompt, token]


def test_other_attention_kinds_and_variants_keep_the_weights() -> None:
  model = quantize_weights(MODEL, "int8")
  dense = with_attention(model, "dense")
  assert (dense.config.attention, weight_name(dense)) == ("dense", "int8")
  variant = Variant("dense", {"attention": "dense"})
  family = Family(model).model(variant, 40)
  np.testing.assert_array_equal(forward(dense, TOKENS), forward(family, TOKENS))


def test_quantized_weights_have_no_gradient() -> None:
  structure, params = nnx.split(quantize_weights(MODEL, "fp8"))
  with pytest.raises(ValueError, match=r"weights are in 8 bits \(float8_e4m3fn\), which have no"):
    jax.grad(lambda params: nnx.merge(structure, params)(TOKENS).sum())(params)
  layers: Any = quantize_weights(MODEL, "int8").unstack_layers().layers
  with pytest.raises(ValueError, match=r"weights are in 8 bits \(int8\), which have no gradient"):
    jax.grad(lambda x: layers[0].qkv(x).sum())(jnp.ones((1, 32)))


def test_refusals_name_the_remedy() -> None:
  model = quantize_weights(MODEL, "int8")
  with pytest.raises(ValueError, match=r"8 bits \(int8\) already"):
    quantize_weights(model, "fp8")
  with pytest.raises(ValueError, match="call apply_budgets before quantize_weights"):
    apply_budgets(model, HeadBudgets(("full",), ((0, 0), (0, 0))))
  with pytest.raises(ValueError, match="one device holds, but there is a mesh"):
    compute_weights(model, make_mesh(MeshConfig(data=1), jax.devices()[:1]))


@pytest.mark.invalid_arguments
def test_an_unknown_dtype_is_refused() -> None:
  with pytest.raises(ValueError, match="weights is 'int4'; it must be one of"):
    quantize_weights(MODEL, "int4")  # type: ignore[arg-type]
