"""Losses over whole sequences, by decoding, and with a shorter context."""

import jax
import numpy as np
import pytest

from dga_jax.evaluation.losses import batches, decoded, fill, restarted, teacher_forced
from dga_jax.evaluation.perplexity import measure_perplexity, parts, PerplexitySettings, summarise
from dga_jax.evaluation.variants import Variant
from tests.dga_jax.evaluation.tiny import family

GLOBAL = Variant(
  "global", {"dga": {"group_size": 3, "importance_rate": 0.2, "min_focal_tokens": 0}}
)
ROWS = np.random.default_rng(0).integers(0, 257, (3, 49), dtype=np.int32)


def test_teacher_forced_loss_is_cross_entropy() -> None:
  models = family()
  graphdef = models.graphdef(Variant("v"), 48)
  loss = teacher_forced(graphdef, models.params, ROWS)
  logits = models.model(Variant("v"), 48)(ROWS[:, :-1])
  log_p = np.asarray(jax.nn.log_softmax(logits))
  expected = -np.take_along_axis(log_p, ROWS[:, 1:, None], axis=2)[..., 0]
  np.testing.assert_allclose(loss, expected, atol=1e-5)


@pytest.mark.parametrize("targets", [1, 20])
def test_decoding_gives_the_same_loss_for_causal_kinds(targets: int) -> None:
  models = family()
  graphdef = models.graphdef(Variant("v"), 48)
  loss = teacher_forced(graphdef, models.params, ROWS)
  np.testing.assert_allclose(
    decoded(graphdef, models.params, ROWS, targets), loss[:, -targets:], atol=3e-5
  )


def test_global_selection_is_reported_with_the_loss_of_decoding() -> None:
  models = family()
  settings = PerplexitySettings(batch_size=2, targets=20, contexts=(8,), always_decode=False)
  ticks = []
  result = measure_perplexity(models, GLOBAL, ROWS, settings, lambda: ticks.append(1))
  last = result["last"]
  assert last["measured_by_decoding"]
  assert last["largest_difference"] > 1e-3
  assert last["teacher_forced_loss"] != pytest.approx(last["decoded_loss"], abs=1e-4)
  assert len(ticks) == parts(models, GLOBAL, 48, len(ROWS), settings) == 6
  causal = measure_perplexity(models, Variant("v"), ROWS, settings)
  assert not causal["last"]["measured_by_decoding"]
  assert causal["last"]["largest_difference"] == 0


def test_restart_keeps_the_targets_and_cuts_the_context() -> None:
  short = restarted(ROWS, context=5, targets=4, start_ids=(256,))
  assert short.shape == (3, 1 + 5 + 4)
  np.testing.assert_array_equal(short[:, 1:], ROWS[:, -9:])
  assert (short[:, 0] == 256).all()
  np.testing.assert_array_equal(
    restarted(ROWS, context=44, targets=4, start_ids=(256,))[:, 1:], ROWS[:, 1:]
  )
  for context in (0, 45):
    with pytest.raises(ValueError, match=f"context is {context}; it must be from 1 to 44"):
      restarted(ROWS, context=context, targets=4, start_ids=(256,))


def test_the_restart_control_measures_the_last_tokens() -> None:
  """A window within the short context gives equal losses with and without the restart."""
  models = family()
  variant = Variant("v", {"attention": "sliding_window", "sliding_window": {"window": 1}})
  settings = PerplexitySettings(batch_size=3, targets=16, contexts=(8,))
  result = measure_perplexity(models, variant, ROWS, settings)
  assert result["restart"][0]["loss"] == pytest.approx(
    result["last"]["teacher_forced_loss"], abs=1e-4
  )


def test_a_restart_keeps_the_budget_of_whole_rows() -> None:
  """Half of 48 keys cover the 8 + 4 tokens, so the loss equals that of dense attention."""
  models, settings = family(), PerplexitySettings(batch_size=3, targets=4, contexts=(8,))
  half = Variant("half", {"attention": "streaming_llm"}, keys=0.5)
  dense = Variant("dense", {"attention": "dense"})
  windowed, whole = (measure_perplexity(models, v, ROWS, settings) for v in (half, dense))
  assert windowed["restart"][0]["loss"] == pytest.approx(whole["restart"][0]["loss"], abs=1e-5)
  assert abs(windowed["loss"] - whole["loss"]) > 1e-4


def test_summary() -> None:
  loss = np.array([[1.0, 2.0, 3.0, 6.0], [3.0, 4.0, 1.0, 0.0]])
  result = summarise(loss, buckets=2)
  assert result["loss"] == 2.5
  assert result["perplexity"] == pytest.approx(np.exp(2.5))
  assert result["standard_error"] == pytest.approx(0.5)  # The means of the rows are 3 and 2.
  assert result["by_position"] == [
    {"from": 0, "to": 2, "loss": 2.5, "standard_error": pytest.approx(1.0)},
    {"from": 2, "to": 4, "loss": 2.5, "standard_error": pytest.approx(2.0)},
  ]
  assert summarise(loss[:1], buckets=9)["standard_error"] is None


def test_the_last_batch_is_padded() -> None:
  parts_of = [fill(batch, 2).tolist() for batch in batches(np.arange(6).reshape(3, 2), 2)]
  assert parts_of == [[[0, 1], [2, 3]], [[4, 5], [4, 5]]]
