"""Decode steps and prefill of LLaMA2-7B on a GPU, for each attention kind.

    ./workspace bench decode
    ./workspace bench decode --steps=1x16384 --largest= --prompts= --kinds=dga,dense,streaming_llm
    ./workspace bench decode --largest= --prompts= --weights=bfloat16,int8,fp8

The model has random weights in bfloat16, 32 layers, 32 KV heads and D = 128. DGA uses streaming
selection with m = 16 and f = 2. The other kinds use the settings of their papers. A decode step
runs the model, chooses the token with the highest logit and updates the cache. One program decodes
a chunk of tokens with a donated state, as in `dga_jax.generation`. The kinds alternate. Caches
contain random numbers and are full at the end of a chunk. With --weights the projections of the
layers have weights in 8 bits, of the same random numbers.

The floor is the time to read once the bytes that a token needs: all weights except the embedding
table, and the visible entries of the cache at the end of the chunk. The read rate is measured in
the same run, on an array of 4 GiB. `live` is the bytes of the visible entries, `allocated` the
bytes of the cache.
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

from benchmarks._decoder_inputs import LLAMA2_7B, random_params
from benchmarks.timing import environment, Times
from dga_jax import DGAConfig
from dga_jax.cache.layout import cache_layout
from dga_jax.generation.programs import decode_options
from dga_jax.model import Decoder, ModelConfig, quantize_weights

_KINDS = flags.DEFINE_list("kinds", ["dga", "dense"], "attention kinds to measure")
_STEPS = flags.DEFINE_list(
  "steps",
  ["1x4096", "1x8192", "1x16384", "1x32768", "4x16384"],
  "batch sizes and context lengths to decode at, as BATCHxCONTEXT",
)
_LARGEST = flags.DEFINE_list(
  "largest", ["32768"], "context lengths to decode at with the largest batch that fits each kind"
)
_PROMPTS = flags.DEFINE_list("prompts", ["32768", "131072"], "prompt lengths of the prefill")
_CACHE_DTYPE = flags.DEFINE_enum(
  "cache_dtype", None, ["int8", "float8_e4m3fn"], "dtype of DGA's compact entries"
)
_WEIGHTS = flags.DEFINE_list(
  "weights", ["bfloat16"], "weights of the projections: bfloat16, int8, fp8"
)
_LAYERS = flags.DEFINE_integer("layers", 32, "layers of the model; fewer for a quick run")
_CHUNK = flags.DEFINE_integer("decode_chunk", 32, "decode steps in one program")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "timed chunks for each kind")
_SPARE = flags.DEFINE_float(
  "spare_gb", 0.6, "GB of device memory for temporary arrays of the largest batch"
)

_READ_BYTES = 4 * 2**30


def main(argv: list[str]) -> None:
  """Prints a table of decode steps and a table of prompts."""
  del argv
  print(environment())
  rate = read_rate()
  print(f"read rate: {rate / 1e12:.3f} TB/s; chunks of {_CHUNK.value} tokens")
  models = {}
  for weights in _WEIGHTS.value:
    for kind in _KINDS.value:
      name = kind if weights == "bfloat16" else f"{kind}, {weights}"
      models[name] = _Model.from_kind(kind, weights)
  params = make_params([*models.values()])
  for weights, arrays in params.items():
    print(f"weights that a decode step reads, {weights}: {_weight_bytes(arrays) / 1e9:.2f} GB")
  programs = _Programs(models, params)
  print(
    "\n| batch, context | kind | ms per token (minimum to maximum) | floor | times the floor |",
    end="",
  )
  print(" tokens/s | cache: live, allocated |\n| --- | --- | --- | --- | --- | --- | --- |")
  for length, chunks in programs.alternating:
    arrays_of = {job: params[models[job[0]].weights] for job in chunks}
    for (kind, batch), times in _alternate(chunks, arrays_of).items():
      live = models[kind].live_bytes(length) * batch
      floor = (_weight_bytes(arrays_of[kind, batch]) + live) / rate
      allocated = models[kind].allocated_bytes(batch, length)
      ms = [f"{1e3 * x:.3f}" for x in (*times, floor)]
      print(
        f"| {batch} x {length} | {kind} | {ms[0]} ({ms[1]} to {ms[2]}) | {ms[3]} |"
        f" {times.median / floor:.3f} | {batch / times.median:.1f} |"
        f" {live / 1e9:.3f}, {allocated / 1e9:.3f} GB |",
        flush=True,
      )
  if _PROMPTS.value:
    print("\n| prompt | kind | seconds to the first token (minimum to maximum) | cache |")
    print("| --- | --- | --- | --- |")
  for (kind, length), prompt in programs.prompts.items():
    model = models[kind]
    arrays = params[model.weights]
    times = _time_prompt(prompt.result(), arrays, model.config.vocab_size, length)
    cache = "kept" if _cache_fits(models[kind], length) else "not kept"
    print(
      f"| {length} | {kind} | {times.median:.3f} ({times.minimum:.3f} to {times.maximum:.3f}) |"
      f" {cache} |",
      flush=True,
    )


@dataclasses.dataclass(frozen=True)
class _Model:
  """LLaMA2-7B with one attention kind. All kinds with the same weights share the parameters.

  Attributes:
    config: the model's config.
    weights: "bfloat16", or the dtype of weights in 8 bits.
    graphdef: the model without its parameters, for `nnx.merge`.
    params: shapes and dtypes of the parameters.
  """

  config: ModelConfig
  weights: str
  graphdef: Any
  params: Any

  @classmethod
  def from_kind(cls, kind: Any, weights: Any) -> "_Model":
    """The model with the attention kind named `kind`."""
    if kind in ("top_k_eviction", "kv_merger"):
      raise ValueError(
        f"--kinds contains {kind!r}, whose floor is unknown, because it compresses its cache"
        " repeatedly. Remove it from --kinds."
      )
    cache_dtype: Any = _CACHE_DTYPE.value  # The flag has the names of the field.
    config = ModelConfig(
      **LLAMA2_7B | {"num_layers": _LAYERS.value},
      attention=kind,
      dga=DGAConfig(selection="streaming", cache_dtype=cache_dtype),
      param_dtype="bfloat16",
    )

    def make() -> Decoder:
      model = Decoder(config, rngs=nnx.Rngs(0)).unstack_layers()
      return model if weights == "bfloat16" else quantize_weights(model, weights)

    return cls(config, weights, *nnx.split(nnx.eval_shape(make)))

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


def make_params(models: list[_Model]) -> dict[str, Any]:
  """Random parameters, normal with standard deviation 0.02, by the dtype of the weights."""
  model = next((x for x in models if x.weights == "bfloat16"), None)
  model = model or _Model.from_kind(models[0].config.attention, "bfloat16")
  drawn = random_params(model.params)
  made = {"bfloat16": drawn}
  for weights in {x.weights for x in models} - {"bfloat16"}:
    name: Any = weights  # The flag has the names of the dtypes.
    made[weights] = nnx.state(quantize_weights(model.decoder(drawn), name))
  return {weights: made[weights] for weights in dict.fromkeys(x.weights for x in models)}


def _weight_bytes(params: Any) -> int:
  """Bytes of the weights that a decode step reads: all but the embedding table."""
  total = sum(x.nbytes for x in jax.tree.leaves(params))
  return int(total - params["embedding"][...].nbytes)


def read_rate() -> float:
  """Bytes per second that a maximum over 4 GiB reads, the fastest of ten samples."""
  array = jax.jit(lambda: jax.random.bits(jax.random.key(0), (_READ_BYTES // 2**14, 2**12)))()
  maximum = jax.jit(lambda x: x.max(axis=1))
  jax.block_until_ready(maximum(array))
  seconds = []
  for _ in range(10):
    start = time.perf_counter()
    for _ in range(4):
      out = maximum(array)
    jax.block_until_ready(out)
    seconds.append((time.perf_counter() - start) / 4)
  return _READ_BYTES / min(seconds)


type _Job = tuple[str, int]  # Attention kind and batch size.
type _State = tuple[Any, Array]  # Cache and last tokens.


@dataclasses.dataclass(frozen=True)
class _DecodeChunk:
  """Two programs of one attention kind: `start` makes a state, `decode` decodes a chunk from it."""

  start: Callable[[Array], _State]
  decode: Callable[[Any, _State], _State]

  @classmethod
  def compile(cls, model: _Model, params: Any, batch: int, length: int) -> "_DecodeChunk":
    """Compiles `decode` for caches that hold `length` tokens after the chunk."""

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
  """The programs to be timed. They compile in parallel, because compilation takes most of the time.

  Attributes:
    alternating: context lengths, each with the chunks that alternate at that length.
    prompts: the compiled prefill by attention kind and prompt length.
  """

  def __init__(self, models: dict[str, _Model], params: dict[str, Any]) -> None:
    pool = concurrent.futures.ThreadPoolExecutor(8)
    steps = [tuple(map(int, text.split("x"))) for text in _STEPS.value]
    self.alternating = [
      (
        length,
        {
          (kind, batch): pool.submit(
            _DecodeChunk.compile, model, params[model.weights], batch, length
          )
          for kind, model in models.items()
        },
      )
      for batch, length in steps
    ]
    for length in map(int, _LARGEST.value):  # Each fills the memory, so the kinds run one by one.
      for kind, model in models.items():
        batch = _largest_batch(model, length)
        chunk = pool.submit(_DecodeChunk.compile, model, params[model.weights], batch, length)
        self.alternating.append((length, {(kind, batch): chunk}))
    self.prompts = {
      (kind, length): pool.submit(_compile_prompt, model, params[model.weights], length)
      for length in map(int, _PROMPTS.value)
      for kind, model in models.items()
    }
    futures: list[Future[Any]] = [*self.prompts.values()]
    futures += [chunk for _, chunks in self.alternating for chunk in chunks.values()]
    completed = concurrent.futures.as_completed(futures)
    for future in tqdm(completed, total=len(futures), desc="compiling", disable=None):
      future.result()


def _largest_batch(model: _Model, length: int) -> int:
  """The largest batch whose cache fits the device beside the weights and --spare_gb."""
  stats = jax.devices()[0].memory_stats() or {}
  free = stats["bytes_limit"] - stats["bytes_in_use"] - _SPARE.value * 1e9
  return int(free // model.allocated_bytes(1, length))


def _alternate(
  chunks: dict[_Job, Future[_DecodeChunk]], params: dict[_Job, Any]
) -> dict[_Job, Times]:
  """Times the chunks in alternating rounds; returns seconds per token.

  Each sample makes a new state and then deletes it, because two states may not fit the memory.
  """
  samples: dict[_Job, list[float]] = {job: [] for job in chunks}
  for number in range(_ROUNDS.value + 1):
    for job, compiled in chunks.items():
      chunk = compiled.result()
      state = jax.block_until_ready(chunk.start(jax.random.key(number)))
      start = time.perf_counter()
      state = jax.block_until_ready(chunk.decode(params[job], state))
      if number:
        samples[job].append((time.perf_counter() - start) / _CHUNK.value)
      del state
  return {job: Times.from_samples(values) for job, values in samples.items()}


def _cache_fits(model: _Model, length: int) -> bool:
  """Whether the cache of a prompt is below 40 GB. A dense cache of 128K tokens is not."""
  return model.allocated_bytes(1, length) < 40e9


def _compile_prompt(model: _Model, params: Any, length: int) -> Callable[..., Any]:
  """Compiles the prefill of a prompt and the greedy choice of the first token."""

  def first(params: Any, tokens_1xL: Array) -> tuple[Array, Any]:
    decoder = model.decoder(params)
    if _cache_fits(model, length):
      logits_1xV, cache = decoder.prefill(tokens_1xL, max_length=length)
      return jnp.argmax(logits_1xV, axis=-1), cache
    return jnp.argmax(decoder.unembed(decoder.hidden(tokens_1xL)[:, -1]), axis=-1), None

  compiled: Callable[..., Any] = (
    jax.jit(first).lower(params, jax.ShapeDtypeStruct((1, length), jnp.int32)).compile()
  )
  return compiled


def _time_prompt(run: Callable[..., Any], params: Any, vocab_size: int, length: int) -> Times:
  """Seconds to the first token of three random prompts. A first prompt is not timed."""
  seconds = []
  for number in range(4):
    tokens = jax.random.randint(jax.random.key(number), (1, length), 0, vocab_size)
    jax.block_until_ready(tokens)
    start = time.perf_counter()
    jax.block_until_ready(run(params, tokens))
    seconds.append(time.perf_counter() - start)
  return Times.from_samples(seconds[1:])


if __name__ == "__main__":
  app.run(main)
