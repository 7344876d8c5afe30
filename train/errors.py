"""The trainer's own errors."""


class TrainingError(RuntimeError):
  """A run cannot go on; its checkpoints are intact."""
