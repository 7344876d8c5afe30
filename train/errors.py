"""The trainer's own errors."""


class TrainingError(RuntimeError):
  """A run cannot go on; its checkpoints are intact."""


class DivergenceError(TrainingError):
  """Training diverged; every process of the run finds that out at the same step."""
