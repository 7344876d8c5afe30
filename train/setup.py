"""Sets up a training run, new or resumed: lock, checks, data, checkpoint, and errors of the run."""

import contextlib
import dataclasses
import errno
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from absl import logging

from dga_jax.chat.template import chat_template_of, ChatTemplate, template_sources
from dga_jax.checkpoint import Checkpoints
from dga_jax.files.lock import hold_workdir
from dga_jax.files.paths import check_path, is_gcs
from dga_jax.files.storage import AnyPath
from dga_jax.head_budgets import HeadBudgets
from dga_jax.tokenizer import Tokenizer
from train import multihost
from train.abort_filter import newest_checkpoint_note
from train.config import check_resumable, to_flat_dict, TrainConfig
from train.data.pipeline import Data, load_data
from train.errors import DivergenceError, TrainingError
from train.head_order import saved_in_order
from train.init_from import find_initial, Initial, ORIGIN
from train.metrics import FILE_NAME, MetricsWriter
from train.profile import ProfiledSteps, Profiler
from train.report import Reporter
from train.resume import choose_checkpoint, Position, Resume
from train.run_folder import open_run_folder
from train.sharding import process_share
from train.step import Functions, make_functions
from train.stop_signals import StopSignals
from train.train_loop import Run

# Entry of a checkpoint's config beside those of TrainConfig.
_FINGERPRINT = "data_fingerprint"


def train(
  config: TrainConfig,
  workdir: AnyPath,
  *,
  profiled: ProfiledSteps | None = None,
  resume: Resume | None = None,
  repair_data: bool = False,
  signals: StopSignals | None = None,
) -> bool:
  """Trains, or continues the training in `workdir`, up to `config.num_steps`.

  In `workdir` it leaves checkpoints/, metrics.jsonl, tensorboard/, loss.png, loss_by_position.png,
  the batches of bad steps in bad_batches/ and, unless data.cache_dir is elsewhere, the prepared
  data.

  All processes of a run call it alike. A SIGTERM, SIGINT or SIGHUP to one of them stops all after
  the same step, which is saved.

  Args:
    config: of the run.
    workdir: the run's folder, on a disk that its processes share or in Google Cloud Storage.
    profiled: steps to take a profile of, in `workdir`/profile.
    resume: which checkpoint to continue from; None for the newest.
    repair_data: prepare the data anew where the prepared files are damaged.
    signals: the caller's handling of signals; None handles them here.

  Returns:
    Whether all steps are done; else a signal has stopped the run.

  Raises:
    CheckpointError: a checkpoint is damaged or could not be written.
    StoppedError: a signal came before the first step.
    LockedError: another process writes to `workdir`.
    TrainingError: training diverged, no data came, a file of the run could not be written, or
      another process is gone.
    ValueError: the config makes no sense, or is not the one that the run was started with, or not
      that of the other processes.
    OSError: files of the data are missing, damaged or could not be prepared.
  """
  _check_dtypes(config)
  _check_storage(config, workdir)
  resume = Resume() if resume is None else resume
  multihost.check_agreement(
    {**to_flat_dict(config), **resume.to_dict(), "jax's version": jax.__version__},
    "Start all of them with the same flags.",
  )
  with contextlib.ExitStack() as stack:
    if signals is None:
      signals = stack.enter_context(StopSignals())
    multihost.on_first_process(lambda: stack.enter_context(hold_workdir(workdir)))
    checkpoints = stack.enter_context(Checkpoints(workdir, keep=config.keep_checkpoints))
    start = _find_start(config, workdir, checkpoints, resume)
    if start.position.step == config.num_steps:
      logging.info("The run in %s is finished: all %d steps are done.", workdir, config.num_steps)
      return True
    functions = make_functions(start.config)
    data = _load_data(start, workdir, functions, repair=repair_data)
    stack.callback(data.close)
    _log_reads(start.config, data)
    entries = {**start.entries, _FINGERPRINT: data.fingerprint}
    with _note_last_checkpoint(checkpoints, workdir), contextlib.ExitStack() as opened:
      fetched = FILE_NAME if multihost.is_first() else None
      files = opened.enter_context(open_run_folder(workdir, fetched))
      metrics = None
      if multihost.is_first():
        last_step = -1 if start.position.step is None else start.position.step
        metrics = opened.enter_context(MetricsWriter(files.local, last_step=last_step))
      reporter = Reporter(start.config, files, metrics, start=start.position)
      profiler = opened.enter_context(contextlib.closing(Profiler(files, profiled)))
      run = Run(
        start.config,
        files,
        functions,
        data,
        checkpoints,
        entries,
        start=start.position,
        budgets=start.budgets,
      )
      return run.run_to_end(reporter, profiler, signals) == config.num_steps


def _check_storage(config: TrainConfig, workdir: AnyPath) -> None:
  """Refuses a folder that a run cannot write to, before anything is created."""
  check_path("workdir", workdir, allow_gcs=True)
  if is_gcs(workdir) and jax.process_count() > 1:
    raise ValueError(
      f"The workdir is {str(workdir)!r}, and the run has {jax.process_count()} processes; an "
      "object store is supported for one process. Give a folder on a disk that all processes share."
    )
  if is_gcs(workdir) and config.data.kind != "recall" and config.data.cache_dir is None:
    raise ValueError(
      f"config.data.cache_dir is None, and the workdir is {str(workdir)!r}; the prepared data "
      "need a folder of the file system. Give one that every host has: "
      "--config.data.cache_dir=FOLDER."
    )


