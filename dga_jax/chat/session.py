"""A session: one sequence of tokens and its cache, which continue from turn to turn.

`dga_jax.generation` serves batches of independent prompts. A session serves one user: it reads
tokens into the cache of a model, generates, and reads again without repeating earlier tokens. The
cache grows with the sequence, and `fork` copies a session whose tokens have several continuations.
"""

import copy
import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dga_jax.generation.cache_shapes import content_bytes
from dga_jax.generation.sampling import NOT_FINITE, sample, Sampling, SamplingParams
from dga_jax.generation.weights import in_compute_dtype
from dga_jax.model import Decoder
from dga_jax.model.attention_kinds.base import AttentionKind
from dga_jax.model.decoder import DecoderCache
from pallas_kernels.dispatch import find_target

_LEAST_CAPACITY = 512  # Tokens; capacities are this number times a power of two.
_SHORT, _LONG = 64, 1024  # Tokens of a chunk that one program reads.


class Session:
  """The tokens that a model has read, and their cache.

  Args:
    model: its attention kind must append several tokens at once: "dense", "dga" with streaming
      selection, "head_budgets", or a kind with a sliding window.

  Attributes:
    model: with its weights in the dtype of the products.
    tokens: token ids in the cache.

  Raises:
    ValueError: the attention kind of the model cannot continue a cache, or a weight overflows
      float16.
  """

  def __init__(self, model: Decoder) -> None:
    config = model.config
    if type(config.make_attention()).extend is AttentionKind.extend:
      raise ValueError(
        f"attention is {config.attention!r}, whose cache does not continue from turn to turn; use"
        " attention='dense' or attention='dga'."
      )
    if config.attention == "dga" and config.dga.selection != "streaming":
      raise ValueError(
        f"dga.selection is {config.dga.selection!r}, which ranks all tokens of a prompt together; a"
        " cache that continues from turn to turn needs selection='streaming' or attention='dense'."
      )
    graphdef, params = nnx.split(model)
    self.model: Decoder = nnx.merge(graphdef, in_compute_dtype(params, config.dtype))
    self.tokens: list[int] = []
    # XLA compiles a scan over stacked layers once, and unstacked layers one by one. A step of the
    # scan copies a layer's weights, which slows down decoding on GPUs and TPUs.
    decoder = self.model if find_target().platform == "cpu" else self.model.unstack_layers()
    self._reader, self._reader_params = nnx.split(self.model)
    self._decoder, self._decoder_params = nnx.split(decoder)
    self._cache: DecoderCache | None = None
    self._logits_1xV: Float[Array, "1 V"] | None = None
    self._extend = jax.jit(self._extend_program, donate_argnums=1)
    self._step = jax.jit(self._step_program, donate_argnums=1)

  def clear(self) -> None:
    """Forgets all tokens."""
    self.tokens, self._cache, self._logits_1xV = [], None, None

  def fork(self) -> Self:
    """A session with a copy of the cache; both share the weights and the compiled programs."""
    other = copy.copy(self)
    other.tokens = list(self.tokens)
    other._cache = jax.tree.map(jnp.copy, self._cache)
    return other

  def read(self, tokens: Sequence[int]) -> None:
    """Appends tokens.

    Raises:
      ValueError: there is no token, or one that the model does not have.
    """
    V = self.model.config.vocab_size
    if not tokens or min(tokens) < 0 or max(tokens) >= V:
      raise ValueError(f"tokens must have at least one token id, and ids from 0 to {V - 1}.")
    self._make_room(len(tokens))  # Once, since each capacity has a program of its own.
    at = 0
    while at < len(tokens):
      size = _LONG if len(tokens) - at > 4 * _SHORT else _SHORT
      self._read_chunk(tokens[at : at + size], size)
      at += size

  def generate(
    self, sampling: Sampling, *, max_new_tokens: int, stop_ids: Collection[int]
  ) -> Iterator[int]:
    """Samples tokens and reads them, up to a stop token, which is neither yielded nor read.

    A consumer that stops early leaves a session without the last token that it was given.

    Args:
      sampling: how tokens are sampled.
      max_new_tokens: bound on the number of tokens.
      stop_ids: tokens that end the text.

    Raises:
      FloatingPointError: the logits are NaN or infinite.
      ValueError: nothing was read since the last token was generated.
    """
    if self._logits_1xV is None:
      raise ValueError("The session has read no token since it generated one; read a prompt first.")
    params = SamplingParams.from_samplings([sampling])
    token = int(_sample(self._logits_1xV, params, jnp.zeros(1, jnp.int32))[0])
    self._logits_1xV = None
    for count in range(1, max_new_tokens + 1):
      if token == NOT_FINITE:
        raise FloatingPointError(
          f"The logits are NaN or infinite after {len(self.tokens)} tokens. The model's weights are"
          f" damaged, or its activations overflow {self.model.config.dtype}."
        )
      if token in stop_ids:
        return
      yield token
      self._make_room(1)
      next_1, self._cache = self._step(
        self._decoder_params,
        self._cache,
        np.array([token], np.int32),
        params,
        np.array([count], np.int32),
      )
      self.tokens.append(token)
      token = int(next_1[0])

  def cache(self) -> DecoderCache:
    """The cache of exactly the tokens so far, to be stored.

    Raises:
      ValueError: the session has no tokens.
    """
    if self._cache is None:
      raise ValueError("The session has no tokens; read some first.")
    return resized(self.model, self._cache, len(self.tokens))

  def restore(self, tokens: Sequence[int], cache: DecoderCache) -> None:
    """Replaces the tokens and their cache by stored ones; the next call must be `read`."""
    self.clear()
    self.tokens, self._cache = list(tokens), cache
    self._cache = resized(self.model, cache, _capacity(len(tokens)))

  @property
  def is_intact(self) -> bool:
    """False after an interruption inside `read` or `generate` that lost the cache."""
    return not any(array.is_deleted() for array in jax.tree.leaves(self._cache))

  @property
  def cache_bytes(self) -> int:
    """Bytes of the keys and values of the cache, with the scales of entries in 8 bits."""
    return content_bytes(self._cache)

  def _read_chunk(self, tokens: Sequence[int], size: int) -> None:
    chunk_1xT = np.zeros((1, size), np.int32)
    chunk_1xT[0, : len(tokens)] = tokens
    self._logits_1xV, self._cache = self._extend(
      self._reader_params, self._cache, chunk_1xT, np.array([len(tokens)], np.int32)
    )
    self.tokens.extend(tokens)

  def _make_room(self, count: int) -> None:
    used = len(self.tokens)
    wanted = _capacity(used + count)
    if self._cache is None:
      self._cache = self.model.init_cache(1, wanted)
    elif wanted > _capacity(used):
      self._cache = resized(self.model, self._cache, wanted)

  def _extend_program(
    self, params: Any, cache: DecoderCache, chunk_1xT: Array, length_1: Array
  ) -> tuple[Array, DecoderCache]:
    return nnx.merge(self._reader, params).extend(chunk_1xT, cache, length_1)

  def _step_program(
    self,
    params: Any,
    cache: DecoderCache,
    token_1: Array,
    sampling: SamplingParams,
    sampled_1: Array,
  ) -> tuple[Array, DecoderCache]:
    logits_1xV, cache = nnx.merge(self._decoder, params).decode(token_1, cache)
    return sample(logits_1xV, sampling, sampled_1), cache


def resized(model: Decoder, cache: DecoderCache, max_length: int) -> DecoderCache:
  """The cache of one sequence with room for another number of tokens.

  No entry of a dense cache, of a compact cache under streaming selection or of a sliding window
  ever moves: a larger cache has more entries behind the used ones, and a smaller one has fewer. A
  window is only smaller than its setting while no token has left it.

  Args:
    model: of the cache.
    cache: of one sequence.
    max_length: at least the tokens of the sequence.
  """
  wanted = jax.eval_shape(functools.partial(model.init_cache, 1, max_length))

  def fit(array: Array, target: jax.ShapeDtypeStruct) -> Array:
    kept = array[tuple(map(slice, target.shape))]
    free = [(0, new - old) for new, old in zip(target.shape, kept.shape, strict=True)]
    return jnp.pad(kept, free)

  leaves = zip(jax.tree.leaves(cache), jax.tree.leaves(wanted), strict=True)
  return jax.tree.unflatten(jax.tree.structure(wanted), [fit(*pair) for pair in leaves])


_sample = jax.jit(sample)


def _capacity(length: int) -> int:
  capacity = _LEAST_CAPACITY
  while capacity < length:
    capacity *= 2
  return capacity
