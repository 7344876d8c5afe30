"""Continuing prompts: a batch of requests kept full, its programs, how a token is drawn."""

from dga_jax.generation.continuous_batching import (
  ContinuousBatching,
  Emitted,
  generate,
  Generation,
  Request,
)
from dga_jax.generation.sampling import Sampling

__all__ = ["ContinuousBatching", "Emitted", "Generation", "Request", "Sampling", "generate"]
