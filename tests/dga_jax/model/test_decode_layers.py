"""Layers for one token of each sequence equal whole layers, and run few kernels on a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dga_jax import DGAConfig
from dga_jax.model import Decoder, decoder, ModelConfig
from pallas_kernels.decode import products, triton_products, xla_products
from tests.dga_jax.model.random_decoder import random_decoder
from tests.pallas_kernels.h100 import lower_for_h100

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

CONFIG = ModelConfig(
  vocab_size=40,
  num_layers=2,
  embed_dim=64,
  num_heads=4,
  num_kv_heads=2,
  head_dim=32,
  mlp_dim=96,
  dtype="float32",
  dga=DGAConfig(selection="streaming", group_size=3),
)
KERNELS = ("normed_qkv", "add_product", "normed_swiglu")


def _decode_tokens(model: Decoder) -> np.ndarray:
  """Logits of six tokens of two sequences."""
  decode, cache, logits = nnx.jit(Decoder.decode), model.init_cache(2, 8), []
  for position in range(6):
    tokens_B = jnp.array([3, 17]) + position
    logits_BxV, cache = decode(model, tokens_B, cache)
    logits.append(np.asarray(logits_BxV))
  return np.stack(logits)


@pytest.mark.parametrize("backend", ["xla", "triton"])
@pytest.mark.parametrize("attention", ["dense", "dga"])
def test_decoding_equals_that_of_whole_layers(
  attention: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  model = random_decoder(dataclasses.replace(CONFIG, attention=attention)).unstack_layers()
  want = _decode_tokens(model)  # Whole layers, on a CPU.
  monkeypatch.setattr(decoder, "runs_decode_layers", lambda *_: True)
  for name in KERNELS:
    kernel = functools.partial(getattr(triton_products, f"{name}_triton"), interpret=True)
    plain = getattr(xla_products, f"{name}_xla")
    monkeypatch.setattr(products, name, kernel if backend == "triton" else plain)
  np.testing.assert_allclose(_decode_tokens(model), want, atol=2e-5)


def _lowered_decode(batch: int, **changes: bool | int) -> str:
  """A decode step of layers as wide as LLaMA2-7B's, lowered for an H100."""
  config = dataclasses.replace(CONFIG, **({"embed_dim": 4096} | changes))
  model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)).unstack_layers())
  graphdef, params = nnx.split(model)
  cache = jax.eval_shape(lambda p: nnx.merge(graphdef, p).init_cache(batch, 64), params)
  tokens_B = jax.ShapeDtypeStruct((batch,), jnp.int32)
  decode = lambda p, t, c: nnx.merge(graphdef, p).decode(t, c)  # noqa: E731
  return lower_for_h100(decode, params, tokens_B, cache)


def test_on_a_gpu_one_sequence_runs_the_kernels() -> None:
  text = _lowered_decode(1)
  assert all(f"decode_{name}" in text for name in KERNELS)
  # The only product and the only norm beside the kernels are those of the unembedding.
  assert text.count("stablehlo.dot_general") == 1
  assert text.count("stablehlo.rsqrt") == 1


@pytest.mark.parametrize(
  ("batch", "change"),
  [(1, {"qkv_bias": True}), (1, {"qk_norm": True}), (2, {}), (1, {"embed_dim": 64})],
)
def test_other_layers_and_batches_run_whole_layers(
  batch: int, change: dict[str, bool | int]
) -> None:
  text = _lowered_decode(batch, **change)
  assert not any(f"decode_{name}" in text for name in KERNELS)
