"""A file appears whole or not at all, and errors name it."""

import errno
import resource
from pathlib import Path

import pytest

from dga_jax.files.whole_file import check_writable, whole_file
from dga_jax.head_budgets import FULL, HeadBudgets, write_head_budgets


def test_a_file_replaces_the_earlier_one_at_the_end(tmp_path: Path) -> None:
  path = tmp_path / "new" / "file.txt"
  for text in ("one", "two"):
    with whole_file(path) as partial:
      partial.write_text(text)
      assert path.exists() == (text == "two")
    assert path.read_text() == text
  assert list(path.parent.iterdir()) == [path]


def test_after_an_error_the_earlier_file_is_left_alone(tmp_path: Path) -> None:
  path = tmp_path / "file.txt"
  path.write_text("one")
  for error in (ValueError("bad"), FileNotFoundError(errno.ENOENT, "No such file", "input.txt")):
    with pytest.raises(type(error), match=str(error.args[-1])):
      _write_and_raise(path, error)
  assert path.read_text() == "one"
  assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
  path = tmp_path / "budgets.json"
  budgets = HeadBudgets((FULL,), ((0, 0),))
  write_head_budgets(budgets, {}, path)
  before, limits = path.read_text(), resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
  try:
    with pytest.raises(OSError, match=r"File too large: '.*/budgets\.json'"):
      write_head_budgets(budgets, {"text": "x" * 2000}, path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert path.read_text() == before
  assert list(tmp_path.iterdir()) == [path]


def test_a_path_that_cannot_be_written_is_found_before(tmp_path: Path) -> None:
  path = tmp_path / "new" / "file.txt"
  check_writable(path)
  assert list(tmp_path.rglob("*")) == [path.parent]
  path.write_text("one")
  check_writable(path)
  assert path.read_text() == "one"
  with pytest.raises(IsADirectoryError, match="new"):
    check_writable(path.parent)
  with pytest.raises(OSError, match=r"file\.txt"):
    check_writable(path / "other.txt")


def _write_and_raise(path: Path, error: Exception) -> None:
  with whole_file(path) as partial:
    partial.write_text("two")
    raise error
