"""Generation: continuous batching, the compiled engine under it, and sampling."""

from dga_jax.generation.continuous_batching import (
  ContinuousBatching,
  Emitted,
  generate,
  Generation,
  Request,
)
from dga_jax.generation.sampling import Sampling

__all__ = ["ContinuousBatching", "Emitted", "Generation", "Request", "Sampling", "generate"]
