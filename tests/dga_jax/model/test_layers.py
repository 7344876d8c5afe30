"""RMSNorm, RoPE, SwiGLU and initialisation equal their formulas in NumPy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dga_jax.model import ModelConfig, RopeScaling
from dga_jax.model.layers import DecoderLayer, rms_norm, SelfAttention, SwiGLU
from dga_jax.model.logits import logits
from dga_jax.model.rope import apply_rope, inverse_frequencies, rope_table

CONFIG = ModelConfig(
  vocab_size=32,
  num_layers=8,
  embed_dim=64,
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  mlp_dim=96,
  norm_eps=1e-3,
  dtype="float32",
)


def test_rms_norm() -> None:
  norm = rms_norm(CONFIG, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  x, scale = rng.normal(size=(2, 3, 64)), rng.normal(size=64)
  norm.scale.set_value(jnp.asarray(scale, jnp.float32))
  expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * scale
  np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_statistics_are_float32() -> None:
  # 300² overflows float16, and a bfloat16 mean over 64 channels loses precision.
  norm = rms_norm(CONFIG, rngs=nnx.Rngs(0))
  x_BxLxE = jnp.full((1, 1, 64), 300.0, jnp.float16)
  np.testing.assert_allclose(norm(x_BxLxE), np.ones((1, 1, 64)), rtol=1e-6)
  assert norm(x_BxLxE).dtype == jnp.float32


def test_rope_rotates_channel_pairs_as_complex_numbers() -> None:
  rng = np.random.default_rng(0)
  x_BxLxHxD = rng.normal(size=(2, 5, 3, 16))
  positions_BxL = np.array([[0, 1, 2, 3, 4], [7, 0, 1000, 5, 5]])
  omega_C = inverse_frequencies(16, base=500.0)
  turned = apply_rope(
    jnp.asarray(x_BxLxHxD, jnp.float32), rope_table(jnp.asarray(positions_BxL), omega_C)
  )
  z = x_BxLxHxD[..., :8] + 1j * x_BxLxHxD[..., 8:]
  angle = positions_BxL[:, :, None] * np.array([500.0 ** (-c / 8) for c in range(8)])
  z = z * np.exp(1j * angle)[:, :, None]
  np.testing.assert_allclose(turned, np.concatenate([z.real, z.imag], -1), atol=2e-4)


def test_rope_keeps_the_dtype_and_computes_in_float32() -> None:
  table = rope_table(jnp.array([[4095]]), inverse_frequencies(16, base=10000.0))
  assert apply_rope(jnp.ones((1, 1, 1, 16), jnp.bfloat16), table).dtype == jnp.bfloat16
  assert table.cos.dtype == jnp.float32
  # In bfloat16 the angle 4095 has an error above a radian.
  np.testing.assert_allclose(table.cos[0, 0, 0], math.cos(4095.0), atol=1e-4)


def test_linear_scaling_divides_positions() -> None:
  plain = inverse_frequencies(16, base=10000.0)
  scaled = inverse_frequencies(16, base=10000.0, scaling=RopeScaling("linear", 4.0))
  np.testing.assert_allclose(8 * scaled, 2 * plain)


def test_llama3_scaling_by_wavelength() -> None:
  scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
  plain = inverse_frequencies(128, base=500000.0)
  scaled = inverse_frequencies(128, base=500000.0, scaling=scaling)
  regimes = set()
  for omega, got in zip(plain, scaled, strict=True):
    wavelength = 2 * math.pi / omega
    if wavelength < 8192 / 4:
      regime, expected = "kept", omega
    elif wavelength > 8192 / 1:
      regime, expected = "stretched", omega / 8
    else:
      smooth = (8192 / wavelength - 1) / (4 - 1)
      regime, expected = "blended", (1 - smooth) * omega / 8 + smooth * omega
    regimes.add(regime)
    assert got == pytest.approx(expected, rel=1e-12)
  assert regimes == {"kept", "blended", "stretched"}


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_queries_and_keys_get_bias_norm_and_rope_before_attention(
  qkv_bias: bool, qk_norm: bool
) -> None:
  config = dataclasses.replace(CONFIG, qkv_bias=qkv_bias, qk_norm=qk_norm)
  layer = SelfAttention(config, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  x_BxLxE = rng.normal(size=(2, 3, 64))
  table = rope_table(jnp.array([[0, 1, 2], [5, 6, 7]]), inverse_frequencies(16, base=500.0))
  expected = []
  for name in ("query", "key", "value"):
    y = np.einsum("ble,ehd->blhd", x_BxLxE, getattr(layer, name)[...])
    if qkv_bias:
      bias = rng.normal(size=y.shape[2:])
      getattr(layer, f"{name}_bias").set_value(jnp.asarray(bias, jnp.float32))
      y = y + bias
    if qk_norm and name != "value":
      scale = rng.normal(size=16)
      getattr(layer, f"{name}_norm").scale.set_value(jnp.asarray(scale, jnp.float32))
      y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-3) * scale
    y = jnp.asarray(y, jnp.float32)
    expected.append(y if name == "value" else apply_rope(y, table))

  _, given = layer(jnp.asarray(x_BxLxE, jnp.float32), table, lambda q, k, v: (q, (q, k, v)))
  for got, want in zip(given, expected, strict=True):
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_swiglu() -> None:
  mlp = SwiGLU(CONFIG, rngs=nnx.Rngs(0))
  x = np.random.default_rng(0).normal(size=(2, 3, 64))
  gate, up, down = (np.float64(w[...]) for w in (mlp.gate, mlp.up, mlp.down))
  expected = ((x @ gate) / (1 + np.exp(-(x @ gate))) * (x @ up)) @ down
  np.testing.assert_allclose(mlp(jnp.asarray(x, jnp.float32)), expected, atol=1e-6)


@pytest.mark.parametrize(
  ("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2), ("float16", 1e-3)]
)
def test_logits_and_their_gradient(dtype: str, tolerance: float) -> None:
  rng = np.random.default_rng(0)
  states_BxLxE, table_ExV, weights_BxLxV = (
    jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 3, 8), (8, 5), (2, 3, 5))
  )
  operands = states_BxLxE.astype(dtype), table_ExV.astype(dtype)
  # Products of 16-bit numbers are exact in float32, so only the sums round.
  states, table = (np.float64(x) for x in operands)
  assert logits(*operands).dtype == jnp.float32
  np.testing.assert_allclose(logits(*operands), states @ table, atol=1e-5)

  gradient = jax.grad(lambda *operands: (logits(*operands) * weights_BxLxV).sum(), (0, 1))
  for got, want in zip(
    gradient(*operands),
    (weights_BxLxV @ table.T, np.einsum("ble,blv->ev", states, weights_BxLxV)),
    strict=True,
  ):
    assert got.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=tolerance * np.abs(want).max())


def test_gradient_of_logits_is_a_bfloat16_product() -> None:
  operands = jnp.zeros((2, 3, 8), jnp.bfloat16), jnp.zeros((8, 5), jnp.bfloat16)
  gradient = jax.grad(lambda *operands: (logits(*operands) ** 2).sum(), (0, 1))
  equations = jax.make_jaxpr(gradient)(*operands).eqns
  products = [eqn for eqn in equations if eqn.primitive.name == "dot_general"]
  assert len(products) >= 2
  assert {x.aval.dtype for eqn in products for x in eqn.invars} == {jnp.dtype("bfloat16")}


def test_initial_weights() -> None:
  layer = DecoderLayer(CONFIG, rngs=nnx.Rngs(0))
  for weight, fan_in, variance in [
    (layer.attention.query, 64, 1.0),
    (layer.attention.key, 64, 1.0),
    (layer.attention.value, 64, 1.0),
    (layer.attention.out, 64, 1 / 16),
    (layer.mlp.gate, 64, 1.0),
    (layer.mlp.up, 64, 1.0),
    (layer.mlp.down, 96, 1 / 16),
  ]:
    deviation = math.sqrt(variance / fan_in)
    value = np.asarray(weight[...])
    assert value.std() == pytest.approx(deviation, rel=0.05)
    # Truncation at two standard deviations reduces the standard deviation to 0.88.
    assert np.abs(value).max() <= 2 * deviation / 0.8796
  np.testing.assert_array_equal(layer.attention_norm.scale[...], np.ones(64))


def test_initial_layers_differ_and_repeat_for_a_seed() -> None:
  first, again, other = (
    jax.tree.leaves(nnx.state(DecoderLayer(CONFIG, rngs=nnx.Rngs(seed)))) for seed in (0, 0, 1)
  )
  for a, b, c in zip(first, again, other, strict=True):
    np.testing.assert_array_equal(a, b)
    assert a.ndim == 1 or np.abs(a - c).max() > 0
