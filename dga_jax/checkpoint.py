"""Checkpoints of a run: WORKDIR/checkpoints/STEP, written and read with orbax.

A checkpoint holds these items, and a reader reads only the items that it needs:

  params        the model's parameters, a nested dict of arrays
  training      the rest of the trainer's state: optimizer state, step, losses of good steps
  data          JSON: the position in the training data; an imported model has none
  config        JSON: {"model": ModelConfig, ...the rest of the training config, or "origin": what
                an import knows of the model besides}
  tokenizer     JSON: the arguments of `dga_jax.tokenizer`
  verification  the step, and a hash of every file of the other items (`checkpoint_manifest`)

A step's folder gets its final name after everything in it is written, so a save that is killed or
runs out of disk never looks like a checkpoint. Every reader compares the files of an item with
their hashes before it parses them.

In a run of several processes all processes save and restore together, each its own shards, in a
folder that they share. The content of a checkpoint does not depend on the number of processes.

Checkpoints of versions before the manifest have an item "checksums" in its place. They are read
with a warning, and their content is not verified.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from absl import logging
from flax import nnx
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from jaxtyping import Array, PyTree

from dga_jax import checkpoint_manifest
from dga_jax.checkpoint_files import (
  check_items,
  checkpoint_directory,
  CheckpointError,
  damage_error,
  drop_unfinished,
  drop_unreadable_notes,
  existing_step,
  first_line,
  list_steps,
  read_arrays,
  read_eval_loss,
  read_json,
)
from dga_jax.checkpoint_manifest import SaveManifest
from dga_jax.choices import WeightName
from dga_jax.model import Decoder, ModelConfig, quantize_weights
from dga_jax.model.config import ATTENTION_SETTINGS
from dga_jax.sharding import parameter_shardings
from dga_jax.tokenizer import Tokenizer

__all__ = [
  "CheckpointError",
  "Checkpoints",
  "abstract_decoder",
  "list_steps",
  "load_config",
  "load_model",
  "load_model_config",
  "load_tokenizer",
]

# Fields of ModelConfig that may differ between training and use: they change how the parameters
# are used, not what they are.
_FREE_MODEL_FIELDS = frozenset(
  {"attention", *ATTENTION_SETTINGS, "dtype", "remat", "rope_base", "rope_scaling", "unroll_layers"}
)


class Checkpoints:
  """The checkpoints of one run, for the trainer: saves in the background, keeps the newest.

  Args:
    workdir: the run's folder; its subfolder `checkpoints` holds the checkpoints.
    keep: how many of the newest to keep. The one with the lowest held-out loss stays as well.
  """

  def __init__(self, workdir: str | os.PathLike[str], *, keep: int) -> None:
    self._workdir = workdir
    self._policy = _NewestAndBest(workdir, keep)
    self._manager: ocp.CheckpointManager | None = None
    self._saving: int | None = None

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

    The arrays may be donated as soon as this returns. `data` is the position in the training data,
    None for a model that was not trained here. `config` must have the entry "model".

    Raises:
      CheckpointError: this save, or the one before it, failed.
    """
    self.wait()
    self._saving = step
    self._policy.losses[step] = eval_loss
    items = {
      "params": ocp.args.StandardSave(params),
      "training": ocp.args.StandardSave(training),
      "config": ocp.args.JsonSave(dict(config)),
      "tokenizer": ocp.args.JsonSave(json.loads(tokenizer.to_json())),
      checkpoint_manifest.ITEM: SaveManifest(step, eval_loss),
    }
    if data is not None:
      items["data"] = ocp.args.JsonSave(dict(data))
    try:
      if self._manager is None:
        self._manager = self._make_manager()
      self._manager.save(step, args=ocp.args.Composite(**items), force=True)
    except Exception as error:
      raise self._save_failed(error) from error

  def raise_if_failed(self) -> None:
    """Returns at once; raises CheckpointError if the save in the background has failed."""
    if self._manager is not None and not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Waits for the save in the background; raises CheckpointError if it failed."""
    if self._manager is None or self._saving is None:
      return
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

    The content is not compared with the manifest: call `find_damage` before.

    Args:
      step: which one.
      params: shapes, dtypes and shardings of the parameters.
      training: the same for the trainer's own state.

    Returns:
      (params, training).

    Raises:
      CheckpointError: it cannot be read.
    """
    restored = read_arrays(self._workdir, step, {"params": params, "training": training})
    return restored["params"], restored["training"]

  def read_config(self, step: int) -> dict[str, Any]:
    """The config saved with a step."""
    return read_json(self._workdir, step, "config")

  def has_data(self, step: int) -> bool:
    """Whether a position in the training data was saved with a step."""
    return (checkpoint_directory(self._workdir) / str(step) / "data").is_dir()

  def read_data(self, step: int) -> dict[str, Any]:
    """The position in the training data saved with a step."""
    return read_json(self._workdir, step, "data")

  def __enter__(self) -> Self:
    """Deletes what killed saves have left. The caller holds the workdir's lock."""
    if jax.process_index() == 0:
      drop_unfinished(self._workdir)
    return self

  def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
    """Waits for the save in the background and closes; a failure raises unless something else did.

    After an error in one of several processes it does not wait: the save needs them all.
    """
    if self._manager is None or (exc_type is not None and jax.process_count() > 1):
      return
    for finish in (self.wait, self._manager.close):
      try:
        finish()
      except Exception as error:
        if exc_type is None:
          raise
        logging.error("%s", error)

  def _make_manager(self) -> ocp.CheckpointManager:
    """Orbax's manager, which also deletes what a killed save has left."""
    directory = checkpoint_directory(self._workdir)
    if directory.is_dir():
      drop_unreadable_notes(self._workdir)
    return ocp.CheckpointManager(
      directory,
      options=ocp.CheckpointManagerOptions(
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(barrier_sync_fn=_wait_unless_failing),
        preservation_policy=self._policy,
      ),
    )

  def _save_failed(self, error: Exception) -> CheckpointError:
    step, self._saving = self._saving, None
    if jax.process_count() == 1:
      drop_unfinished(self._workdir)
    steps = list_steps(self._workdir)
    intact = f"the checkpoint of step {steps[-1]} is intact" if steps else "there is no earlier one"
    then = "the same command again" + (": it continues from that checkpoint." if steps else ".")
    remedy = "Make room or repair the disk, and start"
    if jax.process_count() > 1:
      remedy = f"If another process has failed, its log has the cause. {remedy}"
    if isinstance(error, jax.errors.JaxRuntimeError):  # Raised by the barrier of all processes.
      remedy = "Most likely another process is gone, and its log has the cause. Start"
    directory = checkpoint_directory(self._workdir)
    return CheckpointError(
      f"Saving the checkpoint of step {step} in {directory} failed: {first_line(error)} Nothing "
      f"of it counts as a checkpoint; {intact}. {remedy} {then}"
    )


