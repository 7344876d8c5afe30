"""Checkpoints of a run: WORKDIR/checkpoints/STEP, written and read with orbax.

A checkpoint holds these items, so that a reader takes only what it needs:

  params     the model's parameters, a plain nested dict of arrays
  training   everything else the trainer needs: optimizer state and step
  data       JSON: the position in the training data; imported models have none
  config     JSON: {"model": ModelConfig, ...the rest of the training config, or "origin": what an
             import knew of the model besides}
  tokenizer  JSON: what `dga_jax.tokenizer` needs to make the tokenizer again
  checksums  uint32 of params and of training

A step's folder gets its final name when everything in it is written, so a save that is killed or
runs out of disk never looks like a checkpoint. Damage done later is found by the checksums.

In a run of several processes all of them save and restore together, each its own shards, in a
folder that they share. Nothing in a checkpoint depends on how many they were.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import nnx
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from jaxtyping import Array, PyTree

from dga_jax.checksum import checksum
from dga_jax.model import Decoder, ModelConfig
from dga_jax.model.config import ATTENTION_SETTINGS
from dga_jax.sharding import parameter_shardings
from dga_jax.tokenizer import Tokenizer

# Fields of ModelConfig that may differ between training and use: they change how the parameters
# are used, not what they are.
_FREE_MODEL_FIELDS = frozenset(
  {"attention", *ATTENTION_SETTINGS, "dtype", "remat", "rope_base", "rope_scaling"}
)


# Read by every process as numbers, wherever the devices are that saved them.
_STORED_CHECKSUMS = ocp.args.StandardRestore(
  {name: np.zeros((), np.uint32) for name in ("params", "training")}
)


class CheckpointError(RuntimeError):
  """A checkpoint is missing, damaged, foreign or could not be written."""


class Checkpoints:
  """The checkpoints of one run, for the trainer: saves in the background, keeps the newest.

  Args:
    workdir: the run's folder; checkpoints lie in its subfolder `checkpoints`.
    keep: how many of the newest to keep. The one with the lowest held-out loss stays as well.
  """

  def __init__(self, workdir: str | Path, *, keep: int) -> None:
    self.directory = _checkpoint_directory(workdir)
    policies = ocp.checkpoint_managers
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(barrier_sync_fn=_wait_unless_failing),
        best_fn=lambda metrics: metrics["eval_loss"],
        best_mode="min",
        preservation_policy=policies.AnyPreservationPolicy(
          [
            policies.LatestN(keep),
            policies.BestN(
              get_metric_fn=lambda metrics: metrics["eval_loss"],
              reverse=True,
              n=1,
            ),
          ]
        ),
      ),
    )
    self._saving: int | None = None

  @property
  def latest_step(self) -> int | None:
    """The newest finished checkpoint's step, or None."""
    return self._manager.latest_step()

  def save(
    self,
    step: int,
    *,
    params: PyTree[Array],
    training: PyTree[Array],
    data: Mapping[str, Any] | None,
    config: Mapping[str, Any],
    tokenizer: Tokenizer,
    eval_loss: float | None = None,
  ) -> None:
    """Copies the state to the host and writes it in the background.

    The arrays may be donated as soon as this returns. `data` says where in the data training is,
    None for a model that was not trained here. `config` must have the entry "model".

    Raises:
      CheckpointError: this save, or the one before it, failed.
    """
    self.wait()
    self._saving = step
    items = {
      "params": ocp.args.StandardSave(params),
      "training": ocp.args.StandardSave(training),
      "config": ocp.args.JsonSave(dict(config)),
      "tokenizer": ocp.args.JsonSave(json.loads(tokenizer.to_json())),
      "checksums": ocp.args.StandardSave(
        {"params": checksum(params), "training": checksum(training)}
      ),
    }
    if data is not None:
      items["data"] = ocp.args.JsonSave(dict(data))
    # A checkpoint that was not evaluated is never the best.
    metrics = {"eval_loss": math.inf if eval_loss is None else eval_loss}
    try:
      arguments = ocp.args.Composite(**items)
      self._manager.save(step, args=arguments, metrics=metrics, force=True)
    except Exception as error:
      raise self._save_failed(error) from error

  def raise_if_failed(self) -> None:
    """Returns at once; raises CheckpointError if the save in the background has failed."""
    if self._saving is not None and not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Waits for the save in the background; raises CheckpointError if it failed."""
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise self._save_failed(error) from error
    self._saving = None

  def restore(
    self,
    step: int,
    *,
    params: PyTree[jax.ShapeDtypeStruct],
    training: PyTree[jax.ShapeDtypeStruct],
  ) -> tuple[PyTree[Array], PyTree[Array]]:
    """Reads a checkpoint's arrays, each process into its own shards.

    Args:
      step: which one.
      params: shapes, dtypes and shardings of the parameters.
      training: the same for the trainer's own state.

    Returns:
      (params, training).

    Raises:
      CheckpointError: it is damaged.
    """
    targets = {"params": params, "training": training}
    restored = _read_arrays(self.directory, step, targets)
    return restored["params"], restored["training"]

  def read_config(self, step: int) -> dict[str, Any]:
    """The config saved with a step."""
    return _read_json(self.directory, step, "config")

  def read_data(self, step: int) -> dict[str, Any]:
    """The position in the training data saved with a step."""
    return _read_json(self.directory, step, "data")

  def __enter__(self) -> Self:
    return self

  def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
    """Waits for the save in the background and closes; a failure raises unless something else did.

    After an error in one of several processes it does not wait: the save needs them all.
    """
    if exc_type is not None and jax.process_count() > 1:
      return
    for finish in (self.wait, self._manager.close):
      try:
        finish()
      except Exception as error:
        if exc_type is None:
          raise
        logging.error("%s", error)

  def _save_failed(self, error: Exception) -> CheckpointError:
    step, self._saving = self._saving, None
    steps = list_steps(self.directory.parent)
    intact = f"the checkpoint of step {steps[-1]} is intact" if steps else "there is no earlier one"
    others = " If another process has failed, its log says why." if jax.process_count() > 1 else ""
    return CheckpointError(
      f"Saving the checkpoint of step {step} in {self.directory} failed: {_first_line(error)} "
      f"Nothing of it counts as a checkpoint; {intact}.{others} Make room (or mend the disk) and "
      "start the same command again: it goes on from there."
    )


def _wait_unless_failing(*, key: str, timeout_ms: int) -> None:
  """The barrier of saves in the background; one that fails is not held up by it.

  Orbax has a process whose save failed wait for the others, which wait for its files.
  """
  if sys.exception() is None:
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def list_steps(workdir: str | Path) -> list[int]:
  """The steps of the finished checkpoints in a run's folder, ascending."""
  directory = _checkpoint_directory(workdir)
  if not directory.is_dir():
    return []
  found = ocp.path.step.standard_name_format().find_all(directory)
  return sorted(metadata.step for metadata in found)


