"""The folders of checkpoints: which there are, whether they are whole, and what is in them.

`dga_jax.checkpoint` describes their layout.
"""

import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from jaxtyping import Array, PyTree

from dga_jax import checkpoint_manifest
from dga_jax.checkpoint_manifest import Manifest
from dga_jax.files.paths import check_path, is_gcs
from dga_jax.files.storage import AnyPath, to_path

# An item that only checkpoints from before the manifest have.
_OLD_ITEM = "checksums"


class CheckpointError(RuntimeError):
  """A checkpoint is missing, damaged, foreign or could not be written."""


def checkpoint_directory(workdir: str | os.PathLike[str]) -> AnyPath:
  """The folder of a run's checkpoints; each has a subfolder named by its step.

  Raises:
    ValueError: `workdir` is an address, and not one of Google Cloud Storage.
  """
  check_path("workdir", workdir, allow_gcs=True)
  root = to_path(workdir) if is_gcs(workdir) else Path(workdir).absolute()
  return root / "checkpoints"


def list_steps(workdir: str | os.PathLike[str]) -> list[int]:
  """The steps of the finished checkpoints in a run's folder, ascending."""
  directory = checkpoint_directory(workdir)
  if not directory.is_dir():
    return []
  found = ocp.path.step.standard_name_format().find_all(directory)
  return sorted(metadata.step for metadata in found)


def drop_unreadable_notes(workdir: str | os.PathLike[str]) -> None:
  """Deletes orbax's own notes beside the items of a checkpoint where orbax cannot read them.

  Orbax reads the notes of every checkpoint before it saves the next one. Nothing else needs them,
  and no hash covers them.
  """
  for metadata in ocp.path.step.standard_name_format().find_all(checkpoint_directory(workdir)):
    try:
      metadata.commit_timestamp_nsecs  # noqa: B018 (orbax reads the file for it)
    except Exception as error:
      path = checkpoint_directory(workdir) / str(metadata.step) / "_CHECKPOINT_METADATA"
      logging.warning("Deleting %s, which orbax cannot read: %s", path, first_line(error))
      path.unlink(missing_ok=True)


def drop_unfinished(workdir: str | os.PathLike[str]) -> None:
  """Deletes what killed or failed saves have left; only the holder of the workdir's lock may.

  Orbax deletes it before the next save. Until then it takes the room of a checkpoint on the disk.
  In an object store an unfinished checkpoint has its final name, and orbax alone knows it.
  """
  directory = checkpoint_directory(workdir)
  if is_gcs(directory) or not directory.is_dir():
    return
  for path in directory.glob(f"*{checkpoint_manifest.TEMPORARY}*"):
    logging.info("Deleting %s, an unfinished checkpoint.", path)
    shutil.rmtree(path, ignore_errors=True)


def existing_step(workdir: str | os.PathLike[str], step: int | None) -> int:
  """The given step or the newest one; CheckpointError where there is no such checkpoint."""
  steps = list_steps(workdir)
  if not steps:
    raise CheckpointError(
      f"There is no checkpoint in {checkpoint_directory(workdir)}. Train one first: python -m "
      f"train.main --config=configs/quickstart.py --workdir={workdir}"
    )
  if step is not None and step not in steps:
    raise CheckpointError(f"There is no checkpoint of step {step} in {workdir}; there are {steps}.")
  return steps[-1] if step is None else step


def find_damage(
  workdir: str | os.PathLike[str],
  step: int,
  items: Collection[str] | None = None,
  *,
  share: tuple[int, int] = (0, 1),
) -> str | None:
  """Compares the files of a checkpoint with its manifest; it reads every byte of them.

  Args:
    workdir: the run's folder.
    step: which checkpoint.
    items: names of the items to compare; None compares all.
    share: (index, count) compares only every count-th file, so that `count` processes divide the
      work.

  Returns:
    A sentence that names the first difference, or None. For a checkpoint from before the manifest
    it is None, and a warning is logged.
  """
  folder = checkpoint_directory(workdir) / str(step)
  try:
    manifest = Manifest.read(folder)
  except FileNotFoundError:
    if not (folder / _OLD_ITEM).is_dir():
      return f"it has no {checkpoint_manifest.ITEM}/{checkpoint_manifest.FILE_NAME}."
    logging.warning(
      "%s was saved by a version without hashes of files: its content is not verified.", folder
    )
    return None
  except (OSError, ValueError) as error:
    return str(error)
  return manifest.find_damage(folder, items, share=share)


def check_items(workdir: str | os.PathLike[str], step: int, items: Collection[str]) -> None:
  """Raises CheckpointError unless the items of a checkpoint are there and as they were saved."""
  folder = checkpoint_directory(workdir) / str(step)
  if not any((folder / name).is_dir() for name in (checkpoint_manifest.ITEM, "config")):
    raise CheckpointError(
      f"{folder} is not a checkpoint of this project: it has no item 'config'. Name the --workdir "
      "of a run of train.main or of dga_jax.convert."
    )
  damage = find_damage(workdir, step, items)
  if damage is not None:
    raise damage_error(workdir, step, damage)


