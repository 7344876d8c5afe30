"""Decode steps and prefill of LLaMA2-7B on a GPU: DGA, dense and the other attention kinds.

    ./workspace bench decode
    ./workspace bench decode --steps=1x16384 --largest= --prompts= --kinds=dga,dense,streaming_llm

The model has random weights in bfloat16, 32 layers, 32 KV heads and D = 128. DGA is streaming with
m = 16 and f = 2; the baselines have the settings of their papers. A step is the model, the greedy
choice of a token and the update of the cache. One program decodes a chunk of tokens and its state
is donated, as in `dga_jax.generation`. The kinds take turns. Caches hold random numbers and are
full at the end of a chunk.

The floor is the time to read once the bytes that a token needs: all weights except the embedding
table, and the visible entries of the cache at the end of the chunk. The rate is that of a large
read in the same run. `live` is the bytes of the visible entries, `allocated` those of the cache.
"""

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx
from jax import Array
from tqdm import tqdm

from benchmarks.timing import environment, Times
from dga_jax import DGAConfig
from dga_jax.cache.layout import cache_layout
from dga_jax.generation.programs import decode_options
from dga_jax.model import Decoder, ModelConfig

_KINDS = flags.DEFINE_list("kinds", ["dga", "dense"], "attention kinds to measure")
_STEPS = flags.DEFINE_list(
  "steps",
  ["1x4096", "1x8192", "1x16384", "1x32768", "4x16384"],
  "batch x context, one row of the table each",
)
_LARGEST = flags.DEFINE_list(
  "largest", ["32768"], "contexts that are measured with the largest batch that fits, of each kind"
)
_PROMPTS = flags.DEFINE_list("prompts", ["32768", "131072"], "lengths of the prompts")
_CACHE_DTYPE = flags.DEFINE_enum(
  "cache_dtype", None, ["int8", "float8_e4m3fn"], "dtype of DGA's compact entries"
)
_LAYERS = flags.DEFINE_integer("layers", 32, "layers of the model; fewer for a quick run")
_CHUNK = flags.DEFINE_integer("decode_chunk", 32, "decode steps of one program")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "timed chunks of each kind")
_SPARE = flags.DEFINE_float("spare_gb", 0.6, "GB of memory that the largest batch leaves free")

_READ_BYTES = 4 * 2**30


def main(argv: list[str]) -> None:
  """Prints a table of decode steps and one of prompts."""
  del argv
  print(environment())
  rate = read_rate()
  print(f"a large read: {rate / 1e12:.3f} TB/s; chunks of {_CHUNK.value} tokens")
  models = {kind: _Model.from_kind(kind) for kind in _KINDS.value}
  params = make_params(next(iter(models.values())))
  weights = sum(x.nbytes for x in jax.tree.leaves(params)) - _embedding_bytes(params)
  print(f"weights that one token reads: {weights / 1e9:.2f} GB")
  programs = _Programs(models, params)
  print(
    "\n| batch, context | kind | ms a token (lowest to highest) | floor | times the floor |", end=""
  )
  print(" tokens/s | cache: live, allocated |\n| --- | --- | --- | --- | --- | --- | --- |")
  for length, cells in programs.turns:
    for (kind, batch), times in _alternate(cells, params).items():
      live = models[kind].live_bytes(length) * batch
      floor = (weights + live) / rate
      allocated = models[kind].allocated_bytes(batch, length)
      ms = [f"{1e3 * x:.3f}" for x in (*times, floor)]
      print(
        f"| {batch} x {length} | {kind} | {ms[0]} ({ms[1]} to {ms[2]}) | {ms[3]} |"
        f" {times.median / floor:.3f} | {batch / times.median:.1f} |"
        f" {live / 1e9:.3f}, {allocated / 1e9:.3f} GB |",
        flush=True,
      )
  if _PROMPTS.value:
    print("\n| prompt | kind | seconds to the first token (lowest to highest) | cache |")
    print("| --- | --- | --- | --- |")
  for (kind, length), prompt in programs.prompts.items():
    times = _time_prompt(prompt.result(), params, models[kind].config.vocab_size, length)
    cache = "kept" if _keeps(models[kind], length) else "not kept"
    print(
      f"| {length} | {kind} | {times.median:.3f} ({times.least:.3f} to {times.most:.3f}) |"
      f" {cache} |",
      flush=True,
    )