def load_model(
  workdir: str | Path,
  step: int | None = None,
  *,
  config: ModelConfig | None = None,
  mesh: Mesh | None = None,
) -> tuple[Decoder, ModelConfig, Tokenizer]:
  """The trained decoder of a run.

  Args:
    workdir: the run's folder, the trainer's --workdir.
    step: which checkpoint; None for the newest.
    config: use the parameters with this config instead of the saved one, for example with another
      attention kind. What shapes or feeds the parameters must agree.
    mesh: spread the parameters over it; None takes the first device.

  Returns:
    (decoder, its config, the tokenizer it was trained with).

  Raises:
    CheckpointError: no checkpoint there, a damaged one, or one of another program.
    ValueError: `config` disagrees with the saved one in what shapes the parameters.
  """
  step = _existing_step(workdir, step)
  directory = _checkpoint_directory(workdir)
  saved = ModelConfig.from_dict(_read_json(directory, step, "config")["model"])
  if config is not None:
    _check_agreement(saved, config)
  config = config or saved
  tokenizer = _read_tokenizer(directory, step)
  graphdef, variables = abstract_decoder(config)
  shardings = () if mesh is None else (parameter_shardings(variables, mesh),)
  target = jax.tree.map(_target, nnx.to_pure_dict(variables), *shardings)
  params = _read_arrays(directory, step, {"params": target})["params"]
  return nnx.merge(graphdef, params), config, tokenizer


def load_config(workdir: str | Path, step: int | None = None) -> dict[str, Any]:
  """The config saved with a checkpoint, the newest by default: {"model": ..., ...}.

  Raises:
    CheckpointError: no checkpoint there, a damaged one, or one of another program.
  """
  return _read_json(_checkpoint_directory(workdir), _existing_step(workdir, step), "config")


def load_tokenizer(workdir: str | Path, step: int | None = None) -> Tokenizer:
  """The tokenizer saved with a checkpoint; arguments and errors as for `load_config`."""
  return _read_tokenizer(_checkpoint_directory(workdir), _existing_step(workdir, step))


def abstract_decoder(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
  """A decoder's structure, and the shapes and axis names of its parameters; computes nothing.

  `nnx.merge(structure, params)` with params as a nested dict of arrays is the decoder.
  """
  return nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))), nnx.Param)


