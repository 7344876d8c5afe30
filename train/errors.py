"""The trainer's own errors."""


class TrainingError(RuntimeError):
  """A run cannot continue; its checkpoints are intact."""


class DivergenceError(TrainingError):
  """Training diverged; every process of the run raises it at the same step."""