@dataclasses.dataclass(frozen=True)
class _Model:
  """LLaMA2-7B with one attention kind. All kinds share the parameters."""

  config: ModelConfig
  graphdef: Any
  params: Any  # shapes

  @classmethod
  def from_kind(cls, kind: Any) -> "_Model":
    """The model with that attention kind."""
    if kind in ("top_k_eviction", "kv_merger"):
      raise ValueError(
        f"--kinds has {kind!r}; it must be a kind with a cache that fills up. The floor of this"
        " kind, which compresses its cache again and again, is unknown: leave it out."
      )
    config = ModelConfig(
      vocab_size=32000,
      num_layers=_LAYERS.value,
      embed_dim=4096,
      num_heads=32,
      num_kv_heads=32,
      head_dim=128,
      mlp_dim=11008,
      attention=kind,
      dga=DGAConfig(selection="streaming", cache_dtype=_CACHE_DTYPE.value),
      param_dtype="bfloat16",
    )
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)).unstack_layers())
    return cls(config, *nnx.split(abstract))

  def decoder(self, params: Any) -> Decoder:
    """The model with these parameters."""
    model: Decoder = nnx.merge(self.graphdef, params)
    return model

  def live_bytes(self, length: int) -> float:
    """Bytes of the entries that the next token of a sequence of `length` tokens sees."""
    config, token = self.config, 2 * 2 * self.config.num_kv_heads * self.config.head_dim
    if config.attention != "dga":
      return self.allocated_bytes(1, length)  # a token reads the whole of a full cache
    layout, sinks = cache_layout(config.dga), config.dga.sink_tokens
    coords = layout.locate(length, sinks)
    entries = int(layout.earlier_blocks(coords, prefix=sinks).compact_end)
    raw = int(layout.raw_tokens(coords))
    entry = token if config.dga.cache_dtype is None else token // 2 + 2 * 4 * config.num_kv_heads
    return config.num_layers * (entries * entry + raw * token)

  def allocated_bytes(self, batch: int, length: int) -> int:
    """Bytes of the arrays of the cache."""
    cache = jax.eval_shape(lambda p: self.decoder(p).init_cache(batch, length), self.params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


def make_params(model: _Model) -> Any:
  """Normal random numbers with standard deviation 0.02, in the shapes of the model."""

  @functools.partial(jax.jit, static_argnums=(1, 2))  # compiles once per shape
  def draw(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return 0.02 * jax.random.normal(key, shape, dtype)

  leaves, tree = jax.tree.flatten(model.params)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  drawn = [draw(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)]
  return jax.block_until_ready(jax.tree.unflatten(tree, drawn))


def _embedding_bytes(params: Any) -> int:
  return int(params["embedding"][...].nbytes)


def read_rate() -> float:
  """Bytes per second of a reduction over 4 GiB, the best of ten runs."""
  array = jax.jit(lambda: jax.random.bits(jax.random.key(0), (_READ_BYTES // 2**14, 2**12)))()
  most = jax.jit(lambda x: x.max(axis=1))
  jax.block_until_ready(most(array))
  seconds = []
  for _ in range(10):
    start = time.perf_counter()
    for _ in range(4):
      out = most(array)
    jax.block_until_ready(out)
    seconds.append((time.perf_counter() - start) / 4)
  return _READ_BYTES / min(seconds)


type _Cell = tuple[str, int]  # kind and batch
type _State = tuple[Any, Array]  # cache and last tokens


@dataclasses.dataclass(frozen=True)
class _DecodeChunk:
  """Two compiled programs of one kind: one makes a state, one decodes a chunk from it."""

  start: Callable[[Array], _State]
  decode: Callable[[Any, _State], _State]

  @classmethod
  def compile(cls, model: _Model, params: Any, batch: int, length: int) -> "_DecodeChunk":
    """For caches that hold `length` tokens after the chunk."""

    def start(key: Array) -> _State:
      cache = model.decoder(model.params).init_cache(batch, length)
      cache = jax.tree_util.tree_map_with_path(functools.partial(fill, key), cache)
      return cache, jax.random.randint(key, (batch,), 0, model.config.vocab_size)

    def fill(key: Array, path: Any, x: Array) -> Array:
      name = path[-1].name
      if name == "length":
        return jnp.full_like(x, length - _CHUNK.value)
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

      return jax.lax.scan(step, state, None, length=_CHUNK.value)[0]

    state = jax.eval_shape(start, jax.random.key(0))
    lowered = jax.jit(decode, donate_argnums=1).lower(params, state)
    compiled = lowered.compile(compiler_options=decode_options())
    return cls(jax.jit(start), compiled)


class _Programs:
  """The programs to be timed. They compile in parallel, which takes most of a run."""

  def __init__(self, models: dict[str, _Model], params: Any) -> None:
    pool = concurrent.futures.ThreadPoolExecutor(8)
    steps = [tuple(map(int, text.split("x"))) for text in _STEPS.value]
    self.turns = [  # a context, and the cells that take turns at it
      (
        length,
        {
          (kind, batch): pool.submit(_DecodeChunk.compile, model, params, batch, length)
          for kind, model in models.items()
        },
      )
      for batch, length in steps
    ]
    for length in map(int, _LARGEST.value):  # each cell fills the memory, so that none take turns
      for kind, model in models.items():
        batch = _largest(model, length)
        chunk = pool.submit(_DecodeChunk.compile, model, params, batch, length)
        self.turns.append((length, {(kind, batch): chunk}))
    self.prompts = {
      (kind, length): pool.submit(_compile_prompt, model, params, length)
      for length in map(int, _PROMPTS.value)
      for kind, model in models.items()
    }
    every: list[Future[Any]] = [*self.prompts.values()]
    every += [chunk for _, cells in self.turns for chunk in cells.values()]
    for done in tqdm(concurrent.futures.as_completed(every), total=len(every), desc="compiling"):
      done.result()


def _largest(model: _Model, length: int) -> int:
  """The largest batch for which cache, weights and temporary arrays fit the device."""
  stats = jax.devices()[0].memory_stats() or {}
  free = stats["bytes_limit"] - stats["bytes_in_use"] - _SPARE.value * 1e9
  return int(free // model.allocated_bytes(1, length))


def _alternate(cells: dict[_Cell, Future[_DecodeChunk]], params: Any) -> dict[_Cell, Times]:
  """Seconds per token. Every round makes its state anew: two states may not fit the memory."""
  samples: dict[_Cell, list[float]] = {cell: [] for cell in cells}
  for number in range(_ROUNDS.value + 1):
    for cell, compiled in cells.items():
      chunk = compiled.result()
      state = jax.block_until_ready(chunk.start(jax.random.key(number)))
      start = time.perf_counter()
      state = jax.block_until_ready(chunk.decode(params, state))
      if number:
        samples[cell].append((time.perf_counter() - start) / _CHUNK.value)
      del state
  return {cell: Times.of(values) for cell, values in samples.items()}


def _keeps(model: _Model, length: int) -> bool:
  """Whether a prompt's cache is kept. A dense cache of 128K tokens does not fit."""
  return model.allocated_bytes(1, length) < 40e9


def _compile_prompt(model: _Model, params: Any, length: int) -> Callable[..., Any]:
  """Compiles the prefill of a prompt and the choice of the first token."""

  def first(params: Any, tokens_1xL: Array) -> tuple[Array, Any]:
    decoder = model.decoder(params)
    if _keeps(model, length):
      logits_1xV, cache = decoder.prefill(tokens_1xL, max_length=length)
      return jnp.argmax(logits_1xV, axis=-1), cache
    return jnp.argmax(decoder.unembed(decoder.hidden(tokens_1xL)[:, -1]), axis=-1), None

  compiled: Callable[..., Any] = (
    jax.jit(first).lower(params, jax.ShapeDtypeStruct((1, length), jnp.int32)).compile()
  )
  return compiled


def _time_prompt(run: Callable[..., Any], params: Any, vocab_size: int, length: int) -> Times:
  """Seconds to the first token of three new prompts, after one that is not timed."""
  seconds = []
  for number in range(4):
    tokens = jax.random.randint(jax.random.key(number), (1, length), 0, vocab_size)
    jax.block_until_ready(tokens)
    start = time.perf_counter()
    jax.block_until_ready(run(params, tokens))
    seconds.append(time.perf_counter() - start)
  return Times.of(seconds[1:])


if __name__ == "__main__":
  app.run(main)
