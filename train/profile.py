"""A profile of some steps, for TensorBoard or Perfetto."""

import dataclasses
import re
from typing import Any, Self

import jax
from absl import logging

from train.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class ProfiledSteps:
  """Attributes: the first and the last step to profile."""

  first: int
  last: int

  @classmethod
  def parse(cls, text: str) -> Self:
    """Reads "N:M", or "N" for a single step."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    first = int(match[1]) if match else 0
    last = int(match[2] or first) if match else 0
    if not 1 <= first <= last:
      raise ValueError(
        f"--profile is {text!r}; it must be N:M, the first and the last step, N <= M."
      )
    return cls(first, last)


class Profiler:
  """Profiles some steps, in every process.

  Args:
    files: the folder "profile" gets the profile; with several processes each has a subfolder.
    steps: which; None profiles nothing.
  """

  def __init__(self, files: RunFolder, steps: ProfiledSteps | None) -> None:
    several = jax.process_count() > 1
    subfolder = f"process_{jax.process_index()}" if several else ""
    self._files = files
    self._folder = files.local / "profile" / subfolder
    self._steps = steps
    self._is_running = False

  def before(self, step: int) -> None:
    """A step is about to be dispatched."""
    if self._steps is not None and step == self._steps.first:
      self._is_running = True
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # Every call in Python: far more than the steps themselves.
      jax.profiler.start_trace(self._folder, profiler_options=options)

  def after(self, step: int, result: Any) -> None:
    """The step was dispatched; `result` becomes available when it is done."""
    if self._is_running and self._steps is not None and step >= self._steps.last:
      jax.block_until_ready(result)
      self.close()

  def close(self) -> None:
    """Ends a running profile and writes it."""
    if self._is_running:
      self._is_running = False
      jax.profiler.stop_trace()
      folder = self._files.path_in_root(self._folder)
      logging.info("The profile is in %s: tensorboard --logdir=%s", folder, folder)
