"""Measurements: what a rise is, continuing after a kill, files of other settings."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dga_jax.calibration.measuring import as_json, HeadRises, Measurer, open_results
from dga_jax.calibration.profile import fill_tail, find_bulk, measure_profile, rise_of
from dga_jax.calibration.program import Measured
from dga_jax.calibration.rows import Batch
from dga_jax.evaluation.results import Results
from dga_jax.head_budgets import FULL, SinkWindow
from tests.dga_jax.calibration import small

ALL = np.ones((*small.SHAPE, len(small.CANDIDATES)), bool)
FULL_HEADS = np.zeros(small.SHAPE, int)


def measurer(path: Path) -> Measurer:
  return Measurer(small.decoder(), small.CANDIDATES, Results(path), batch_size=2)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HeadRises]:
  path = tmp_path_factory.mktemp("measured") / "heads.jsonl"
  return path, measurer(path).measure_heads(small.rows(), ALL, FULL_HEADS)


def test_a_rise_is_the_difference_of_two_sets(
  measured: tuple[Path, HeadRises], tmp_path: Path
) -> None:
  rises = measured[1]
  rows, own = small.rows(), measurer(tmp_path / "sets.jsonl")
  dense = own.measure_set(rows, small.CANDIDATES, np.zeros(small.SHAPE, int))
  for layer, head, candidate in [(0, 0, 1), (1, 1, 2), (2, 0, 1)]:
    assignment = np.zeros(small.SHAPE, int)
    assignment[layer, head] = candidate
    alone = own.measure_set(rows, small.CANDIDATES, assignment)
    for name in ("text", "retrieval"):
      rise = getattr(alone.divergence, name)
      assert getattr(rises, name)[layer, head, candidate] == pytest.approx(rise, abs=1e-6)
      assert abs(rise) > 1e-5
  assert dense.divergence == (0, 0)
  assert not rises.text[..., 0].any()
  assert not rises.retrieval[..., 0].any()


def test_a_rise_beside_a_set_is_the_difference_of_two_sets(tmp_path: Path) -> None:
  rows, own = small.rows(), measurer(tmp_path / "sets.jsonl")
  window = SinkWindow(20, sinks=2)
  own.add_candidates([window, small.STREAMING])
  assert own.candidates == (*small.CANDIDATES, window)
  base = np.array([[3, 0], [2, 3], [0, 3]])
  wanted = np.zeros((*small.SHAPE, 4), bool)
  wanted[0, 0, 1] = wanted[2, 1, 0] = True
  rises = own.measure_heads(rows, wanted, base)
  whole = own.measure_set(rows, own.candidates, base)
  for layer, head, candidate in [(0, 0, 1), (2, 1, 0)]:
    assignment = base.copy()
    assignment[layer, head] = candidate
    changed = own.measure_set(rows, own.candidates, assignment)
    for name in ("text", "retrieval"):
      rise = getattr(changed.divergence, name) - getattr(whole.divergence, name)
      assert getattr(rises, name)[layer, head, candidate] == pytest.approx(rise, abs=1e-6)
  assert np.isfinite(rises.text).sum() == base.size + 2
  assert not np.take_along_axis(rises.text, base[..., None], axis=-1).any()


def test_the_loss_rises_in_place_of_the_divergence(
  measured: tuple[Path, HeadRises], tmp_path: Path
) -> None:
  path = tmp_path / "heads.jsonl"
  path.write_text(measured[0].read_text())
  rows = small.rows()
  own = Measurer(small.decoder(), small.CANDIDATES, Results(path), 2, "loss")
  before = path.read_text().count('"head ')
  rises = own.measure_heads(rows, ALL, FULL_HEADS)
  assert path.read_text().count('"head ') == before  # The file has both.
  dense = own.measure_set(rows, small.CANDIDATES, FULL_HEADS)
  assignment = FULL_HEADS.copy()
  assignment[1, 1] = 2
  alone = own.measure_set(rows, small.CANDIDATES, assignment)
  whole = own.rise_of_set(rows, small.CANDIDATES, assignment)
  for name in ("text", "retrieval"):
    rise = getattr(alone, name) - getattr(dense, name)
    assert getattr(whole, name) == rise != getattr(alone.divergence, name)
    assert getattr(rises, name)[1, 1, 2] == pytest.approx(rise, abs=1e-6)


def test_equal_sets_are_measured_once(tmp_path: Path) -> None:
  path = tmp_path / "sets.jsonl"
  rows, own = small.rows(), measurer(path)
  base = np.array([[1, 0], [1, 1], [0, 0]])
  want = own.measure_set(rows, small.CANDIDATES, base)
  lines = path.read_text()
  assert own.measure_set(rows, (small.STREAMING, FULL), 1 - base) == want
  own.add_candidates([SinkWindow(3)])
  assert own.measure_set(rows, small.CANDIDATES, base) == want
  assert path.read_text() == lines


def test_rises_are_interpolated_by_keys_within_a_kind() -> None:
  window = SinkWindow(28, sinks=2)
  candidates = (*small.CANDIDATES, window)
  rise = np.array([[[0.0, 5.0, 7.0, 4.0]]])
  assert rise_of(window, candidates, rise, 100) == 4
  assert rise_of(SinkWindow(63, sinks=2), candidates, rise, 100) == pytest.approx(2)
  assert rise_of(SinkWindow(10), candidates, rise, 100) == 4
  many = dataclasses.replace(small.STREAMING, local_window=2)
  assert 0 < rise_of(many, candidates, rise, 100)[0, 0] < 5


def test_the_loss_is_the_mean_over_all_rows(tmp_path: Path) -> None:
  rows, model = small.rows(), small.decoder()  # Three rows of text, in batches of two.
  dense = measurer(tmp_path / "sets.jsonl").measure_set(
    rows, small.CANDIDATES, np.zeros(small.SHAPE, int)
  )
  log_p = jax.nn.log_softmax(jax.jit(model)(rows.text.tokens), axis=-1)
  half = small.LENGTH // 2
  nats = -np.take_along_axis(np.asarray(log_p)[:, half:], rows.text.target[..., None], axis=-1)
  assert dense.text == pytest.approx(nats.mean(), rel=1e-5)
  assert dense.questions == 2


def test_a_killed_run_continues(measured: tuple[Path, HeadRises], tmp_path: Path) -> None:
  path, rises = measured
  lines = path.read_text().splitlines()
  stopped = tmp_path / "stopped.jsonl"
  stopped.write_text("\n".join([*lines[:20], lines[20][:30]]))  # The last line is half a line.
  own, ticks = measurer(stopped), []
  rows = small.rows()
  missing = own.missing(rows, ALL, FULL_HEADS)
  again = own.measure_heads(rows, ALL, FULL_HEADS, lambda: ticks.append(1))
  assert len(ticks) == missing == len(lines) - 20
  assert own.missing(rows, ALL, FULL_HEADS) == 0
  for one, other in zip(rises, again, strict=True):
    np.testing.assert_array_equal(one, other)
  assert sorted(stopped.read_text().splitlines()) == sorted(lines)


def test_a_file_of_other_settings_is_refused(tmp_path: Path) -> None:
  path = tmp_path / "budgets.measured.jsonl"
  settings = {"length": 64, "puzzles": ("passkey",)}
  open_results(path, settings).add("head", {"loss": [1.0]})
  assert "head" in open_results(path, settings)
  with pytest.raises(ValueError, match=r"length=64, and this run has length=128: repeat"):
    open_results(path, settings | {"length": 128})
  with pytest.raises(ValueError, match=r"puzzles=\['passkey'\]"):
    open_results(path, settings | {"puzzles": ("needle",)})
  with pytest.raises(ValueError, match=r"was measured with samples=None"):
    open_results(path, settings | {"samples": 3})
  other = tmp_path / "other.jsonl"
  other.write_text(json.dumps({"key": "perplexity", "loss": 1}) + "\n")
  with pytest.raises(ValueError, match="does not begin with what its results were measured with"):
    open_results(other, settings)


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_is_an_error(loss: float) -> None:
  zeros = np.zeros((2, 1), np.int32)
  batch = Batch(zeros, zeros, zeros, np.ones((2, 1), np.float32), zeros)
  measured = Measured(jnp.array([1.0, loss]), jnp.array([0.5, 0]), jnp.array([[True], [False]]))
  with pytest.raises(FloatingPointError, match="the loss is NaN or infinite"):
    as_json(measured, batch, 2)
  # The second row only fills the batch.
  assert as_json(measured, batch, 1) == {"loss": [1.0], "divergence": [0.5], "found": [[True]]}


def test_the_first_candidate_is_full(tmp_path: Path) -> None:
  with pytest.raises(ValueError, match=r"candidates\[0\] is DGAConfig"):
    Measurer(small.decoder(), small.CANDIDATES[1:], Results(tmp_path / "a.jsonl"), 1)


def test_without_a_tail_the_profile_is_every_measurement(
  measured: tuple[Path, HeadRises], tmp_path: Path
) -> None:
  path, rises = measured
  profile = measure_profile(measurer(path), small.rows(), 0.0)
  for one, other in zip(rises, profile, strict=True):
    np.testing.assert_array_equal(one, other)
  # Half of the rise in the tail: fewer measurements, and the same values where it was measured.
  short = tmp_path / "short.jsonl"
  tail = measure_profile(measurer(short), small.rows(), 0.5)
  assert len(short.read_text().splitlines()) < len(path.read_text().splitlines())
  bulk = find_bulk(rises, 0.5)
  assert 0 < bulk.sum() < bulk.size
  for one, other in zip(rises, tail, strict=True):
    np.testing.assert_array_equal(one[bulk], other[bulk])
    np.testing.assert_array_equal(one[..., -1], other[..., -1])
    assert np.isfinite(other).all()


def test_the_tail_is_estimated_by_the_ratio_of_the_measured_heads() -> None:
  nan = np.nan
  rise = np.array([[[0, 1.0, 4.0], [0, 2.0, 8.0], [0, nan, 0.4], [0, nan, -0.2]]])
  filled = fill_tail(HeadRises(rise, rise))
  np.testing.assert_allclose(filled.text[0, :, 1], [1, 2, 0.1, -0.05])
  np.testing.assert_array_equal(filled.text[..., 2], rise[..., 2])


def test_the_bulk_is_of_text_or_of_retrieval() -> None:
  text = np.array([[[0, 90.0], [0, 6.0], [0, 3.0], [0, 1.0]]])
  retrieval = np.array([[[0, 0.0], [0, -1.0], [0, 0.0], [0, 5.0]]])
  assert find_bulk(HeadRises(text, retrieval), 0.05).tolist() == [[True, True, False, True]]
  assert find_bulk(HeadRises(text, retrieval), 0.0).all()
