"""What a run tells: log lines, a progress bar, metrics.jsonl and TensorBoard."""

import dataclasses
import math
from pathlib import Path

import jax
from absl import logging
from tqdm import tqdm

from dga_jax.model import flops_per_token
from train.config import TrainConfig
from train.errors import TrainingError
from train.evaluate import Evaluation
from train.metrics import FILE_NAME, MetricsWriter
from train.step import Scalars
from train.throughput import peak_flops, StepTimer


class Reporter:
  """Reports each step one step late, so that the device never waits for the report.

  While step n is on its way, the scalars of step n - 1 are fetched; `flush` fetches those of the
  last step too, before an evaluation or a checkpoint.

  Args:
    config: the training config.
    metrics: where the numbers go.
    first_step: the step that the run goes on from.
  """

  def __init__(self, config: TrainConfig, metrics: MetricsWriter, *, first_step: int) -> None:
    self._config = config
    self._metrics = metrics
    self._pending: tuple[int, Scalars] | None = None
    length = config.data.sequence_length
    self._timer = StepTimer(
      tokens_per_step=config.batch_size * length,
      flops_per_token=flops_per_token(config.model, length),
      peak_flops=peak_flops(config.model.dtype),
    )
    self._bar = tqdm(
      total=config.num_steps, initial=first_step, unit=" steps", dynamic_ncols=True, disable=None
    )

  def add(self, step: int, scalars: Scalars) -> None:
    """Takes the scalars of a step that was just dispatched, and reports the step before it."""
    before, self._pending = self._pending, (step, scalars)
    if before is not None:
      self._report(*before)

  def flush(self) -> None:
    """Waits for the last step and reports it; what follows does not count as training time.

    Raises:
      TrainingError: a step's loss, gradient or parameters are not finite.
    """
    if self._pending is not None:
      step, scalars = self._pending
      self._pending = None
      self._report(step, scalars)
    self._metrics.sync()
    self._timer.pause()

  def evaluated(self, step: int, evaluation: Evaluation) -> None:
    """Reports an evaluation."""
    if not math.isfinite(evaluation.loss):
      raise TrainingError(f"The held-out loss at step {step} is {evaluation.loss}.")
    self._metrics.write(step, evaluation.to_dict())
    logging.info(
      "step %d  held-out loss %.4f  accuracy %.1f %%  bits per byte %.3f",
      step,
      evaluation.loss,
      100 * evaluation.accuracy,
      evaluation.bits_per_byte,
    )

  def finish(self, workdir: Path) -> None:
    """Says where everything is."""
    self._bar.close()
    logging.info("Finished. Checkpoints, %s and plots are in %s.", FILE_NAME, workdir)

  def _report(self, step: int, scalars: Scalars) -> None:
    # An explicit copy: the loop forbids implicit ones.
    values = {name: float(value) for name, value in jax.device_get(scalars).items()}
    if not all(math.isfinite(values[name]) for name in ("loss", "grad_norm", "param_norm")):
      raise TrainingError(
        f"Training diverged at step {step}: loss {values['loss']}, gradient norm "
        f"{values['grad_norm']}, norm of the parameters {values['param_norm']}. Lower "
        "config.learning_rate or raise config.warmup_steps."
      )
    self._timer.lap()
    speed = self._timer.speed()
    is_logged = step % self._config.log_every == 0 or step == self._config.num_steps
    timing = {} if speed is None else dataclasses.asdict(speed)
    self._metrics.write(step, values | timing, tensorboard=is_logged)
    shown = f"loss {values['loss']:.4f}"
    if speed is not None:
      shown += (
        f"  {speed.tokens_per_second:,.0f} tokens/s  MFU {100 * speed.mfu:.1f} %"
        f"  step {speed.step_seconds:.3f} s"
      )
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
