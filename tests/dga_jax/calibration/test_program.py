"""The program of calibration equals the decoder, and one head's setting acts from its layer on."""

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dga_jax.attention.segments import find_documents
from dga_jax.calibration import program
from dga_jax.calibration.measuring import as_json
from dga_jax.calibration.program import AssignedDecoder
from dga_jax.calibration.rows import Batch
from dga_jax.head_budgets import FULL, SinkWindow
from dga_jax.model.attention_kinds.head_budgets import kind_of_setting
from dga_jax.model.rope import rope_table
from tests.dga_jax.calibration import small

EPSILON = np.finfo(np.float32).eps


@pytest.fixture(scope="module")
def decoder() -> AssignedDecoder:
  return AssignedDecoder(small.decoder(), small.CANDIDATES)


def run(decoder: AssignedDecoder, assignment: np.ndarray, first: int = 0, last: int = 3):
  x_BxLxE = decoder.embed(small.tokens()[:, :-1])
  if first:
    x_BxLxE = decoder.run_layers(x_BxLxE, np.zeros(small.SHAPE, int), 0, first)
  return np.asarray(decoder.run_layers(x_BxLxE, assignment, first, last))


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
  """Within rounding of the sums over a few hundred float32 terms in each of three layers."""
  bound = 200 * EPSILON * np.abs(expected).max()
  assert np.abs(actual - expected).max() <= bound


@pytest.mark.parametrize("index", range(len(small.CANDIDATES)))
def test_all_heads_under_one_candidate_are_the_decoder_under_it(
  decoder: AssignedDecoder, index: int
) -> None:
  candidate = small.CANDIDATES[index]
  changes = {"attention": "dga", "dga": candidate} if index else {"attention": "dense"}
  model = small.decoder()
  model.config = dataclasses.replace(small.CONFIG, **changes)
  expected = np.asarray(model.hidden(small.tokens()[:, :-1]))
  end = run(decoder, np.full(small.SHAPE, index))
  assert_close(np.asarray(model.norm(jnp.asarray(end))), expected)


def test_a_mixed_assignment_takes_every_head_from_its_candidate() -> None:
  model = small.decoder()
  longer = dataclasses.replace(small.STREAMING, local_window=3)
  candidates = (FULL, small.STREAMING, SinkWindow(9, sinks=2), longer, SinkWindow(40, sinks=0))
  model.config = dataclasses.replace(small.CONFIG, num_layers=2)
  for assignment in np.array([[[2, 1], [0, 2]], [[1, 3], [4, 2]]]):
    expected = reference(model, candidates, assignment)
    assert_close(run(AssignedDecoder(model, candidates), assignment, last=2), expected)


def reference(model: nnx.Module, candidates: tuple, assignment: np.ndarray) -> np.ndarray:
  """Layer by layer, and every KV head alone with its query heads."""
  tokens = small.tokens()[:, :-1]
  documents = find_documents(*tokens.shape, None, None)
  rope = rope_table(documents.position, small.CONFIG.rope_frequencies())
  structure, stacked = nnx.split(model.layers)

  @jax.jit
  def run_all(x_BxLxE: jax.Array) -> jax.Array:
    for layer in range(len(assignment)):
      x_BxLxE = run_one(layer, x_BxLxE)
    return x_BxLxE

  def run_one(layer: int, x_BxLxE: jax.Array) -> jax.Array:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, *_: jax.Array):
      heads = [
        kind_of_setting(candidates[index])(
          q[:, :, 2 * n : 2 * n + 2], k[:, :, n : n + 1], v[:, :, n : n + 1]
        )
        for n, index in enumerate(assignment[layer])
      ]
      return jnp.concatenate(heads, axis=2), None

    one = nnx.merge(structure, jax.tree.map(operator.itemgetter(layer), stacked))
    return one(x_BxLxE, rope, attend)[0]

  return np.asarray(run_all(model.embedding[...][tokens]))


@pytest.mark.parametrize(("layer", "head"), [(0, 1), (1, 0), (2, 1)])
def test_one_head_changes_nothing_before_its_layer(
  decoder: AssignedDecoder, layer: int, head: int
) -> None:
  full = np.zeros(small.SHAPE, int)
  one = full.copy()
  one[layer, head] = 2
  for last in range(layer + 1):
    np.testing.assert_array_equal(run(decoder, one, last=last), run(decoder, full, last=last))
  for last in range(layer + 1, 4):
    assert np.abs(run(decoder, one, last=last) - run(decoder, full, last=last)).max() > 1e-4
  # The dense state before the layer serves every head of the layer.
  np.testing.assert_array_equal(run(decoder, one, first=layer), run(decoder, one))