def _check_dtypes(config: TrainConfig) -> None:
  """Refuses what cannot train: without scaling of the loss float16 has too small a range."""
  if config.model.param_dtype == "float16":
    raise ValueError(
      "config.model.param_dtype is 'float16': the optimizer's updates underflow in it, and the "
      "first step would give parameters that are not finite. Use 'float32', or 'bfloat16'; a model "
      "in float16 that training begins with (config.init_from) is converted."
    )
  if config.model.dtype == "float16":
    logging.warning(
      "config.model.dtype is 'float16': the trainer does not scale the loss, so small gradients "
      "become 0. 'bfloat16' has the range of float32."
    )


@dataclasses.dataclass(frozen=True)
class _Start:
  """What a run starts from.

  Attributes:
    config: the training config; its model may be that of the checkpoint that training begins with.
    position: of the run's own checkpoint to continue from.
    tokenizer: of the checkpoint that training begins with, None where there is none.
    entries: further entries for the config in the run's checkpoints.
    budgets: see `Initial.budgets`.
    fingerprint: of the data that the run was started with, None for a new run.
  """

  config: TrainConfig
  position: Position
  tokenizer: Tokenizer | None
  entries: Mapping[str, Any]
  budgets: HeadBudgets | None
  fingerprint: str | None


def _find_start(
  config: TrainConfig, workdir: AnyPath, checkpoints: Checkpoints, resume: Resume
) -> _Start:
  step = choose_checkpoint(workdir, resume)
  if step is None:
    initial = find_initial(config, config.init_from)
    return _make_start(initial, Position(), None)
  saved = checkpoints.read_config(step)
  if not checkpoints.has_data(step):
    raise ValueError(
      f"{workdir} holds a model without a position in training data: an import, or a result of dga "
      f"fit_selector. Train it in a folder of its own, with --config.init_from={workdir} and "
      "another --workdir."
    )
  # The run's own checkpoint has all that it took over from the folder that it began with.
  initial = find_initial(config, str(workdir), step)
  fingerprint = saved.pop(_FINGERPRINT, None)
  saved.pop(ORIGIN, None)
  check_resumable(initial.config, saved_in_order(saved, config, jax.device_count()))
  position = Position.from_dict(checkpoints.read_data(step), workdir, step)
  return _make_start(initial, position, fingerprint)


def _make_start(initial: Initial, position: Position, fingerprint: str | None) -> _Start:
  return _Start(
    initial.config, position, initial.tokenizer, initial.entries, initial.budgets, fingerprint
  )


def _load_data(start: _Start, workdir: AnyPath, functions: Functions, *, repair: bool) -> Data:
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
      template=_chat_template(start),
      process_index=share,
      process_count=shares,
      repair=repair,
      fingerprint=start.fingerprint,
    )
  multihost.check_agreement(
    {"the data's fingerprint": data.fingerprint}, "Give all of them the same files."
  )
  if data.tokenizer.vocab_size > config.model.vocab_size:
    raise ValueError(
      f"config.model.vocab_size is {config.model.vocab_size}; the tokenizer has "
      f"{data.tokenizer.vocab_size} entries. Raise config.model.vocab_size to at least that, or "
      "lower config.data.vocab_size, the size of a tokenizer that the run trains."
    )
  return data


def _log_reads(config: TrainConfig, data: Data) -> None:
  """Logs how often the run reads each corpus."""
  for name, reads in data.reads(config.data, config.num_steps * config.batch_size).items():
    logging.info(
      "The run reads the %d training rows of %s %.2f times.",
      data.train_rows[name],
      name or "the data",
      reads,
    )


def _chat_template(start: _Start) -> ChatTemplate | None:
  """The chat template of the model that training begins with, None where it has none."""
  origin = start.entries.get(ORIGIN)
  if start.tokenizer is None or not origin or not template_sources(origin):
    return None
  return chat_template_of(origin, start.tokenizer)


@contextlib.contextmanager
def _note_last_checkpoint(checkpoints: Checkpoints, workdir: AnyPath) -> Iterator[None]:
  """Adds the newest checkpoint to an error of the run."""
  try:
    yield
  except (TrainingError, OSError, jax.errors.JaxRuntimeError) as error:
    is_alone = jax.process_count() == 1
    if is_alone and isinstance(error, jax.errors.JaxRuntimeError):
      raise
    if is_alone or isinstance(error, DivergenceError):  # Else the save may lack a process.
      checkpoints.wait()
    is_shared = isinstance(error, jax.errors.JaxRuntimeError)
    reason = multihost.explain(error) if is_shared else str(error).rstrip(".") + "."
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
      reason += " Make room, and start the same command again: it continues from a checkpoint."
    raise TrainingError(f"{reason} {newest_checkpoint_note(workdir)}") from error
