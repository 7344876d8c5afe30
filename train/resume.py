"""Which checkpoint a run continues from, and its position in the run."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
from absl import logging

from dga_jax.checkpoint_files import (
  checkpoint_directory,
  CheckpointError,
  describe_damage,
  find_damage,
  list_steps,
  set_aside,
)
from dga_jax.files.storage import AnyPath
from train import multihost


@dataclasses.dataclass(frozen=True)
class Resume:
  """Which checkpoint of the run to continue from; by default the newest, which has to be whole.

  The newer ones are set aside: they are renamed and no longer count as checkpoints.

  Attributes:
    step: continue from this step.
    skip_damaged: where the newest checkpoint is damaged, continue from the newest whole one.
  """

  step: int | None = None
  skip_damaged: bool = False

  def __post_init__(self) -> None:
    if self.step is not None and self.skip_damaged:
      raise ValueError(
        f"--step is {self.step} and --skip_damaged is set; give --step to choose a checkpoint, or "
        "--skip_damaged for the newest whole one."
      )

  def to_dict(self) -> dict[str, Any]:
    """The flags by name."""
    return {f"--{name}": value for name, value in dataclasses.asdict(self).items()}


@dataclasses.dataclass(frozen=True)
class Position:
  """Where in its run a checkpoint is.

  Attributes:
    step: optimizer steps done, None for a run that begins.
    next_batch: number of the next batch in the run's order of batches. Every step takes one batch,
      a skipped step too, so it equals the steps done.
    skipped_in_row: bad steps in a row up to here.
  """

  step: int | None = None
  next_batch: int = 0
  skipped_in_row: int = 0

  @classmethod
  def from_dict(cls, values: Mapping[str, Any], workdir: AnyPath, step: int) -> Self:
    """The position in a checkpoint's item "data".

    Raises:
      CheckpointError: it is of another step.
    """
    position = cls(step, values.get("next_batch", -1), values.get("skipped_in_row", 0))
    if position.next_batch != step or not isinstance(position.skipped_in_row, int):
      path = checkpoint_directory(workdir) / str(step)
      raise CheckpointError(
        f"The position {dict(values)} in {path}/data is not that of step {step}. Continue from "
        "another checkpoint with --step."
      )
    return position

  def to_dict(self) -> dict[str, Any]:
    """The checkpoint's item "data"."""
    return {"next_batch": self.next_batch, "skipped_in_row": self.skipped_in_row}

  @property
  def steps_done(self) -> int:
    """Optimizer steps done; 0 for a run that begins."""
    return self.step or 0


def choose_checkpoint(workdir: AnyPath, resume: Resume) -> int | None:
  """The step to continue from, None for a new run; all processes call it and agree.

  The processes divide the reading of a checkpoint's files.

  Raises:
    CheckpointError: the checkpoint is missing or damaged.
  """
  steps = list_steps(workdir)
  multihost.check_agreement(
    {"the checkpoints": steps, "the workdir exists": workdir.is_dir()},
    "Give all of them the same --workdir, on a disk that they share.",
  )
  if resume.step is not None and resume.step not in steps:
    raise CheckpointError(
      f"There is no checkpoint of step {resume.step} in {workdir}; there are {steps}."
    )
  if not steps:
    return None
  step = steps[-1] if resume.step is None else resume.step
  damage = _find_damage(workdir, step)
  if damage is not None:
    others = (other for other in reversed(steps) if other != step)
    last_good = next((other for other in others if _find_damage(workdir, other) is None), None)
    error = describe_damage(workdir, step, damage, last_good)
    if last_good is None:
      raise error
    if not resume.skip_damaged:
      raise CheckpointError(f"{error} With --skip_damaged training continues from it by itself.")
    logging.warning("%s Continuing from step %d.", error, last_good)
    step = last_good
  for newer in steps[steps.index(step) + 1 :]:
    multihost.on_first_process(lambda: _set_aside(workdir, newer))  # noqa: B023 (called at once)
  return step


def _find_damage(workdir: AnyPath, step: int) -> str | None:
  share = (jax.process_index(), jax.process_count())
  found = multihost.gather_texts(find_damage(workdir, step, share=share) or "")
  return next((damage for damage in found if damage), None)


def _set_aside(workdir: AnyPath, step: int) -> None:
  path = set_aside(workdir, step)
  logging.warning("The newer checkpoint of step %d is set aside as %s.", step, path)