def test_one_program_serves_every_assignment(decoder: AssignedDecoder) -> None:
  run(decoder, np.zeros(small.SHAPE, int))
  compiled = program._run_layers._cache_size()
  run(decoder, np.array([[0, 1], [2, 0], [1, 1]]), first=1)
  run(decoder, np.full(small.SHAPE, 2), last=2)
  assert program._run_layers._cache_size() == compiled
  # Further windows change numbers alone.
  more = (*small.CANDIDATES, SinkWindow(50, 0), dataclasses.replace(small.SHORT, local_window=3))
  windows = AssignedDecoder(small.decoder(), more)
  run(windows, np.full(small.SHAPE, 3))
  compiled = program._run_layers._cache_size()
  run(AssignedDecoder(small.decoder(), (*more, SinkWindow(7, 0))), np.full(small.SHAPE, 5))
  assert program._run_layers._cache_size() == compiled


def test_settings_that_come_later_compile_nothing() -> None:
  first = AssignedDecoder(small.decoder(), small.CANDIDATES[:2], later=small.CANDIDATES[2:])
  first.compile([(2, small.LENGTH)])
  compiled = program._run_layers._cache_size()
  one = np.array([[0, 1], [0, 0], [1, 1]])
  before = run(first, one)
  second = AssignedDecoder(small.decoder(), small.CANDIDATES, later=small.CANDIDATES[2:])
  np.testing.assert_array_equal(run(second, one), before)
  run(second, np.full(small.SHAPE, 2))
  assert program._run_layers._cache_size() == compiled


def test_losses_and_divergences_are_means_over_the_targets(decoder: AssignedDecoder) -> None:
  model, tokens = small.decoder(), small.tokens()
  position = np.array([[3, 40, 191], [7, 8, 0]], np.int32)
  target = np.take_along_axis(tokens[:, 1:], position, axis=1)
  weight = np.array([[1 / 3] * 3, [0.5, 0.5, 0]], np.float32)
  question = np.array([[0, 1, 1], [0, 1, 0]], np.int32)
  batch = Batch(tokens[:, :-1], position, target, weight, question)
  full = np.zeros(small.SHAPE, int)
  dense, short = (
    decoder.target_states(jnp.asarray(run(decoder, set_)), batch) for set_ in (full, full + 2)
  )
  log_p, log_q = (
    np.asarray(jax.nn.log_softmax(model.unembed(states), axis=-1), float)
    for states in (dense, short)
  )
  whole = np.asarray(jax.nn.log_softmax(model(tokens[:, :-1]), axis=-1))
  np.testing.assert_allclose(log_p[0, 1], whole[0, 40], rtol=1e-4, atol=1e-4)
  measured = decoder.measure(short, dense, batch)
  nats = -np.take_along_axis(log_q, target[..., None], axis=-1)[..., 0]
  np.testing.assert_allclose(measured.loss, (nats * weight).sum(axis=1), rtol=1e-5)
  divergence = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
  assert divergence.max() > 0.1
  expected = (divergence * weight).sum(axis=1)
  np.testing.assert_allclose(measured.divergence, expected, rtol=1e-4, atol=1e-6)
  assert np.abs(decoder.measure(dense, dense, batch).divergence).max() == 0
  right = log_q.argmax(axis=-1)
  right[0, 2] += 1
  right[1, 2] += 1  # A target without weight need not be right.
  answered = as_json(decoder.measure(short, dense, batch._replace(target=right)), batch, 2)
  assert answered["found"] == [[True, False], [True, True]]


def test_padding_after_the_targets_has_no_influence(decoder: AssignedDecoder) -> None:
  (_, batch), *_ = small.rows().retrieval.batches(2)
  last = int(batch.position.max())
  batch = batch._replace(tokens=np.pad(batch.tokens, ((0, 0), (0, 8))))
  other = batch.tokens.copy()
  other[:, last + 1 :] = 65
  one = np.array([[1, 0], [2, 1], [0, 1]])
  a, b = (
    decoder.target_states(decoder.run_layers(decoder.embed(tokens), one, 0, 3), batch)
    for tokens in (batch.tokens, other)
  )
  np.testing.assert_array_equal(a, b)
