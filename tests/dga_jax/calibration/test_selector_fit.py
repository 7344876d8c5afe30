"""The fit of the selector: the rating of tokens, weights known by construction, errors."""

import dataclasses
import functools
import operator
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dga_jax import DGAConfig
from dga_jax.calibration.selector_fit import (
  attend_and_rate,
  beyond_window,
  fit_selector,
  FitBlocks,
  layer_samples,
  solve_ridge,
)
from dga_jax.calibration.selector_weights import with_selector
from dga_jax.checkpoint import load_model
from dga_jax.evaluation.texts import read_documents, token_rows
from dga_jax.model import Decoder, ModelConfig
from dga_jax.model.rope import rope_table
from tests.dga_jax.attention.cases import arrays, dense
from tests.dga_jax.evaluation import tiny
from tests.dga_jax.model.random_decoder import random_decoder

BLOCKS = DGAConfig(
  selection="streaming", group_size=6, focal_per_block=2, sink_tokens=2, local_window=1
)
CONFIG = ModelConfig(
  vocab_size=40,
  num_layers=2,
  embed_dim=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=24,
  rope_base=1e14,
  attention="dense",
  dtype="float32",
  qkv_bias=True,
)
LENGTH = 150  # More than one chunk of queries.


def constant_queries():
  """A decoder whose queries are constants in two channels that RoPE does not turn.

  The angle of the last of the 4 pairs of channels is 1e14^(-3/4) per position. So the logit of a
  token is the same for all queries, and the logarithm of its mean attention is this logit plus a
  number that the tokens of a block share. All values are equal, and so are their norms.
  """
  model = random_decoder(CONFIG)
  attention = model.layers.attention
  attention.query[...] = jnp.zeros_like(attention.query[...])
  attention.value[...] = jnp.zeros_like(attention.value[...])
  bias_KxHxD = np.zeros((2, 4, 8), np.float32)
  bias_KxHxD[:, :, [3, 7]] = np.random.default_rng(1).normal(size=(2, 2, 2)).repeat(2, axis=1) * 3
  attention.query_bias[...] = jnp.asarray(bias_KxHxD)
  return model, bias_KxHxD[:, ::2]


def tokens(rows=2):
  return np.random.default_rng(0).integers(0, 40, (rows, LENGTH)).astype(np.int32)


def test_the_weights_of_a_known_linear_rating_are_found():
  model, query_KxNxD = constant_queries()
  weights_KxNxS = fit_selector(model, BLOCKS, tokens(), ridge=1e-9)
  want = np.zeros((2, 2, 18))
  want[..., :8] = query_KxNxD / np.sqrt(8)
  np.testing.assert_allclose(weights_KxNxS, want, atol=2e-3)
  assert np.abs(want).max() > 0.5
  # With the default ridge the chosen tokens are the best up to rounding.
  ridged = fit_selector(model, BLOCKS, tokens())
  blocks = FitBlocks.of_row(LENGTH, BLOCKS)
  for layer, samples in enumerate(layer_samples(model, blocks, tokens()[0])):
    x_NxTxS, y_NxT = samples.centred(blocks)
    for n in range(2):
      scores, y = (z.reshape(-1, blocks.size) for z in (x_NxTxS[n] @ ridged[layer, n], y_NxT[n]))
      chosen = np.take_along_axis(y, np.argsort(scores, axis=1)[:, -2:], axis=1)
      np.testing.assert_allclose(
        chosen.sum(axis=1), np.sort(y, axis=1)[:, -2:].sum(axis=1), atol=0.01
      )


def test_the_target_is_attention_times_the_norm_of_the_value():
  """Values that follow the hidden state: targets differ from the logits by log ‖v‖."""
  model, query_KxNxD = constant_queries()
  value = np.random.default_rng(2).normal(size=model.layers.attention.value[...].shape)
  model.layers.attention.value[...] = jnp.asarray(value, jnp.float32)
  blocks = FitBlocks.of_row(LENGTH, BLOCKS)
  for layer, samples in enumerate(layer_samples(model, blocks, tokens()[0])):
    x_NxTxS, y_NxT = samples.centred(blocks)
    logit_NxT = np.einsum("nts,ns->nt", x_NxTxS[..., :8], query_KxNxD[layer]) / np.sqrt(8)
    norm_TxN = np.linalg.norm(np.asarray(samples.features)[..., 8:16], axis=-1)
    log_NxT = np.log(norm_TxN).T.reshape(2, blocks.blocks, blocks.size)
    log_NxT -= log_NxT.mean(axis=2, keepdims=True)
    np.testing.assert_allclose(y_NxT, logit_NxT + log_NxT.reshape(2, -1), atol=2e-3)
    assert np.abs(log_NxT).max() > 0.1


