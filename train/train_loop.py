"""One run from a checkpoint or from the start: steps, evaluations, checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jaxtyping import PyTree

from dga_jax.checkpoint import Checkpoints
from train import multihost
from train.config import to_dict, TrainConfig
from train.data.pipeline import Data
from train.evaluate import evaluate, Evaluation, make_eval_step
from train.init_from import load_params
from train.plots import plot_run
from train.prefetch import Batches
from train.profile import Profiler
from train.report import Reporter
from train.sharding import shapes_on
from train.step import Functions, TrainState


class Run:
  """A run in one of its processes; all of them do the same, on their own rows and devices.

  Args:
    config: the training config.
    workdir: the run's folder.
    functions: the jitted functions of the config.
    data: what this process reads.
    checkpoints: where to save, and to go on from.
    entries: of a checkpoint's config, beside the training config's.
    first_step: the step of the checkpoint to go on from, None for a new run.
  """

  def __init__(
    self,
    config: TrainConfig,
    workdir: Path,
    functions: Functions,
    data: Data,
    checkpoints: Checkpoints,
    entries: Mapping[str, Any],
    *,
    first_step: int | None,
  ) -> None:
    self._config = config
    self._workdir = workdir
    self._functions = functions
    self._data = data
    self._checkpoints = checkpoints
    self._entries = dict(entries)
    self._first_step = first_step
    self._eval_step = make_eval_step(config, functions, data.tokenizer)

  def run_to_end(
    self, reporter: Reporter, profiler: Profiler, stop_request: multihost.StopRequest
  ) -> None:
    """Takes all steps that are left, unless a stop is asked for, and evaluates and saves."""
    config = self._config
    state, batches = self._first_state()
    if self._first_step is None:
      self._evaluate(0, state, reporter)
    step = self._first_step or 0
    stopping = False
    while step < config.num_steps and not stopping:
      step += 1
      taken = batches.take()
      batch = self._functions.place(taken.rows)
      profiler.before(step)
      # A Python number or numpy array that slipped into the step would be copied to the device at
      # every step; here it raises. The copies that are meant are explicit.
      with jax.transfer_guard("disallow"), jax.profiler.StepTraceAnnotation("step", step_num=step):
        state, scalars = self._functions.step(state, batch)
        reporter.add(step, scalars, taken)
      profiler.after(step, scalars)
      self._checkpoints.raise_if_failed()
      stopping = stop_request.agreed()
      is_last = step == config.num_steps
      evaluation = None
      if is_last or step % config.eval_every == 0:
        evaluation = self._evaluate(step, state, reporter)
      if is_last or stopping or step % config.checkpoint_every == 0:
        self._save(step, state, batches, evaluation, reporter)
    self._checkpoints.wait()
    reporter.finish(step)
    if step < config.num_steps:
      logging.info("Asked to stop: step %d is saved, and the same command goes on from it.", step)

  def _first_state(self) -> tuple[TrainState, Batches]:
    """The state to go on from, and the batches that follow."""
    functions = self._functions
    if self._first_step is None:
      batches = Batches(self._config.data, self._data, position=0)
      if self._config.init_from is None:
        return functions.init(), batches
      logging.info("Beginning with the model in %s.", self._config.init_from)
      return functions.begin(load_params(self._config, functions.mesh)), batches
    position = self._checkpoints.read_data(self._first_step)["next_batch"]
    target = shapes_on(jax.eval_shape(functions.init), functions.shardings)
    params, training = self._checkpoints.restore(
      self._first_step, params=target.params, training=_training_items(target)
    )
    logging.info("Going on from the checkpoint of step %d.", self._first_step)
    batches = Batches(self._config.data, self._data, position=position)
    return TrainState(params=params, **training), batches

  def _evaluate(self, step: int, state: TrainState, reporter: Reporter) -> Evaluation | None:
    """Reports the held-out loss and draws the plots anew."""
    reporter.flush()
    if not self._config.eval_batches:
      return None
    evaluation = evaluate(
      self._config, self._functions, self._eval_step, state.params, self._data.validation
    )
    reporter.evaluated(step, evaluation)
    if multihost.is_first():
      plot_run(self._workdir)
    return evaluation

  def _save(
    self,
    step: int,
    state: TrainState,
    batches: Batches,
    evaluation: Evaluation | None,
    reporter: Reporter,
  ) -> None:
    """Starts a checkpoint, once the metrics up to its step are on the disk."""
    reporter.flush()
    self._checkpoints.save(
      step,
      params=state.params,
      training=_training_items(state),
      data={"next_batch": batches.position},
      config=to_dict(self._config) | self._entries,
      tokenizer=self._data.tokenizer,
      eval_loss=None if evaluation is None else evaluation.loss,
    )


def _training_items(state: TrainState) -> dict[str, PyTree[Any]]:
  """What a checkpoint holds of the state besides the parameters."""
  return {"optimizer": state.optimizer, "step": state.step, "guard": state.guard}
