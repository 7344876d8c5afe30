"""What a full disk leaves behind, and the file that the error names."""

import contextlib
import io
import logging as std_logging
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from absl import logging
from matplotlib.figure import Figure

from dga_jax.checkpoint_logs import hide_save_errors
from dga_jax.evaluation.results import Results
from dga_jax.files.figure import save_figure
from dga_jax.files.lock import hold_lock, LockedError


@contextlib.contextmanager
def disk_with(size: int) -> Iterator[None]:
  """No file can grow beyond `size` bytes."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_results_are_whole_lines(tmp_path: Path) -> None:
  path = tmp_path / "r.jsonl"
  results = Results(path)
  with disk_with(100), pytest.raises(OSError, match=r"File too large: '.*/r\.jsonl'"):
    results.add("long", {"text": "x" * 200})
  assert not path.exists()
  results.add("a", {"value": 1})
  before = path.read_text()
  with disk_with(100), pytest.raises(OSError, match=r"File too large: '.*/r\.jsonl'"):
    results.add("long", {"text": "x" * 200})
  assert path.read_text() == before
  assert "long" not in results
  results.add("b", {"value": 2})
  assert [one["key"] for one in Results(path).all()] == ["a", "b"]


def test_a_plot_is_whole(tmp_path: Path) -> None:
  path = tmp_path / "new" / "plot.png"
  figure = Figure(figsize=(3, 2))
  figure.suptitle("a$_b$", parse_math=False)
  with disk_with(500), pytest.raises(OSError, match=r"File too large: '.*/plot\.png'"):
    save_figure(figure, path)
  assert not list(path.parent.iterdir())
  save_figure(figure, path)
  assert path.read_bytes().startswith(b"\x89PNG")
  save_figure(figure, path.with_suffix(".svg"))
  assert b"<svg" in path.with_suffix(".svg").read_bytes()
  save_figure(figure, path.with_suffix(""))
  assert path.with_suffix("").read_bytes().startswith(b"\x89PNG")


def test_a_lock_holds_without_the_name_of_its_holder(tmp_path: Path) -> None:
  path = tmp_path / "lock"
  with disk_with(0), hold_lock(path):
    assert path.read_bytes() == b""
    with pytest.raises(LockedError, match="lock is locked by another process"), hold_lock(path):
      pass


def test_an_error_that_orbax_raises_is_not_logged_too(monkeypatch: pytest.MonkeyPatch) -> None:
  handler = std_logging.StreamHandler(io.StringIO())
  monkeypatch.setattr(logging, "get_absl_handler", lambda: handler)
  monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
  hide_save_errors()
  for path in ("/site-packages/orbax/future.py", "/dga_jax/checkpoint.py"):
    for level in (std_logging.WARNING, std_logging.ERROR):
      handler.handle(std_logging.LogRecord("absl", level, path, 1, f"{level} {path}", (), None))
  assert handler.stream.getvalue().splitlines() == [
    "30 /site-packages/orbax/future.py",
    "30 /dga_jax/checkpoint.py",
    "40 /dga_jax/checkpoint.py",
  ]
