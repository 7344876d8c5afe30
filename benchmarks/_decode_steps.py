"""Timed decode steps of a decoder with random weights.

A decode step runs the model, chooses the token with the highest logit and updates the cache. One
program decodes a chunk of tokens with a donated state, as in `dga_jax.generation`. Caches contain
random numbers and are full at the end of a chunk.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from benchmarks.timing import Times
from dga_jax.cache.layout import cache_layout
from dga_jax.generation.programs import decode_options
from dga_jax.model import Decoder, ModelConfig, quantize_weights
from dga_jax.model.quantized import WeightName

READ_BYTES = 4 * 2**30


@dataclasses.dataclass(frozen=True)
class StepModel:
  """A decoder without its parameters. Models that differ in attention alone share parameters.

  Attributes:
    config: the model's config.
    graphdef: for `nnx.merge`.
    params: shapes and dtypes of the parameters.
  """

  config: ModelConfig
  graphdef: Any
  params: Any

  @classmethod
  def from_config(cls, config: ModelConfig, weights: WeightName | None = None) -> "StepModel":
    """The model with layers apart, as generation runs it.

    Args:
      config: of the model.
      weights: the dtype of projections in 8 bits; None for `config.param_dtype`.
    """

    def make() -> Decoder:
      model = Decoder(config, rngs=nnx.Rngs(0)).unstack_layers()
      return model if weights is None else quantize_weights(model, weights)

    return cls(config, *nnx.split(nnx.eval_shape(make)))

  def decoder(self, params: Any) -> Decoder:
    """The decoder with the parameters `params`."""
    model: Decoder = nnx.merge(self.graphdef, params)
    return model

  def live_bytes(self, length: int) -> float:
    """Bytes of the cache entries visible to the next token, after `length` tokens."""
    config, token = self.config, 2 * 2 * self.config.num_kv_heads * self.config.head_dim
    if config.attention != "dga":
      return self.allocated_bytes(1, length)  # Every entry of a full cache is visible.
    layout, sinks = cache_layout(config.dga), config.dga.sink_tokens
    coords = layout.locate(length, sinks)
    entries = int(layout.earlier_blocks(coords, prefix=sinks).compact_end)
    raw = int(layout.raw_tokens(coords))
    entry = token if config.dga.cache_dtype is None else token // 2 + 2 * 4 * config.num_kv_heads
    return config.num_layers * (entries * entry + raw * token)

  def allocated_bytes(self, batch: int, length: int) -> int:
    """Bytes of the arrays of a cache for `batch` sequences of `length` tokens."""
    cache = jax.eval_shape(lambda p: self.decoder(p).init_cache(batch, length), self.params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


def weight_bytes(params: Any) -> int:
  """Bytes of the weights that a decode step reads: all but the embedding table."""
  total = sum(x.nbytes for x in jax.tree.leaves(params))
  return int(total - params["embedding"][...].nbytes)


def read_rate(size: int = READ_BYTES) -> float:
  """Bytes per second that a maximum over an array of `size` bytes reads; the fastest of ten."""
  array = jax.jit(lambda: jax.random.bits(jax.random.key(0), (size // 2**14, 2**12)))()
  maximum = jax.jit(lambda x: x.max(axis=1))
  jax.block_until_ready(maximum(array))
  seconds = []
  for _ in range(10):
    start = time.perf_counter()
    for _ in range(4):
      out = maximum(array)
    jax.block_until_ready(out)
    seconds.append((time.perf_counter() - start) / 4)
  return size / min(seconds)


type _State = tuple[Any, Array]  # Cache and last tokens.


@dataclasses.dataclass(frozen=True)
class DecodeChunk:
  """Two programs of one model: `start` makes a state, `decode` decodes a chunk from it.

  Attributes:
    start: makes a state from a random key.
    decode: from the parameters and a state, which it donates.
    tokens: of each sequence in a chunk.
  """

  start: Callable[[Array], _State]
  decode: Callable[[Any, _State], _State]
  tokens: int

  @classmethod
  def compile(
    cls, model: StepModel, params: Any, batch: int, length: int, tokens: int
  ) -> "DecodeChunk":
    """Compiles both programs for caches that hold `length` tokens after a chunk of `tokens`.

    Args:
      model: the decoder.
      params: its parameters, or their shapes and dtypes.
      batch: sequences.
      length: tokens in the cache after the chunk.
      tokens: of each sequence in the chunk.
    """

    def start(key: Array) -> _State:
      cache = model.decoder(model.params).init_cache(batch, length)
      cache = jax.tree_util.tree_map_with_path(functools.partial(fill, key), cache)
      return cache, jax.random.randint(key, (batch,), 0, model.config.vocab_size)

    def fill(key: Array, path: Any, x: Array) -> Array:
      name = path[-1].name
      if name == "length":
        return jnp.full_like(x, length - tokens)
      if name in ("key_scale", "value_scale"):
        return x / 64
      if x.dtype == jnp.int8:
        return jax.random.randint(key, x.shape, -127, 128, x.dtype)
      return x if x.dtype == jnp.int32 else jax.random.normal(key, x.shape, x.dtype)

    def decode(params: Any, state: _State) -> _State:
      decoder = model.decoder(params)

      def step(state: _State, _: None) -> tuple[_State, None]:
        logits_BxV, cache = decoder.decode(state[1], state[0])
        return (cache, jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)), None

      return jax.lax.scan(step, state, None, length=tokens)[0]

    key = jax.eval_shape(lambda: jax.random.key(0))
    lowered = jax.jit(decode, donate_argnums=1).lower(params, jax.eval_shape(start, key))
    compiled = lowered.compile(compiler_options=decode_options())
    return cls(jax.jit(start).lower(key).compile(), compiled, tokens)


def alternate_chunks[Name](
  chunks: Mapping[Name, DecodeChunk], params: Mapping[Name, Any], *, rounds: int
) -> dict[Name, Times]:
  """Times the chunks in alternating rounds; returns seconds per token.

  Each sample makes a new state and then deletes it, because two states may not fit the memory.

  Args:
    chunks: by name.
    params: of the models of the chunks.
    rounds: timed chunks for each name. One more chunk of each name runs before, without timing.
  """
  samples: dict[Name, list[float]] = {name: [] for name in chunks}
  for number in range(rounds + 1):
    for name, chunk in chunks.items():
      state = jax.block_until_ready(chunk.start(jax.random.key(number)))
      start = time.perf_counter()
      state = jax.block_until_ready(chunk.decode(params[name], state))
      if number:
        samples[name].append((time.perf_counter() - start) / chunk.tokens)
      del state
  return {name: Times.from_samples(values) for name, values in samples.items()}
