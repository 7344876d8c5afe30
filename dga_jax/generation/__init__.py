"""Continuing prompts: a batch of requests kept full, its programs, how a token is drawn."""

from dga_jax.generation.request_batch import Emitted, generate, Generation, Request, RequestBatch
from dga_jax.generation.sampling import Sampling

__all__ = ["Emitted", "Generation", "Request", "RequestBatch", "Sampling", "generate"]
