"""Generation: the engine, continuous batching on it, and sampling."""

from dga_jax.generation.continuous_batching import ContinuousBatching, generate, Generation
from dga_jax.generation.engine import Engine
from dga_jax.generation.requests import (
  Emitted,
  EngineStatus,
  EngineStoppedError,
  QueueFullError,
  Request,
  TokenLogprobs,
)
from dga_jax.generation.sampling import Sampling

__all__ = [
  "ContinuousBatching",
  "Emitted",
  "Engine",
  "EngineStatus",
  "EngineStoppedError",
  "Generation",
  "QueueFullError",
  "Request",
  "Sampling",
  "TokenLogprobs",
  "generate",
]