def _checkpoint_directory(workdir: str | Path) -> Path:
  return Path(workdir).absolute() / "checkpoints"


def _existing_step(workdir: str | Path, step: int | None) -> int:
  steps = list_steps(workdir)
  if not steps:
    raise CheckpointError(
      f"There is no checkpoint in {_checkpoint_directory(workdir)}. Train one first: python -m "
      f"train.main --config=configs/quickstart.py --workdir={workdir}"
    )
  if step is not None and step not in steps:
    raise CheckpointError(f"There is no checkpoint of step {step} in {workdir}; there are {steps}.")
  return steps[-1] if step is None else step


def _check_agreement(saved: ModelConfig, given: ModelConfig) -> None:
  for field in dataclasses.fields(ModelConfig):
    was, wanted = getattr(saved, field.name), getattr(given, field.name)
    if field.name not in _FREE_MODEL_FIELDS and was != wanted:
      raise ValueError(
        f"config.{field.name} is {wanted!r}, but the checkpoint was trained with {was!r}; only "
        f"{sorted(_FREE_MODEL_FIELDS)} may differ."
      )


def _read(directory: Path, step: int, items: Mapping[str, ocp.args.CheckpointArgs]) -> Any:
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
    return reader.restore(directory / str(step), args=ocp.args.Composite(**items))


def _read_arrays(
  directory: Path, step: int, targets: Mapping[str, PyTree[jax.ShapeDtypeStruct]]
) -> dict[str, PyTree[Array]]:
  """Reads array items and compares them with their checksums."""
  items = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
  try:
    restored = _read(directory, step, items | {"checksums": _STORED_CHECKSUMS})
  except Exception as error:
    raise _damaged(directory, step, _first_line(error)) from error
  for name in targets:
    if int(checksum(restored[name])) != int(restored["checksums"][name]):
      raise _damaged(directory, step, f"the checksum of '{name}' does not fit its content.")
  return {name: restored[name] for name in targets}


def _target(array: Any, sharding: Sharding | None = None) -> jax.ShapeDtypeStruct:
  """What to read, by default onto this process's first device: what saved it may not be there."""
  sharding = sharding or SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _read_json(directory: Path, step: int, item: str) -> dict[str, Any]:
  path = directory / str(step)
  if not (path / item).is_dir():
    raise CheckpointError(
      f"{path} is not a checkpoint of this project: it has no item '{item}'. Name the --workdir "
      "of a run of train.main or of dga_jax.convert."
    )
  try:
    return _read(directory, step, {item: ocp.args.JsonRestore()})[item]
  except Exception as error:
    raise _damaged(directory, step, _first_line(error)) from error


def _read_tokenizer(directory: Path, step: int) -> Tokenizer:
  text = json.dumps(_read_json(directory, step, "tokenizer"))
  try:
    return Tokenizer.from_json(text)
  except ValueError as error:
    raise _damaged(directory, step, _first_line(error)) from error


def _damaged(directory: Path, step: int, reason: str) -> CheckpointError:
  """The error for a checkpoint that cannot be read, with the newest one that can."""
  path = directory / str(step)
  steps = list_steps(directory.parent)
  good = next((other for other in reversed(steps) if _is_sound(directory, other)), None)
  remedy = (
    "No other checkpoint there can be read."
    if good is None
    else f"The last good one is of step {good}: use it with --step={good}, or delete {path} and "
    "start the training again to go on from there."
  )
  return CheckpointError(f"The checkpoint {path} is damaged: {reason} {remedy}")


def _is_sound(directory: Path, step: int) -> bool:
  """Whether every item of a checkpoint can be read; only asked when another one is damaged."""
  items: dict[str, ocp.args.CheckpointArgs] = {
    name: ocp.args.JsonRestore() for name in ("config", "tokenizer")
  }
  items["checksums"] = _STORED_CHECKSUMS
  try:
    for name in ("params", "training"):
      with ocp.StandardCheckpointer() as reader:
        stored = reader.metadata(directory / str(step) / name).item_metadata.tree
      items[name] = ocp.args.StandardRestore(jax.tree.map(_target, stored))
    restored = _read(directory, step, items)
    return all(
      int(checksum(restored[name])) == int(restored["checksums"][name])
      for name in ("params", "training")
    )
  except Exception:
    return False


def _first_line(error: Exception) -> str:
  """An error's message without the file library's details; its end, too, says what happened."""
  line = (str(error).strip().splitlines() or [""])[0]
  if len(line) > 400:
    line = f"{line[:200]} ... {line[-200:]}"
  return f"{type(error).__name__}: {line}"
