"""Tests of quality against the share of the cache, in benchmarks/paper.py."""

import dataclasses
from pathlib import Path

import pytest

from benchmarks.paper_parts import shares
from benchmarks.paper_parts.inputs import Inputs
from dga_jax.cache import cache_size
from dga_jax.evaluation.jobs import run_jobs
from dga_jax.evaluation.results import Results
from dga_jax.head_budgets import FULL, HeadBudgets, SinkWindow
from tests.dga_jax.evaluation.tiny import STORY, write_checkpoint


@pytest.mark.parametrize("share", shares.SHARES)
def test_the_window_fills_the_share(share: float):
  config = shares.streaming(share, 8192)
  keys = cache_size(config=config, max_length=8192).total
  assert share * 8192 - 64 < keys <= share * 8192


def test_a_share_that_no_window_fits():
  with pytest.raises(ValueError, match="blocks of 62"):
    shares.streaming(0.01, 8192)


def test_every_share_and_file_of_budgets_is_measured_and_reported(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(shares, "_LENGTH", 256)
  settings = dataclasses.replace(shares._ROW, targets=32, contexts=(16,))
  monkeypatch.setattr(shares, "_ROW", settings)
  monkeypatch.setattr(shares, "SHARES", (0.75,))
  score = {task: {"score": 0.25} for tasks in shares._GROUPS.values() for task in tasks}
  passkey = {"passkey 256": {"hits": 1, "samples": 2}}
  monkeypatch.setattr(shares, "measure_recall", lambda *_: {"retrieval": passkey, "ruler": score})
  (tmp_path / "novels.txt").write_text(STORY * 30)
  budgets = HeadBudgets((FULL, SinkWindow(window=60)), ((1, 1), (1, 0)))
  (tmp_path / "quarter.json").write_text(budgets.to_json())
  inputs = Inputs(
    str(write_checkpoint(tmp_path / "run")),
    [str(tmp_path / "novels.txt")],
    budgets=[str(tmp_path / "quarter.json")],
  )
  results = Results(tmp_path / "paper.jsonl")
  assert run_jobs(list(shares.make_jobs(inputs)), results, origin="tiny") == 0
  measured = {one["variant"]: one["perplexity"]["budget"]["share"] for one in results.all()}
  assert measured["dense"] == 1
  assert measured["quarter"] == (3 * 64 + 256) / (4 * 256)
  assert 0.4 < measured["DGA 1/1"] <= 0.76
  table = shares.write(results.all(), tmp_path)
  assert "| dense | 100.0% | 1.000 | 100% | 25% | 25% | 25% | 1 of 2 |" in table
  assert (tmp_path / "shares.png").stat().st_size > 1000


def test_the_kept_gain_of_the_context():
  def result(near: float, decoded: float) -> dict:
    return {"perplexity": {"restart": [{"loss": near}], "last": {"decoded_loss": decoded}}}

  dense = result(3.5, 3.0)
  assert shares._kept_gain(dense, dense) == 1
  assert shares._kept_gain(result(9.0, 3.125), dense) == 0.75
  assert shares._kept_gain(result(9.0, 3.5), dense) == 0
