"""The choices, the merge weights and the fitted forms that the selector's benchmark compares."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import _selector_program as program
from benchmarks._ratios import ratio_of_means
from benchmarks._selector_choices import accumulated, expected_attention, last_query, ranks
from benchmarks._selector_forms import (
  collect,
  fit_listwise,
  fit_ridge,
  Inputs,
  linear_form,
  score,
  shared_features,
  sizes,
)
from dga_jax import DGAConfig
from dga_jax.calibration.selector_fit import (
  fit_selector,
  FitBlocks,
  layer_samples,
  RIDGE,
  ridge_weights,
)
from dga_jax.calibration.selector_loss import LEARNING_RATE, STEPS
from dga_jax.calibration.selector_weights import with_selector
from dga_jax.model.rope import apply_rope, rope_table
from tests.dga_jax.attention.cases import arrays
from tests.dga_jax.evaluation import tiny
from tests.dga_jax.model.random_decoder import random_decoder

CONFIG = DGAConfig(
  selection="streaming", group_size=6, focal_per_block=2, sink_tokens=2, local_window=1,
  selector="fitted",
)  # fmt: skip
L, H, N, D = 43, 4, 2, 8
FREQUENCIES = 10.0 ** -np.arange(4)


def softmax(logits):
  weights = np.exp(logits - logits.max())
  return weights / weights.sum()


@pytest.mark.parametrize(("choice", "queries"), [(accumulated, 8), (last_query, 1)])
def test_attention_of_a_blocks_queries_token_by_token(choice, queries):
  q, k, _, _ = (np.asarray(x, np.float64) for x in arrays(0, 1, L, H, N, D))
  got = choice(*(jnp.asarray(x, jnp.float32) for x in (q, k)), CONFIG)
  want = np.zeros((L, N))
  for begin in range(2, L - 7, 8):
    for i in range(begin + 8 - queries, begin + 8):
      for h in range(H):
        seen = softmax(k[0, begin : i + 1, h // 2] @ q[0, i, h] / D**0.5)
        want[begin : i + 1, h // 2] += seen
  np.testing.assert_allclose(got[0], want, atol=1e-5)


def test_ranks_are_those_of_a_stable_sort():
  scores = np.random.default_rng(0).integers(0, 4, (1, L, N)).astype(np.float32)
  scores[0, 5] = -np.inf
  got = np.asarray(ranks(jnp.asarray(scores), CONFIG))[0]
  for begin in range(2, L - 7, 8):
    for n in range(N):
      order = sorted(range(8), key=lambda i: (scores[0, begin + i, n], -i))
      assert [order[int(rank)] for rank in got[begin : begin + 8, n]] == list(range(8))


def test_expected_attention_token_by_token():
  """Queries and keys are drawn before RoPE; statistics and rotations are in float64."""
  q, k, v, _ = (np.asarray(x, np.float64) for x in arrays(1, 1, L, H, N, D))
  table = rope_table(jnp.arange(L)[None], FREQUENCIES)
  rotated = [apply_rope(jnp.asarray(x, jnp.float32), table) for x in (q, k)]
  got = expected_attention(*rotated, jnp.asarray(v, jnp.float32), CONFIG, FREQUENCIES)
  want = np.zeros((L, N))
  for begin in range(2, L - 7, 8):
    block = range(begin, begin + 8)
    for h in range(H):
      queries = q[0, 2 : begin + 8, h]
      covariance = np.cov(queries, rowvar=False, bias=True)
      logits = []
      for j in block:
        # The mean rotation of the first 512 queries beyond the window, seen from the key.
        turn = np.exp(1j * (np.arange(begin + 16, begin + 528)[:, None] - j) * FREQUENCIES)
        pairs = (k[0, j, h // 2, :4] + 1j * k[0, j, h // 2, 4:]) * turn.mean(axis=0).conj()
        key = np.concatenate([pairs.real, pairs.imag])
        logits.append(key @ queries.mean(axis=0) / D**0.5 + key @ covariance @ key / (2 * D))
      want[block, h // 2] += softmax(np.array(logits))
    want[block] *= np.linalg.norm(v[0, block], axis=-1)
  np.testing.assert_allclose(got[0], want, atol=1e-4)


def test_member_weights_leave_out_the_focal_tokens():
  rng = np.random.default_rng(0)
  scores, logits = rng.normal(size=(2, 1, L, N)).astype(np.float32)
  weights = program.member_weights(jnp.asarray(scores), jnp.asarray(logits), CONFIG)[0]
  for g in range(5):
    for n in range(N):
      block = slice(2 + 8 * g, 10 + 8 * g)
      members = np.sort(np.argsort(scores[0, block, n])[:6])
      want = np.zeros(8)
      want[members] = softmax(logits[0, block, n][members])
      np.testing.assert_allclose(weights[g, :, n], want, atol=1e-6)


def row_and_models():
  """A row, the tiny model with dense attention, and the same model with a fitted selector."""
  config = dataclasses.replace(tiny.CONFIG, attention="dense", rope_base=1e4)
  base = random_decoder(config)
  row = np.random.default_rng(0).integers(0, 257, 61).astype(np.int32)
  weights = fit_selector(base, CONFIG, row[None, :-1])
  return row, base, with_selector(base, CONFIG, weights), weights


def test_the_program_runs_the_models_own_selectors():
  """Its losses equal those of the decoder; with equal logits the last query merges by the mean."""
  row, base, fitted, weights = row_and_models()
  S, U = sizes(base)
  assert weights.shape == (2, 2, S)
  form = linear_form(jnp.asarray(weights), jnp.zeros((2, 2, U)))
  options = ("choice", "merge", "config", "seed")
  run = jax.jit(program.second_half_loss, static_argnums=0, static_argnames=options)

  def loss(model, choice, merge):
    return float(
      run(*nnx.split(model), row, form, choice=choice, merge=merge, config=CONFIG, seed=0)
    )

  last = dataclasses.replace(CONFIG, selector="last_query")
  changed = dataclasses.replace(base.config, attention="dga", dga=last)
  models = {
    "dense": base,
    "form": fitted,
    "last_query": nnx.merge(nnx.graphdef(random_decoder(changed)), nnx.state(base)),
  }
  for choice, model in models.items():
    logs = jax.nn.log_softmax(nnx.jit(lambda m, t: m(t))(model, row[None, :-1])[0, 30:])
    want = -np.take_along_axis(np.asarray(logs), row[31:, None], axis=-1).mean()
    np.testing.assert_allclose(loss(base, choice, "query"), want, atol=1e-4)
  losses = [loss(base, "form", merge) for merge in program.MERGES]
  assert len(set(losses)) == 4
  base.layers.attention.query[...] = jnp.zeros_like(base.layers.attention.query[...])
  by_query, by_mean = (loss(base, "form", merge) for merge in ("query", "mean"))
  np.testing.assert_allclose(by_query, by_mean, atol=1e-6)


def test_collected_inputs_and_weights_are_those_of_the_fit():
  row, base, _, weights = row_and_models()
  graphdef, params = nnx.split(base)
  inputs = collect(graphdef, params, CONFIG, jnp.asarray(row[None, :-1]))
  blocks = FitBlocks.of_row(60, CONFIG)
  for layer, samples in enumerate(layer_samples(base, blocks, row[:-1])):
    own = np.moveaxis(np.asarray(samples.features), 1, 0).reshape(inputs.own[layer].shape)
    np.testing.assert_allclose(inputs.own[layer], own, rtol=1e-4, atol=1e-4)
    target = samples.target.T.reshape(inputs.target[layer].shape)
    np.testing.assert_allclose(inputs.target[layer] + inputs.value_size[layer], target, atol=1e-4)
    value = inputs.own[layer, ..., 8:16]
    distance = np.linalg.norm(value - value.mean(axis=2, keepdims=True), axis=-1)
    for found, size in (
      (inputs.value_size, np.linalg.norm(value, axis=-1)),
      (inputs.value_distance, distance),
    ):
      np.testing.assert_allclose(found[layer], np.log(size), atol=1e-4)
  inputs, none = (
    inputs._replace(target=inputs.target + inputs.value_size),
    jnp.zeros(sizes(base)[1]),
  )
  ridged = fit_ridge(inputs, none, jnp.float32(RIDGE))
  start = [ridge_weights([each], blocks, RIDGE) for each in layer_samples(base, blocks, row[:-1])]
  np.testing.assert_allclose(ridged.own, start, rtol=1e-2, atol=1e-2 * np.abs(start).max())
  options = {"mlp": False, "steps": STEPS, "learning_rate": LEARNING_RATE, "decay": 1e-4}
  listed = fit_listwise(ridged, inputs, none, **options)
  np.testing.assert_allclose(listed.own, weights, rtol=1e-2, atol=1e-2 * abs(weights).max())
  assert not ridged.shared.any()
  assert not listed.shared.any()
  normed = jnp.ones((1, 12, 3))
  shared = shared_features(normed, CONFIG)
  np.testing.assert_allclose(shared[0, 2:10, 3], np.arange(8) / 8)
  np.testing.assert_allclose(shared[0, 9], [1, 1, 1, 7 / 8, (7 / 8) ** 2, 0], atol=1e-6)


DEVIATION = np.array([[[1, 5, 0.2]]], np.float32)  # Of the own features.


def synthetic(target_of):
  """Inputs of one layer and head with 3 own and 2 shared features, 500 blocks of 4 tokens."""
  rng = np.random.default_rng(0)
  own = rng.normal(size=(1, 1, 500, 4, 3)).astype(np.float32) * DEVIATION[0, 0]
  shared = rng.normal(size=(1, 500, 4, 2)).astype(np.float32) + 1
  target = target_of(own, shared[:, None])
  return Inputs(*map(jnp.asarray, (own, shared, target, target, target)))


def test_fits_find_a_linear_score_and_use_only_their_features():
  weights = np.array([[[1, -0.2, 3]]], np.float32)

  def target(own, shared):
    return own @ weights[0, 0] + shared[..., 0] + 7

  inputs, none = synthetic(target), jnp.zeros((1, 1, 2))
  # A shared feature that the fit does not use is noise; 0.1 is four standard errors of a weight.
  for used, want, atol in (([1.0, 1.0], [[[1, 0]]], 1e-3), ([0.0, 1.0], [[[0, 0]]], 0.1)):
    ridged = fit_ridge(inputs, jnp.asarray(used), jnp.float32(1e-6))
    np.testing.assert_allclose(ridged.own * DEVIATION, weights * DEVIATION, atol=atol)
    np.testing.assert_allclose(ridged.shared, want, atol=atol)
    start = linear_form(jnp.zeros((1, 1, 3)), none)
    options = dict(mlp=False, steps=120, learning_rate=0.1, decay=0.0)
    listed = fit_listwise(start, inputs, jnp.asarray(used), **options)
    scale = np.asarray(listed.own)[0, 0, 0]  # Without a feature the scores shrink.
    np.testing.assert_allclose(listed.own / scale * DEVIATION, weights * DEVIATION, atol=0.1)
    np.testing.assert_allclose(listed.shared / scale, want, atol=0.1)


@pytest.mark.parametrize("shared_features", [0.0, 1.0])
def test_the_mlp_fits_what_a_linear_form_cannot(shared_features):
  """With and without shared features, which are noise."""
  inputs = synthetic(lambda own, shared: own[..., 0] ** 2 + abs(own[..., 1]))
  used = jnp.full(2, shared_features)
  start = linear_form(jnp.zeros((1, 1, 3)), jnp.zeros((1, 1, 2)))
  best = inputs.target.argmax(axis=-1)[0]
  right = []
  for mlp in (False, True):
    options = dict(mlp=mlp, steps=200, learning_rate=0.03, decay=0.0)
    form = jax.tree.map(lambda x: x[0], fit_listwise(start, inputs, used, **options))
    scores = score(form, inputs.own[0], inputs.shared[0])
    right.append(float((scores.argmax(axis=-1) == best).mean()))
  assert right[0] < 0.5
  assert right[1] > 0.8


def test_the_standard_error_of_a_ratio_is_its_spread():
  rng = np.random.default_rng(0)
  b = rng.normal(2, 0.5, (4000, 25))
  a = 0.6 * b + rng.normal(0, 0.3, b.shape)
  ratios, errors = np.array([ratio_of_means(*pair) for pair in zip(a, b, strict=True)]).T
  np.testing.assert_allclose(ratios.mean(), 0.6, atol=0.005)
  np.testing.assert_allclose(errors.mean(), ratios.std(), rtol=0.05)
  assert np.isnan(ratio_of_means(a[0, :1], b[0, :1])[1])


def test_the_command_measures_all_forms_and_resumes(tmp_path):
  tiny.write_checkpoint(tmp_path / "run")
  documents = tiny.write_documents(tmp_path)
  command = [
    sys.executable, "-m", "benchmarks.selector", f"--workdir={tmp_path / 'run'}", "--lengths=64",
    f"--documents={documents}", f"--fit_documents={documents}", f"--out={tmp_path / 'out.jsonl'}",
    "--settings=6+2:1", "--steps=5", "--texts=1",
    "--choices=last_query,oracle,fitted,expected/mean,mlp_hidden,ridge_distance",
  ]  # fmt: skip
  root = Path(__file__).parents[2]
  tables = []
  for _ in range(2):
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tables.append([line for line in done.stdout.splitlines() if " tokens 6+2 w=1 " in line])
  assert tables[0] == tables[1]
  assert len(tables[0]) == 6
  assert [float(line.split("|")[4].split()[0]) for line in tables[0][:2]] == [0, 1]
  assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 7
