"""metrics.jsonl and TensorBoard files of a run."""

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.proto.summary_pb2 import Summary

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
  """Writes one JSON object a line to metrics.jsonl, and numbers to TensorBoard.

  A run that is taken up again at a step must not keep what was written after it: that is cut off
  when the writer is made, so every step is there once.

  Args:
    workdir: the run's folder.
    last_step: the step that the run goes on from; -1 for a new run.
  """

  def __init__(self, workdir: Path, *, last_step: int) -> None:
    path = workdir / FILE_NAME
    kept = [record for record in read_metrics(workdir) if record["step"] <= last_step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(_line(record) for record in kept))
    partial.replace(path)
    self._file = path.open("a")
    self._events = _EventFile(workdir / "tensorboard", first_step=last_step + 1)

  def write(self, step: int, values: Mapping[str, Any], *, tensorboard: bool = True) -> None:
    """Appends {"step": step, **values}; the line outlives the process, if not the machine.

    JSON has no numbers that are not finite: they are written as null.
    """
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
    self._file.close()
    self._events.close()


class _EventFile:
  """An event file of TensorBoard, written at once.

  tensorboardX's SummaryWriter leaves the writing to a thread, which dies on a full disk; its
  queue then fills up and blocks the training. Here the error is raised.
  """

  def __init__(self, folder: Path, *, first_step: int) -> None:
    folder.mkdir(exist_ok=True)
    self._writer = EventsWriter(str(folder / "events"), filename_suffix=f".{first_step}")
    # Events of these steps in the files of a process that was killed are void.
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
    with contextlib.suppress(OSError):  # Everything was flushed, or its error was raised before.
      self._writer.close()

  def _write(self, step: int, **content: Any) -> None:
    self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=step, **content))
    self._writer.flush()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
  """The records of a run's metrics.jsonl; a last line that was cut off is left out."""
  path = workdir / FILE_NAME
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]


def _line(record: Mapping[str, Any]) -> str:
  finite = {
    name: None if isinstance(value, float) and not math.isfinite(value) else value
    for name, value in record.items()
  }
  return json.dumps(finite, allow_nan=False) + "\n"
