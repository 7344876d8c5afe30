"""The training loop: steps, evaluations, checkpoints."""

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from jaxtyping import PyTree

from dga_jax.checkpoint import Checkpoints
from dga_jax.checkpoint_files import CheckpointError
from dga_jax.head_budgets import HeadBudgets
from train import multihost
from train.config import to_dict, TrainConfig
from train.data.pipeline import Data
from train.evaluate import evaluate_corpora, Evaluation, make_eval_step
from train.head_order import reorder_heads
from train.init_from import load_params
from train.multihost import StopAgreement
from train.plots import plot_run
from train.prefetch import Batches
from train.profile import Profiler
from train.report import Reporter
from train.resume import Position
from train.run_folder import RunFolder
from train.sharding import shapes_on
from train.step import Functions, TrainState
from train.stop_signals import EXIT_STATUS, StopSignals


class Run:
  """A run in one of its processes; every process runs the same loop on its own rows and devices.

  Args:
    config: the training config.
    files: the run's folder.
    functions: the jitted functions of the config.
    data: the rows that this process reads.
    checkpoints: of the run.
    entries: of a checkpoint's config, beside the training config's.
    start: the position of the checkpoint to continue from.
    budgets: see `train.init_from.Initial`.
  """

  def __init__(
    self,
    config: TrainConfig,
    files: RunFolder,
    functions: Functions,
    data: Data,
    checkpoints: Checkpoints,
    entries: Mapping[str, Any],
    *,
    start: Position,
    budgets: HeadBudgets | None,
  ) -> None:
    self._config = config
    self._files = files
    self._functions = functions
    self._data = data
    self._checkpoints = checkpoints
    self._entries = dict(entries)
    self._start = start
    self._budgets = budgets
    self._eval_step = make_eval_step(config, functions, data.tokenizer)

  def run_to_end(self, reporter: Reporter, profiler: Profiler, signals: StopSignals) -> int:
    """Takes all steps that are left, unless a signal stops the run; evaluates and saves.

    Returns:
      The steps done.

    Raises:
      StoppedError: a signal came before the first step.
    """
    state = self._first_state()
    batches = Batches(self._config.data, self._data, position=self._start.next_batch)
    with contextlib.closing(batches):
      if self._start.step is None:
        self._evaluate(0, state, reporter)
      signals.defer()
      step = self._take_steps(state, batches, reporter, profiler, StopAgreement(signals))
    self._checkpoints.wait()
    reporter.finish(step)
    if step < self._config.num_steps:
      logging.info(
        "Asked to stop: step %d is saved, and the same command continues from it. (Exit status "
        "%d.)",
        step,
        EXIT_STATUS,
      )
    return step

  def _take_steps(
    self,
    state: TrainState,
    batches: Batches,
    reporter: Reporter,
    profiler: Profiler,
    stop: StopAgreement,
  ) -> int:
    config = self._config
    step = self._start.steps_done
    stopping = False
    while step < config.num_steps and not stopping:
      step += 1
      taken = batches.take()
      batch = self._functions.shard_batch(taken.rows)
      profiler.before(step)
      # A Python number or numpy array that slipped into the step would be copied to the device at
      # every step; here it raises. The copies that are meant are explicit.
      with jax.transfer_guard("disallow"), jax.profiler.StepTraceAnnotation("step", step_num=step):
        state, scalars = self._functions.step(state, batch)
        reporter.add(step, scalars, taken)
      profiler.after(step, scalars)
      self._checkpoints.raise_if_failed()
      stopping = stop.agreed()
      is_last = step == config.num_steps
      evaluation = None
      if is_last or step % config.eval_every == 0:
        evaluation = self._evaluate(step, state, reporter)
      if is_last or stopping or step % config.checkpoint_every == 0:
        self._save(step, state, batches, evaluation, reporter)
    return step

  def _first_state(self) -> TrainState:
    """The state to continue from, or that of a new run."""
    functions, step = self._functions, self._start.step
    if step is None:
      if self._config.init_from is None:
        return functions.init()
      logging.info("Beginning with the model in %s.", self._config.init_from)
      return functions.from_params(load_params(self._config, functions.mesh, self._budgets))
    target = shapes_on(jax.eval_shape(functions.init), functions.shardings)
    params, training = self._checkpoints.restore(
      step, params=target.params, training=_training_items(target)
    )
    if int(training["step"]) != step:
      raise CheckpointError(
        f"The state in the checkpoint of step {step} in {self._files.root} is that of step "
        f"{int(training['step'])}. Continue from another checkpoint with --step."
      )
    logging.info("Continuing from the checkpoint of step %d.", step)
    state, saved = TrainState(params=params, **training), self._checkpoints.read_config(step)
    return reorder_heads(state, saved, self._config, functions)

  def _evaluate(self, step: int, state: TrainState, reporter: Reporter) -> Evaluation | None:
    """Reports the held-out loss and redraws the plots."""
    reporter.flush()
    if not self._config.eval_batches:
      return None
    evaluation = evaluate_corpora(
      self._config, self._functions, self._eval_step, state.params, self._data.validation
    )
    reporter.evaluated(step, evaluation)
    if multihost.is_first():
      title = (
        f"{self._files.root.name} · {self._config.model.attention} · "
        f"{self._config.data.sequence_length} tokens"
      )
      plot_run(self._files.local, title=title)
      self._files.publish()
    return evaluation

  def _save(
    self,
    step: int,
    state: TrainState,
    batches: Batches,
    evaluation: Evaluation | None,
    reporter: Reporter,
  ) -> None:
    """Starts a checkpoint after the metrics up to its step are on the disk."""
    reporter.flush()
    self._files.publish()
    position = Position(step, batches.position, reporter.skipped_in_row)
    self._checkpoints.save(
      step,
      params=state.params,
      training=_training_items(state),
      data=position.to_dict(),
      config=to_dict(self._config) | self._entries,
      tokenizer=self._data.tokenizer,
      eval_loss=None if evaluation is None else evaluation.loss,
    )


def _training_items(state: TrainState) -> dict[str, PyTree[Any]]:
  """The checkpoint's item "training": the state without the parameters."""
  return {"optimizer": state.optimizer, "step": state.step, "guard": state.guard}
