"""metrics.jsonl and TensorBoard files of a run."""

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from absl import logging
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.proto.summary_pb2 import Summary

from dga_jax.files.named_errors import name_file
from dga_jax.files.whole_file import whole_file

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
  """Writes one JSON object a line to metrics.jsonl, and numbers to TensorBoard.

  When a run continues from a checkpoint, the records of later steps are removed, so that each step
  is there once. Lines that cannot be read are removed as well, with a warning for each.

  Args:
    workdir: the run's folder.
    last_step: the step that the run continues from; -1 for a new run.
  """

  def __init__(self, workdir: Path, *, last_step: int) -> None:
    path = workdir / FILE_NAME
    kept = [record for record in read_metrics(workdir) if record["step"] <= last_step]
    with whole_file(path) as partial:
      partial.write_text("".join(_line(record) for record in kept), encoding="utf-8")
    self._file = path.open("a", encoding="utf-8")
    self._events = _EventFile(workdir / "tensorboard", first_step=last_step + 1)

  def write(self, step: int, values: Mapping[str, Any], *, tensorboard: bool = True) -> None:
    """Appends {"step": step, **values}; a killed process loses no line, a power cut may.

    JSON has no infinity and no NaN: they are written as null.
    """
    with name_file(self._file.name):
      self._file.write(_line({"step": step, **values}))
      self._file.flush()
    if tensorboard:
      self._events.write(step, values)

  def sync(self) -> None:
    """Returns when everything written has reached the disk."""
    os.fsync(self._file.fileno())

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    with contextlib.suppress(OSError):  # `write` has flushed all lines, or raised the error.
      self._file.close()
    self._events.close()


class _EventFile:
  """An event file of TensorBoard, written without a thread.

  tensorboardX's SummaryWriter writes in a thread, which dies on a full disk; its queue then fills
  up and blocks the training. Here the error is raised.
  """

  def __init__(self, folder: Path, *, first_step: int) -> None:
    folder.mkdir(exist_ok=True)
    self._folder = folder
    self._writer = EventsWriter(str(folder / "events"), filename_suffix=f".{first_step}")
    # Cancels events of these steps in the files of a killed process.
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(first_step, session_log=start)

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    numbers = [
      Summary.Value(tag=name, simple_value=value)
      for name, value in values.items()
      if isinstance(value, (int, float))
    ]
    self._write(step, summary=Summary(value=numbers))

  def close(self) -> None:
    with contextlib.suppress(OSError):  # `_write` has flushed all events, or raised the error.
      self._writer.close()

  def _write(self, step: int, **content: Any) -> None:
    with name_file(self._folder):
      self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=step, **content))
      self._writer.flush()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
  """The records of a run's metrics.jsonl.

  A line that is no record, such as NUL characters after a power cut, is skipped with a warning that
  names it. A last line without its end is one that is being written: it is skipped.
  """
  path = workdir / FILE_NAME
  if not path.exists():
    return []
  records = []
  for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
    try:
      records.append(_parse(line))
    except ValueError as error:
      logging.warning("%s, line %d, is skipped: %s", path, number, error)
  return records


def _parse(line: bytes) -> dict[str, Any]:
  """A line's record; ValueError unless it is an object of numbers with a step."""
  try:
    record = json.loads(line)
  except (RecursionError, ValueError) as error:
    raise ValueError(f"it is no JSON ({error}).") from error
  if not isinstance(record, dict) or not isinstance(record.get("step"), int):
    raise ValueError('it has no integer "step".')
  for name, value in record.items():
    values = value.values() if isinstance(value, dict) else [value]
    if not all(isinstance(number, int | float | None) for number in values):
      raise ValueError(f'"{name}" is no number.')
  return record


def _line(record: Mapping[str, Any]) -> str:
  finite = {
    name: None if isinstance(value, float) and not math.isfinite(value) else value
    for name, value in record.items()
  }
  return json.dumps(finite, allow_nan=False) + "\n"