class _NewestAndBest:
  """Orbax's rule of which checkpoints to keep: the newest, and the one with the lowest loss.

  Attributes:
    losses: held-out loss by step, None where a checkpoint was not evaluated.
  """

  def __init__(self, workdir: str | os.PathLike[str], keep: int) -> None:
    self._workdir = workdir
    self._keep = keep
    self.losses: dict[int, float | None] = {}

  def should_preserve(
    self,
    checkpoints: Sequence[ocp.checkpoint_managers.PolicyCheckpointInfo],
    *,
    context: ocp.checkpoint_managers.PreservationContext,
  ) -> list[bool]:
    """Whether to keep each of the checkpoints, which are in the order of their steps."""
    del context
    steps = [checkpoint.step for checkpoint in checkpoints]
    for step in steps:
      if step not in self.losses:
        self.losses[step] = read_eval_loss(self._workdir, step)
    losses = {step: loss for step in steps if (loss := self.losses[step]) is not None}
    kept = {*steps[-self._keep :], *([min(losses, key=losses.__getitem__)] if losses else [])}
    return [step in kept for step in steps]


def _wait_unless_failing(*, key: str, timeout_ms: int) -> None:
  """The barrier of saves in the background; a save that fails does not wait at it.

  Orbax has a process whose save failed wait for the others, which wait for its files.
  """
  if sys.exception() is None:
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def load_model(
  workdir: str | os.PathLike[str],
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
  step = existing_step(workdir, step)
  saved = load_model_config(workdir, step)
  if config is not None:
    _check_agreement(saved, config)
  config = config or saved
  tokenizer = load_tokenizer(workdir, step)
  graphdef, variables = abstract_decoder(config)
  shardings = () if mesh is None else (parameter_shardings(variables, mesh),)
  target = jax.tree.map(_target, nnx.to_pure_dict(variables), *shardings)
  check_items(workdir, step, ["params"])
  params = read_arrays(workdir, step, {"params": target})["params"]
  return nnx.merge(graphdef, params), config, tokenizer


def load_config(workdir: str | os.PathLike[str], step: int | None = None) -> dict[str, Any]:
  """The config saved with a checkpoint, the newest by default: {"model": ..., ...}.

  Raises:
    CheckpointError: no checkpoint there, a damaged one, or one of another program.
  """
  return read_json(workdir, existing_step(workdir, step), "config")


def load_model_config(workdir: str | os.PathLike[str], step: int | None = None) -> ModelConfig:
  """The model config saved with a checkpoint; arguments and errors as for `load_config`."""
  step = existing_step(workdir, step)
  values = load_config(workdir, step)
  try:
    return ModelConfig.from_dict(values["model"])
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    folder = checkpoint_directory(workdir) / str(step)
    raise CheckpointError(
      f"This version cannot use the model config of the checkpoint {folder}: {first_line(error)}"
    ) from error


def load_tokenizer(workdir: str | os.PathLike[str], step: int | None = None) -> Tokenizer:
  """The tokenizer saved with a checkpoint; arguments and errors as for `load_config`."""
  step = existing_step(workdir, step)
  text = json.dumps(read_json(workdir, step, "tokenizer"))
  try:
    return Tokenizer.from_json(text)
  except Exception as error:  # The tokenizers library raises errors of many kinds.
    raise damage_error(workdir, step, first_line(error)) from error


def abstract_decoder(
  config: ModelConfig, weights: WeightName | None = None
) -> tuple[nnx.GraphDef, nnx.State]:
  """A decoder's structure, and the shapes and axis names of its parameters; computes nothing.

  `nnx.merge(structure, params)` with params as a nested dict of arrays is the decoder.

  Args:
    config: of the decoder.
    weights: the dtype of weights in 8 bits, see `quantize_weights`; None for other weights.
  """

  def make() -> Decoder:
    model = Decoder(config, rngs=nnx.Rngs(0))
    return model if weights is None else quantize_weights(model, weights)

  return nnx.split(nnx.eval_shape(make), nnx.Param)


def _check_agreement(saved: ModelConfig, given: ModelConfig) -> None:
  for field in dataclasses.fields(ModelConfig):
    was, wanted = getattr(saved, field.name), getattr(given, field.name)
    if field.name not in _FREE_MODEL_FIELDS and was != wanted:
      raise ValueError(
        f"config.{field.name} is {wanted!r}, but the checkpoint was trained with {was!r}; only "
        f"{sorted(_FREE_MODEL_FIELDS)} may differ."
      )


def _target(array: Any, sharding: Sharding | None = None) -> jax.ShapeDtypeStruct:
  """What to read, by default onto this process's first device: what saved it may not be there."""
  sharding = sharding or SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
