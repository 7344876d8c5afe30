"""Reports of a run: log lines, a progress bar, metrics.jsonl and TensorBoard."""

import dataclasses
import math

import jax
from absl import logging
from tqdm import tqdm

from dga_jax.model import flops_per_token
from train.bad_batches import record_batch
from train.config import TrainConfig
from train.errors import DivergenceError
from train.evaluate import Evaluation
from train.metrics import FILE_NAME, MetricsWriter
from train.prefetch import Taken
from train.resume import Position
from train.run_folder import RunFolder
from train.step import Scalars
from train.throughput import memory, peak_flops, StepTimer


class Reporter:
  """Reports each step one step late, so that the device never waits for the report.

  While step n runs, the scalars of step n - 1 are fetched; `flush` also fetches those of the last
  step, before an evaluation or a checkpoint.

  Every process of a run has one, so that all stop at the same step if training diverges; process 0
  writes the numbers.

  Args:
    config: the training config.
    files: its folder bad_batches gets the batches of bad steps.
    metrics: writes the numbers; None in a process that does not write them.
    start: the position that the run continues from.

  Attributes:
    skipped_in_row: bad steps in a row up to the last step that was reported.
  """

  def __init__(
    self, config: TrainConfig, files: RunFolder, metrics: MetricsWriter | None, *, start: Position
  ) -> None:
    self._config = config
    self._files = files
    self._metrics = metrics
    self._pending: tuple[int, Scalars, Taken] | None = None
    self.skipped_in_row = start.skipped_in_row
    length = config.data.sequence_length
    self._timer = StepTimer(
      tokens_per_step=config.batch_size * length,
      flops_per_token=flops_per_token(config.model, length),
      peak_flops=math.inf if metrics is None else peak_flops(config.model.dtype),
    )
    self._bar = tqdm(
      total=config.num_steps,
      initial=start.steps_done,
      unit=" steps",
      dynamic_ncols=True,
      disable=None if metrics is not None else True,
    )

  def add(self, step: int, scalars: Scalars, taken: Taken) -> None:
    """Takes the scalars of a step that was just dispatched, and reports the step before it.

    Raises:
      DivergenceError: the step before it was bad, and the config ends the run for it.
    """
    before, self._pending = self._pending, (step, scalars, taken)
    if before is not None:
      self._report(*before)

  def flush(self) -> None:
    """Waits for the last step and reports it; the time until the next step is not counted.

    Raises:
      DivergenceError: as for `add`.
    """
    before, self._pending = self._pending, None
    if before is not None:
      self._report(*before)
    if self._metrics is not None:
      self._metrics.sync()
    self._timer.pause()

  def evaluated(self, step: int, evaluation: Evaluation) -> None:
    """Reports an evaluation."""
    if not math.isfinite(evaluation.loss):
      raise DivergenceError(f"The held-out loss at step {step} is {evaluation.loss}.")
    if self._metrics is None:
      return
    self._metrics.write(step, evaluation.to_dict())
    by_corpus = "".join(f"  {name} {loss:.4f}" for name, loss in evaluation.loss_by_corpus.items())
    logging.info(
      "step %d  held-out loss %.4f  accuracy %.1f %%  bits per byte %.3f%s",
      step,
      evaluation.loss,
      100 * evaluation.accuracy,
      evaluation.bits_per_byte,
      by_corpus,
    )

  def finish(self, last_step: int) -> None:
    """Closes the progress bar, and logs the run's folder if all steps are done."""
    self._bar.close()
    if self._metrics is not None and last_step == self._config.num_steps:
      logging.info("Finished. Checkpoints, %s and plots are in %s.", FILE_NAME, self._files.root)

  def _report(self, step: int, scalars: Scalars, taken: Taken) -> None:
    # An explicit copy: the loop forbids implicit ones.
    values = {name: float(value) for name, value in jax.device_get(scalars).items()}
    if values["skipped"]:
      self._judge_bad_step(step, values, taken)
    else:
      self.skipped_in_row = 0
      del values["skipped"]
    self._timer.lap()
    if self._metrics is not None:
      self._write(self._metrics, step, values, taken.waited)

  def _judge_bad_step(self, step: int, values: dict[str, float], taken: Taken) -> None:
    """Keeps the batch of a skipped step; ends the run if the config asks for it."""
    path = self._files.path_in_root(record_batch(self._files.local, step, taken, values))
    self._files.publish()
    self.skipped_in_row += 1
    guard = self._config.guard
    diverged = f"Training diverged at step {step}: {_numbers(values)} Its batch is in {path}."
    if guard.policy == "stop":
      raise DivergenceError(
        f"{diverged} Lower config.learning_rate or raise config.warmup_steps, or skip such "
        "batches: --config.guard.policy=skip."
      )
    if self.skipped_in_row >= guard.max_skipped:
      raise DivergenceError(
        f"{diverged} It is the last of {self.skipped_in_row} bad steps in a row, of which "
        "config.guard.max_skipped allows no more."
      )
    logging.warning("%s It is skipped.", diverged)

  def _write(
    self, metrics: MetricsWriter, step: int, values: dict[str, float], waited: float
  ) -> None:
    speed = self._timer.speed()
    is_logged = step % self._config.log_every == 0 or step == self._config.num_steps
    timing = {} if speed is None else dataclasses.asdict(speed)
    measured = timing | {"data_wait_seconds": waited} | memory()
    metrics.write(step, values | measured, tensorboard=is_logged)
    shown = f"loss {values['loss']:.4f}"
    if speed is not None:
      shown += (
        f"  {speed.tokens_per_second:,.0f} tokens/s  MFU {100 * speed.mfu:.1f} %"
        f"  step {speed.step_seconds:.3f} s"
      )
    if "device_memory_bytes" in measured:
      shown += f"  peak memory {measured['device_memory_bytes'] / 1e9:.1f} GB"
    self._bar.set_postfix_str(shown, refresh=False)
    self._bar.update()
    if is_logged:
      logging.info(
        "step %d/%d  %s  gradient norm %.3f  learning rate %.2e",
        step,
        self._config.num_steps,
        shown,
        values["grad_norm"],
        values["learning_rate"],
      )


def _numbers(values: dict[str, float]) -> str:
  return (
    f"loss {values['loss']}, gradient norm {values['grad_norm']}, norm of the parameters "
    f"{values['param_norm']}."
  )