def test_the_fitted_model_scores_tokens_before_rope():
  """Its layers choose by w · features of the keys that they rotate afterwards."""
  model, _ = constant_queries()
  weights = fit_selector(model, BLOCKS, tokens())
  fitted = with_selector(model, BLOCKS, weights)
  assert fitted.config.dga == dataclasses.replace(BLOCKS, selector="fitted")
  assert (fitted.config.attention, fitted.config.focal_selector) == ("dga", True)
  blocks = FitBlocks.of_row(LENGTH, BLOCKS)
  inputs = next(layer_samples(model, blocks, tokens()[0])).features
  wanted = np.einsum("tns,ns->tn", inputs, weights[0])
  structure, stacked = nnx.split(fitted.layers)
  one = nnx.merge(structure, jax.tree.map(operator.itemgetter(0), stacked))
  x = fitted.embedding[...][tokens()[0]][None]
  seen = {}

  def attend(q, k, v, scores):
    seen["scores"] = scores
    return jnp.zeros_like(q), None

  one(x, rope_table(jnp.arange(LENGTH)[None], CONFIG.rope_frequencies()), attend)
  inside = slice(blocks.start, blocks.start + blocks.blocks * blocks.size)
  np.testing.assert_allclose(seen["scores"][0, inside], wanted, atol=1e-4)


def test_ratings_and_outputs_equal_dense_attention():
  q, k, v, _ = arrays(0, 1, LENGTH, 4, 2, 8)
  q = 30 * q  # Weights far below the least float32.
  blocks = FitBlocks.of_row(LENGTH, BLOCKS)
  first_L = beyond_window(LENGTH, blocks)
  out, rated = attend_and_rate(q, k, v, first_L)
  np.testing.assert_allclose(out, dense(q, k, v), atol=1e-4)
  wide = [np.asarray(x[0], np.float64) for x in (q, k)]
  for n in range(2):
    logits = np.einsum("ird,jd->rij", wide[0][:, 2 * n : 2 * n + 2], wide[1][:, n]) / np.sqrt(8)
    logits[:, np.triu(np.ones((LENGTH, LENGTH), bool), 1)] = -np.inf
    log_weights = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    for j in range(LENGTH):
      queries = log_weights[:, first_L[j] :, j].reshape(-1)
      want = (
        np.logaddexp.reduce(queries) - np.log(max(len(queries), 1)) if len(queries) else -np.inf
      )
      np.testing.assert_allclose(rated[0, j, n], want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("length", [19, 20, 26, 27, 150])
def test_the_blocks_of_the_fit_have_queries_beyond_their_window(length):
  blocks = FitBlocks.of_row(length, BLOCKS)
  first_L = beyond_window(length, blocks)
  for j in range(length):
    block = (j - 2) // 8
    beyond = [i for i in range(j, length) if (i - 2) // 8 > block + 1]
    assert first_L[j] == (beyond[0] if beyond else length)
    inside = j >= 2 and block < blocks.blocks
    assert inside == (j >= 2 and bool(beyond))


def test_ridge_is_a_share_of_the_mean_diagonal():
  gram, moment = np.diag([1.0, 3.0]), np.array([1.0, 6.0])
  np.testing.assert_allclose(solve_ridge(gram, moment, 0.5), [1 / 2, 6 / 4])
  assert not solve_ridge(0 * gram, moment, 0.5).any()


def test_the_command(tmp_path):
  """Its checkpoint has the weights of `fit_selector`, and decoding equals the whole sequence."""
  tiny.write_checkpoint(tmp_path / "run")
  documents = tiny.write_documents(tmp_path)
  command = [
    sys.executable, "-m", "dga_jax.fit_selector", f"--workdir={tmp_path / 'run'}", "--length=64",
    f"--documents={documents}", f"--output={tmp_path / 'fitted'}", "--rows_per_document=2",
  ]  # fmt: skip
  root = Path(__file__).parents[3]
  done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert done.stdout == f"{tmp_path}/fitted holds the model with its selector, fitted to 4 rows.\n"
  model, config, tokenizer = load_model(tmp_path / "fitted")
  assert config.dga == dataclasses.replace(tiny.CONFIG.dga, selector="fitted")
  dense, _, _ = load_model(tmp_path / "run")
  rows = token_rows(read_documents([documents]), tokenizer, 64, 2)[:, :-1]
  weights = fit_selector(dense, tiny.CONFIG.dga, rows)
  np.testing.assert_allclose(model.layers.attention.selector[...], weights, atol=1e-3)
  whole = model(rows[:1])
  _, cache = nnx.jit(functools.partial(Decoder.prefill, max_length=64))(model, rows[:1, :50])
  decode = nnx.jit(Decoder.decode)
  for t in range(50, 64):
    logits, cache = decode(model, rows[:1, t], cache)
    np.testing.assert_allclose(logits, whole[:, t], atol=1e-4)


def test_errors_name_the_remedy():
  with pytest.raises(ValueError, match=r"rows have 18 tokens.*more than 18.*longer rows"):
    FitBlocks.of_row(18, BLOCKS)
  with pytest.raises(ValueError, match=r"selection is 'global'.*must be 'streaming'"):
    FitBlocks.of_row(100, DGAConfig())
  with pytest.raises(ValueError, match=r"focal_selector is False.*fit_selector"):
    dataclasses.replace(CONFIG, attention="dga", dga=dataclasses.replace(BLOCKS, selector="fitted"))
