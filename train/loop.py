"""The training loop: data in, steps, evaluations, checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import jax
from absl import logging
from jaxtyping import PyTree

from dga_jax.checkpoint import Checkpoints
from train.config import check_resumable, to_dict, TrainConfig
from train.data.pipeline import Data, load_data
from train.errors import TrainingError
from train.evaluate import evaluate, Evaluation, make_eval_step
from train.initial import find_initial, load_params, ORIGIN
from train.metrics import MetricsWriter
from train.plots import plot_run
from train.report import Reporter
from train.step import make_functions, TrainState

# Entry of a checkpoint's config beside those of TrainConfig.
_FINGERPRINT = "data_fingerprint"


def train(config: TrainConfig, workdir: Path) -> None:
  """Trains, or goes on with the training in `workdir`, up to `config.num_steps`.

  In `workdir` it leaves checkpoints/, metrics.jsonl, tensorboard/, loss.png, loss_by_position.png
  and, unless data.cache_dir is elsewhere, the prepared data.

  Raises:
    CheckpointError: a checkpoint is damaged or could not be written.
    TrainingError: training diverged, or a file of the run could not be written.
    ValueError: the config makes no sense, or is not the one that the run was started with.
    OSError: files of the data are missing or could not be prepared.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  with Checkpoints(workdir, keep=config.keep_checkpoints) as checkpoints:
    latest = checkpoints.latest_step
    saved = {} if latest is None else checkpoints.read_config(latest)
    if saved and "data" not in saved:
      raise ValueError(
        f"{workdir} holds an imported model. Train it in a folder of its own, with "
        f"--config.init_from={workdir} and another --workdir."
      )
    # A run that goes on needs the folder that it began with no more.
    initial = find_initial(config, config.init_from if latest is None else str(workdir))
    config = initial.config
    fingerprint = saved.pop(_FINGERPRINT, None)
    saved.pop(ORIGIN, None)
    if latest is not None:
      check_resumable(config, saved)
    if latest == config.num_steps:
      logging.info("The run in %s is finished: all %d steps are done.", workdir, latest)
      return
    data = load_data(
      config.data,
      workdir,
      seed=config.seed,
      batch_size=config.batch_size,
      tokenizer=initial.tokenizer,
    )
    _check_data(config, data, fingerprint)
    entries = {**initial.entries, _FINGERPRINT: data.fingerprint}
    try:
      with MetricsWriter(workdir, last_step=-1 if latest is None else latest) as metrics:
        run = _Run(config, workdir, data, checkpoints, metrics, entries, first_step=latest)
        run.to_the_end()
    except (TrainingError, OSError) as error:
      checkpoints.wait()
      last = checkpoints.latest_step
      remains = "no checkpoint" if last is None else f"the intact checkpoint of step {last}"
      raise TrainingError(f"{error} There is {remains}.") from error


class _Run:
  """One training run, from a checkpoint or from the start."""

  def __init__(
    self,
    config: TrainConfig,
    workdir: Path,
    data: Data,
    checkpoints: Checkpoints,
    metrics: MetricsWriter,
    entries: Mapping[str, Any],
    *,
    first_step: int | None,
  ) -> None:
    self._config = config
    self._entries = dict(entries)  # of a checkpoint's config, beside the training config's
    self._workdir = workdir
    self._data = data
    self._checkpoints = checkpoints
    self._first_step = first_step
    self._functions = make_functions(config)
    self._eval_step = make_eval_step(config, self._functions, data.tokenizer)
    self._batches = iter(data.train)
    self._reporter = Reporter(config, metrics, first_step=first_step or 0)

  def to_the_end(self) -> None:
    """Takes all steps that are left, and between them evaluates and saves."""
    config = self._config
    state = self._first_state()
    if self._first_step is None:
      self._evaluate(0, state)
    for step in range((self._first_step or 0) + 1, config.num_steps + 1):
      batch = next(self._batches)
      # A Python number or numpy array that slipped into the step would be copied to the device at
      # every step; here it raises. The copies that are meant are explicit.
      with jax.transfer_guard("disallow"):
        state, scalars = self._functions.step(state, self._functions.place(batch))
        self._reporter.add(step, scalars)
      self._checkpoints.raise_if_failed()
      is_last = step == config.num_steps
      evaluation = None
      if is_last or step % config.eval_every == 0:
        evaluation = self._evaluate(step, state)
      if is_last or step % config.checkpoint_every == 0:
        self._save(step, state, evaluation)
    self._checkpoints.wait()
    self._reporter.finish(self._workdir)

  def _first_state(self) -> TrainState:
    """The state to go on from; the data iterator is set to where it was then."""
    if self._first_step is None and self._config.init_from is None:
      return self._functions.init()
    if self._first_step is None:
      logging.info("Beginning with the model in %s.", self._config.init_from)
      params = jax.device_put(load_params(self._config), self._functions.shardings.params)
      return self._functions.begin(params)
    target = jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      jax.eval_shape(self._functions.init),
      self._functions.shardings,
    )
    params, training = self._checkpoints.restore(
      self._first_step,
      params=target.params,
      training=_training_items(target),
      data=grain.checkpoint.CheckpointRestore(self._batches),
    )
    logging.info("Going on from the checkpoint of step %d.", self._first_step)
    return TrainState(params=params, **training)

  def _evaluate(self, step: int, state: TrainState) -> Evaluation | None:
    """Reports the held-out loss and draws the plots anew."""
    self._reporter.flush()
    if not self._config.eval_batches:
      return None
    evaluation = evaluate(
      self._config, self._functions, self._eval_step, state.params, self._data.validation
    )
    self._reporter.evaluated(step, evaluation)
    plot_run(self._workdir)
    return evaluation

  def _save(self, step: int, state: TrainState, evaluation: Evaluation | None) -> None:
    """Starts a checkpoint, once the metrics up to its step are on the disk."""
    self._reporter.flush()
    self._checkpoints.save(
      step,
      params=state.params,
      training=_training_items(state),
      data=grain.checkpoint.CheckpointSave(self._batches),
      config=to_dict(self._config) | self._entries,
      tokenizer=self._data.tokenizer,
      eval_loss=None if evaluation is None else evaluation.loss,
    )


def _training_items(state: TrainState) -> dict[str, PyTree[Any]]:
  """What a checkpoint holds of the state besides the parameters."""
  return {"optimizer": state.optimizer, "step": state.step}


def _check_data(config: TrainConfig, data: Data, fingerprint: str | None) -> None:
  if data.tokenizer.vocab_size > config.model.vocab_size:
    raise ValueError(
      f"config.model.vocab_size is {config.model.vocab_size}; the tokenizer has "
      f"{data.tokenizer.vocab_size} entries, so it must be at least that."
    )
  if fingerprint not in (None, data.fingerprint):
    raise ValueError(
      "The data files are not those that the run in this workdir was started with. Bring the old "
      "ones back, or give another --workdir to start a new run."
    )
