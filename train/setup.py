"""Training from the config to the end: what a run starts from, and what remains when it fails."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging

from dga_jax.checkpoint import Checkpoints, list_steps
from dga_jax.tokenizer import Tokenizer
from train import multihost
from train.config import check_resumable, to_flat_dict, TrainConfig
from train.data.pipeline import Data, load_data
from train.errors import DivergenceError, TrainingError
from train.init_from import find_initial, ORIGIN
from train.metrics import MetricsWriter
from train.profile import ProfiledSteps, Profiler
from train.report import Reporter
from train.sharding import process_share
from train.step import Functions, make_functions
from train.train_loop import Run

# Entry of a checkpoint's config beside those of TrainConfig.
_FINGERPRINT = "data_fingerprint"


def train(config: TrainConfig, workdir: Path, *, profiled: ProfiledSteps | None = None) -> None:
  """Trains, or goes on with the training in `workdir`, up to `config.num_steps`.

  In `workdir` it leaves checkpoints/, metrics.jsonl, tensorboard/, loss.png, loss_by_position.png,
  the batches of bad steps in bad_batches/ and, unless data.cache_dir is elsewhere, the prepared
  data.

  All processes of a run call it alike. A SIGTERM to one of them stops all after the same step,
  which is saved.

  Args:
    config: of the run.
    workdir: the run's folder, on a disk that its processes share.
    profiled: steps to take a profile of, in `workdir`/profile.

  Raises:
    CheckpointError: a checkpoint is damaged or could not be written.
    TrainingError: training diverged, no data came, a file of the run could not be written, or
      another process is gone.
    ValueError: the config makes no sense, or is not the one that the run was started with, or not
      that of the other processes.
    OSError: files of the data are missing or could not be prepared.
  """
  multihost.check_agreement(
    {**to_flat_dict(config), "jax's version": jax.__version__},
    "Start all of them with the same --config and the same --config.KEY=VALUE.",
  )
  workdir.mkdir(parents=True, exist_ok=True)
  with (
    multihost.StopRequest() as stop_request,
    Checkpoints(workdir, keep=config.keep_checkpoints) as checkpoints,
  ):
    start = _find_start(config, workdir, checkpoints)
    if start.step == config.num_steps:
      logging.info("The run in %s is finished: all %d steps are done.", workdir, start.step)
      return
    functions = make_functions(start.config)
    data = _load_data(start, workdir, functions)
    entries = {**start.entries, _FINGERPRINT: data.fingerprint}
    with _note_last_checkpoint(checkpoints, workdir), contextlib.ExitStack() as stack:
      metrics = None
      if multihost.is_first():
        last_step = -1 if start.step is None else start.step
        metrics = stack.enter_context(MetricsWriter(workdir, last_step=last_step))
      reporter = Reporter(start.config, workdir, metrics, first_step=start.step or 0)
      profiler = stack.enter_context(contextlib.closing(Profiler(workdir, profiled)))
      run = Run(start.config, workdir, functions, data, checkpoints, entries, first_step=start.step)
      run.run_to_end(reporter, profiler, stop_request)


@dataclasses.dataclass(frozen=True)
class _Start:
  """What a run starts from.

  Attributes:
    config: the training config; its model may be that of the checkpoint it begins with.
    step: the step of the run's own checkpoint to go on from, None for a new run.
    tokenizer: of the checkpoint that the run began with, None where it began with nothing.
    entries: further entries for the config in the run's checkpoints.
    fingerprint: of the data that the run was started with, None for a new run.
  """

  config: TrainConfig
  step: int | None
  tokenizer: Tokenizer | None
  entries: Mapping[str, Any]
  fingerprint: str | None


def _find_start(config: TrainConfig, workdir: Path, checkpoints: Checkpoints) -> _Start:
  latest = checkpoints.latest_step
  multihost.check_agreement(
    {"the newest checkpoint": latest, "its folder exists": checkpoints.directory.is_dir()},
    "Give all of them the same --workdir, on a disk that they share.",
  )
  saved = {} if latest is None else checkpoints.read_config(latest)
  if saved and "data" not in saved:
    raise ValueError(
      f"{workdir} holds an imported model. Train it in a folder of its own, with "
      f"--config.init_from={workdir} and another --workdir."
    )
  # A run that goes on needs the folder that it began with no more.
  initial = find_initial(config, config.init_from if latest is None else str(workdir))
  fingerprint = saved.pop(_FINGERPRINT, None)
  saved.pop(ORIGIN, None)
  if latest is not None:
    check_resumable(initial.config, saved)
  return _Start(initial.config, latest, initial.tokenizer, initial.entries, fingerprint)


def _load_data(start: _Start, workdir: Path, functions: Functions) -> Data:
  """This process's part of the data, which are the same for all and for the whole of a run."""
  config = start.config
  share, shares = process_share(functions.mesh)
  with multihost.first_process_first("data"):
    data = load_data(
      config.data,
      workdir,
      seed=config.seed,
      batch_size=config.batch_size,
      tokenizer=start.tokenizer,
      process_index=share,
      process_count=shares,
    )
  multihost.check_agreement(
    {"the data's fingerprint": data.fingerprint}, "Give all of them the same files."
  )
  if data.tokenizer.vocab_size > config.model.vocab_size:
    raise ValueError(
      f"config.model.vocab_size is {config.model.vocab_size}; the tokenizer has "
      f"{data.tokenizer.vocab_size} entries, so it must be at least that."
    )
  if start.fingerprint not in (None, data.fingerprint):
    raise ValueError(
      "The data files are not those that the run in this workdir was started with. Bring the old "
      "ones back, or give another --workdir to start a new run."
    )
  return data


@contextlib.contextmanager
def _note_last_checkpoint(checkpoints: Checkpoints, workdir: Path) -> Iterator[None]:
  """Adds to an error of the run which checkpoint is there."""
  try:
    yield
  except (TrainingError, OSError, jax.errors.JaxRuntimeError) as error:
    is_alone = jax.process_count() == 1
    if is_alone and isinstance(error, jax.errors.JaxRuntimeError):
      raise
    if is_alone or isinstance(error, DivergenceError):  # Else the save may lack a process.
      checkpoints.wait()
    steps = list_steps(workdir)
    remains = f"the intact checkpoint of step {steps[-1]}" if steps else "no checkpoint"
    is_shared = isinstance(error, jax.errors.JaxRuntimeError)
    reason = multihost.explain(error) if is_shared else str(error)
    raise TrainingError(f"{reason} There is {remains}.") from error