def last_good_step(workdir: str | os.PathLike[str], *, other_than: int) -> int | None:
  """The newest other checkpoint without damage, None where there is none; reads all their bytes."""
  others = (step for step in reversed(list_steps(workdir)) if step != other_than)
  return next((step for step in others if find_damage(workdir, step) is None), None)


def damage_error(workdir: str | os.PathLike[str], step: int, damage: str) -> CheckpointError:
  """The error for a damaged checkpoint; it names the newest whole one.

  Args:
    workdir: the run's folder.
    step: of the damaged checkpoint.
    damage: the sentence from `find_damage`.
  """
  return describe_damage(workdir, step, damage, last_good_step(workdir, other_than=step))


def describe_damage(
  workdir: str | os.PathLike[str], step: int, damage: str, last_good: int | None
) -> CheckpointError:
  """`damage_error` for a caller that knows the newest whole checkpoint, or that there is none."""
  path = checkpoint_directory(workdir) / str(step)
  remedy = (
    "No other checkpoint there is whole."
    if last_good is None
    else f"The last good one is of step {last_good}: use it with --step={last_good}, or move "
    f"{path} away."
  )
  return CheckpointError(f"The checkpoint {path} is damaged: {damage} {remedy}")


def set_aside(workdir: str | os.PathLike[str], step: int) -> AnyPath:
  """Renames a checkpoint so that it no longer counts as one; returns its new path.

  Raises:
    CheckpointError: the checkpoint is in an object store, which cannot rename a folder at once.
  """
  folder = checkpoint_directory(workdir) / str(step)
  if is_gcs(folder):
    raise CheckpointError(
      f"{folder} is newer than the checkpoint to resume from, and an object store cannot rename a "
      "folder at once. Move it to another prefix, then start the same command again."
    )
  number = 1
  while (path := folder.with_name(f"{step}.set_aside_{number}")).exists():
    number += 1
  return folder.rename(path)


def read_json(workdir: str | os.PathLike[str], step: int, item: str) -> dict[str, Any]:
  """A JSON item, compared with the manifest.

  Raises:
    CheckpointError: it is missing or damaged.
  """
  check_items(workdir, step, [item])
  try:
    values = _restore(workdir, step, {item: ocp.args.JsonRestore()})[item]
    if not isinstance(values, dict):
      raise ValueError(f"'{item}' is no JSON object.")
    return values
  except Exception as error:
    raise damage_error(workdir, step, first_line(error)) from error


def read_arrays(
  workdir: str | os.PathLike[str], step: int, targets: Mapping[str, PyTree[jax.ShapeDtypeStruct]]
) -> dict[str, PyTree[Array]]:
  """Array items, each process into its own shards; they are not compared with the manifest.

  Args:
    workdir: the run's folder.
    step: which checkpoint.
    targets: shapes, dtypes and shardings of the arrays by item.

  Raises:
    CheckpointError: they cannot be read.
  """
  items = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
  try:
    restored = _restore(workdir, step, items)
    return {name: restored[name] for name in targets}
  except Exception as error:
    raise damage_error(workdir, step, first_line(error)) from error


def first_line(error: Exception) -> str:
  """An error's kind and message without the details of the file library, in 400 characters."""
  line = (str(error).strip().splitlines() or [""])[0]
  if len(line) > 400:
    line = f"{line[:200]} ... {line[-200:]}"
  return f"{type(error).__name__}: {line}"


def _restore(
  workdir: str | os.PathLike[str], step: int, items: Mapping[str, ocp.args.CheckpointArgs]
) -> Mapping[str, Any]:
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
    folder = checkpoint_directory(workdir) / str(step)
    return reader.restore(folder, args=ocp.args.Composite(**items))


def read_eval_loss(workdir: str | os.PathLike[str], step: int) -> float | None:
  """The held-out loss at a checkpoint; None where it was not evaluated or cannot be read."""
  folder = checkpoint_directory(workdir) / str(step)
  try:
    return Manifest.read(folder).eval_loss
  except FileNotFoundError:
    return _read_old_eval_loss(folder)
  except (OSError, ValueError):
    return None


def _read_old_eval_loss(folder: AnyPath) -> float | None:
  """`read_eval_loss` of a checkpoint from before the manifest, in which infinity means none."""
  try:
    loss = json.loads((folder / "metrics" / "metrics").read_bytes())["eval_loss"]
    return loss if isinstance(loss, float) and loss < float("inf") else None
  except (KeyError, OSError, RecursionError, TypeError, ValueError):
    return None
