"""The command line prints one-line errors that name the wrong flag."""

from collections.abc import Callable
from pathlib import Path

import pytest

type RunTrainer = Callable[..., tuple[int, str]]


@pytest.mark.parametrize(
  ("override", "message"),
  [
    ("--config.learing_rate=1", "'config.learing_rate'. Did you mean 'config.learning_rate'?"),
    ("--config.model.dga.importance_rate=3", "config.model.dga.importance_rate is 3"),
    ("--config.num_steps=many", "config.num_steps=many: invalid literal"),
    ("--config.data.train_files=('missing-*.txt',)", "No file matches 'missing-*.txt'"),
    ("--config.model.rope_scaling.factor=2", "model.rope_scaling.factor can not be applied"),
  ],
)
def test_a_wrong_flag_is_a_one_line_error(
  override: str, message: str, run_trainer: RunTrainer, tmp_path: Path
) -> None:
  status, output = run_trainer(tmp_path, override)
  assert status != 0
  assert message in output
  assert "Traceback" not in output
