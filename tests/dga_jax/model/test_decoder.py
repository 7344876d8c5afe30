"""The decoder equals a LLaMA forward pass in NumPy, in float64."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dga_jax import DGAConfig
from dga_jax.model import Decoder, ModelConfig, RopeScaling
from pallas_kernels import dispatch
from pallas_kernels.target import Target
from tests.dga_jax.model.random_decoder import abstract_decoder, random_decoder

CONFIG = ModelConfig(
  vocab_size=31,
  num_layers=3,
  embed_dim=20,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=28,
  attention="dense",
  dtype="float32",
)
LINEAR = RopeScaling("linear", 4.0)
# The channel pairs have wavelengths 6.3 (kept), 63 (blended), 628 and 6283 (both stretched).
LLAMA3 = RopeScaling("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                     original_max_position=128)  # fmt: skip
forward = nnx.jit(Decoder.__call__)


def frequency(config: ModelConfig, channel: int) -> float:
  omega = config.rope_base ** (-2 * channel / config.head_dim)
  scaling = config.rope_scaling
  if scaling is None:
    return omega
  if scaling.kind == "linear":
    return omega / scaling.factor
  wavelength = 2 * math.pi / omega
  if wavelength > scaling.original_max_position / scaling.low_freq_factor:
    return omega / scaling.factor
  if wavelength < scaling.original_max_position / scaling.high_freq_factor:
    return omega
  smooth = (scaling.original_max_position / wavelength - scaling.low_freq_factor) / (
    scaling.high_freq_factor - scaling.low_freq_factor
  )
  return (1 - smooth) * omega / scaling.factor + smooth * omega


def rotate(config: ModelConfig, x_D: np.ndarray, position: int) -> np.ndarray:
  half = config.head_dim // 2
  out_D = np.empty_like(x_D)
  for c in range(half):
    cos = math.cos(position * frequency(config, c))
    sin = math.sin(position * frequency(config, c))
    out_D[c] = x_D[c] * cos - x_D[c + half] * sin
    out_D[c + half] = x_D[c] * sin + x_D[c + half] * cos
  return out_D


def norm(config: ModelConfig, x_E: np.ndarray, scale_E: np.ndarray) -> np.ndarray:
  return x_E / math.sqrt((x_E**2).mean() + config.norm_eps) * scale_E


def attention(config: ModelConfig, weights: dict, x_LxE: np.ndarray) -> np.ndarray:
  out_LxE = np.zeros_like(x_LxE)
  for h in range(config.num_heads):
    n = h // (config.num_heads // config.num_kv_heads)
    q = [rotate(config, x @ weights["query"][:, h], i) for i, x in enumerate(x_LxE)]
    k = [rotate(config, x @ weights["key"][:, n], i) for i, x in enumerate(x_LxE)]
    v = [x @ weights["value"][:, n] for x in x_LxE]
    for i in range(len(x_LxE)):
      w = np.exp([q[i] @ k[j] / math.sqrt(config.head_dim) for j in range(i + 1)])
      mixed = sum(w[j] / w.sum() * v[j] for j in range(i + 1))
      out_LxE[i] += mixed @ weights["out"][h]
  return out_LxE


def mlp(weights: dict, x_E: np.ndarray) -> np.ndarray:
  gate_F = x_E @ weights["gate"]
  return (gate_F / (1 + np.exp(-gate_F)) * (x_E @ weights["up"])) @ weights["down"]


def numpy_logits(model: Decoder, tokens_L: np.ndarray) -> np.ndarray:
  config = model.config
  params = jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(model)))
  x_LxE = params["embedding"][tokens_L]
  for i in range(config.num_layers):
    layer = jax.tree.map(lambda stacked, i=i: stacked[i], params["layers"])
    normed = np.stack([norm(config, x, layer["attention_norm"]["scale"]) for x in x_LxE])
    x_LxE = x_LxE + attention(config, layer["attention"], normed)
    normed = [norm(config, x, layer["mlp_norm"]["scale"]) for x in x_LxE]
    x_LxE = x_LxE + np.stack([mlp(layer["mlp"], x) for x in normed])
  states_LxE = np.stack([norm(config, x, params["norm"]["scale"]) for x in x_LxE])
  table_ExV = params["embedding"].T if config.tie_embeddings else params["unembedding"]
  return states_LxE @ table_ExV


@pytest.mark.parametrize(
  "changes",
  [
    {"tie_embeddings": True},
    {"tie_embeddings": False, "rope_scaling": LINEAR, "num_kv_heads": 1},
    {"tie_embeddings": True, "rope_scaling": LLAMA3, "num_kv_heads": 4, "rope_base": 5000.0},
    {"tie_embeddings": False, "norm_eps": 0.1},
  ],
)
def test_logits_equal_numpy(changes: dict) -> None:
  model = random_decoder(dataclasses.replace(CONFIG, **changes))
  tokens_BxL = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 11))
  logits_BxLxV = forward(model, tokens_BxL)
  assert logits_BxLxV.dtype == jnp.float32
  for tokens_L, logits_LxV in zip(tokens_BxL, logits_BxLxV, strict=True):
    np.testing.assert_allclose(logits_LxV, numpy_logits(model, tokens_L), atol=3e-5)


def test_packed_documents_equal_separate_documents() -> None:
  model = random_decoder(CONFIG)
  tokens_BxL = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (1, 14))
  # The second run of id 7 is a new document. The last two tokens are padding.
  segment_ids_BxL = np.array([[7] * 5 + [3] * 3 + [7] * 4 + [-1] * 2])
  logits_LxV = forward(model, tokens_BxL, segment_ids=segment_ids_BxL)[0]
  for start, stop in [(0, 5), (5, 8), (8, 12)]:
    alone_LxV = numpy_logits(model, tokens_BxL[0, start:stop])
    np.testing.assert_allclose(logits_LxV[start:stop], alone_LxV, atol=3e-5)
  assert np.isfinite(logits_LxV).all()


def test_padded_rows_equal_separate_rows() -> None:
  model = random_decoder(CONFIG)
  tokens_BxL = np.random.default_rng(2).integers(0, CONFIG.vocab_size, (3, 9))
  lengths_B = np.array([9, 1, 4])
  logits_BxLxV = forward(model, tokens_BxL, lengths=lengths_B)
  for row, length in enumerate(lengths_B):
    alone_LxV = numpy_logits(model, tokens_BxL[row, :length])
    np.testing.assert_allclose(logits_BxLxV[row, :length], alone_LxV, atol=3e-5)


def test_logits_are_the_unembedding_of_hidden_states() -> None:
  model = random_decoder(dataclasses.replace(CONFIG, dtype="bfloat16"))
  tokens_BxL = np.arange(12).reshape(2, 6)
  hidden_BxLxE = nnx.jit(Decoder.hidden)(model, tokens_BxL)
  assert hidden_BxLxE.dtype == jnp.bfloat16
  chunks = [model.unembed(hidden_BxLxE[:, start : start + 2]) for start in (0, 2, 4)]
  assert chunks[0].dtype == jnp.float32
  np.testing.assert_allclose(jnp.concatenate(chunks, axis=1), forward(model, tokens_BxL), atol=1e-6)


@pytest.mark.invalid_arguments
@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"tokens_BxL": np.zeros(5, int)}, r"tokens is int32\[5\].*int\[B, L\]"),
    ({"tokens_BxL": np.zeros((1, 5))}, r"tokens is float32\[1, 5\].*int"),
    ({"tokens_BxL": np.zeros((2, 0), int)}, r"tokens is \[2, 0\].*at least one"),
    ({"lengths": np.array([1, 2, 3])}, r"lengths is int64\[3\].*\[2\]"),
    ({"lengths": np.array([5, 6])}, r"lengths has values from 5 to 6.*0\.\.5"),
    ({"lengths": np.array([5, -1])}, r"lengths has values from -1 to 5"),
    ({"segment_ids": np.zeros((2, 4), int)}, r"segment_ids is int64\[2, 4\].*\[2, 5\]"),
    ({"segment_ids": np.zeros((2, 5))}, r"segment_ids is float64"),
  ],
)
def test_invalid_arguments_are_errors_with_the_name(arguments: dict, message: str) -> None:
  model = abstract_decoder(CONFIG)
  with pytest.raises(ValueError, match=message):
    model(**({"tokens_BxL": np.zeros((2, 5), int)} | arguments))


def test_unstacked_layers_compute_the_same():
  """Covers prefill, a decode step, and extend."""
  dga = DGAConfig(selection="streaming", group_size=3, sink_tokens=1)
  model = random_decoder(dataclasses.replace(CONFIG, attention="dga", dga=dga))
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 16)))

  @nnx.jit
  def run(model: Decoder):
    first, cache = model.prefill(tokens[:, :9], max_length=20)
    second, cache = model.decode(tokens[:, 9], cache)
    third, cache = model.extend(tokens[:, 10:], cache, jnp.array([6, 3]))
    return first, second, third, cache

  chex.assert_trees_all_close(run(model.unstack_layers()), run(model), atol=1e-5)


def test_a_gpu_decodes_with_one_kernel_for_each_sum_and_its_norm():
  model = random_decoder(CONFIG).unstack_layers()
  cache = model.init_cache(2, 16)
  with dispatch.collect_reports(Target("gpu", "NVIDIA H100", 9.0, 132)) as reports:
    jax.eval_shape(nnx.jit(Decoder.decode), model, jnp.zeros(2, jnp.int32), cache)
  norms = [report.chosen for report in reports if report.op == "rms_norm"]
  assert norms == ["triton"] * 4  # Two kinds of layers are traced: the first has no update.
