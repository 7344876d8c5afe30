"""metrics.jsonl across crashes and restarts, and its plots."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from train.metrics import MetricsWriter, read_metrics
from train.plots import plot_run, smooth


def write_steps(workdir: Path, first: int, last: int, *, last_step: int) -> None:
  with MetricsWriter(workdir, last_step=last_step) as metrics:
    for step in range(first, last + 1):
      metrics.write(step, {"loss": 1.0 / step})


def test_a_restart_removes_records_after_its_step(tmp_path: Path) -> None:
  write_steps(tmp_path, 1, 8, last_step=-1)
  write_steps(tmp_path, 6, 10, last_step=5)
  assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 11))


def test_a_new_run_starts_empty(tmp_path: Path) -> None:
  write_steps(tmp_path, 1, 3, last_step=-1)
  write_steps(tmp_path, 1, 2, last_step=-1)
  assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_truncated_line_is_removed(cut: int, tmp_path: Path) -> None:
  write_steps(tmp_path, 1, 3, last_step=-1)
  path = tmp_path / "metrics.jsonl"
  path.write_text(path.read_text()[:-cut])
  assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
  write_steps(tmp_path, 3, 4, last_step=2)
  assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_tensorboard_files_are_written(tmp_path: Path) -> None:
  write_steps(tmp_path, 1, 2, last_step=-1)
  (events,) = (tmp_path / "tensorboard").iterdir()
  assert b"loss" in events.read_bytes()


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=20), st.floats(0.5, 10))
def test_smoothed_values_stay_within_the_range_of_the_values(
  values: list[float], span: float
) -> None:
  smoothed = smooth(np.array(values), span)
  assert smoothed[0] == pytest.approx(values[0])
  for i, value in enumerate(smoothed):
    assert min(values[: i + 1]) - 1e-9 <= value <= max(values[: i + 1]) + 1e-9


def test_plots(tmp_path: Path) -> None:
  with MetricsWriter(tmp_path, last_step=-1) as metrics:
    for step in range(1, 21):
      metrics.write(step, {"loss": 5 / step})
      if step % 10 == 0:
        by_position = {"0": 5 / step, "16": 4 / step}
        metrics.write(step, {"eval_loss": 5 / step, "eval_loss_by_position": by_position})
  plot_run(tmp_path, title="a run")
  for name in ("loss.png", "loss_by_position.png"):
    pixels = np.asarray(Image.open(tmp_path / name).convert("RGB"))
    # The plot has blue and orange pixels, so its axes are not empty.
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_plots_before_the_first_evaluation(tmp_path: Path) -> None:
  write_steps(tmp_path, 1, 1, last_step=-1)
  plot_run(tmp_path, title="a run")
  assert (tmp_path / "loss.png").exists()
  assert not (tmp_path / "loss_by_position.png").exists()
