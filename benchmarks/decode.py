"""Decode steps and prefill of LLaMA2-7B on a GPU, for each attention kind.

    ./workspace bench decode
    ./workspace bench decode --steps=1x16384 --largest= --prompts= --kinds=dga,dense,streaming_llm
    ./workspace bench decode --largest= --prompts= --weights=bfloat16,int8,fp8
    ./workspace bench decode --steps=1x16384 --largest= --prompts= --kinds=dga --group_size=8

The model has random weights in bfloat16, 32 layers, 32 KV heads and D = 128. DGA uses streaming
selection with m = 16 and f = 2, or the blocks of --group_size, --focal_per_block, --sink_tokens and
--local_window. The other kinds use the settings of their papers. The kinds alternate. With
--weights the projections of the layers have weights in 8 bits, of the same random numbers.
`benchmarks/_decode_steps.py` describes a decode step.

The floor is the time to read once the bytes that a token needs: all weights except the embedding
table, and the visible entries of the cache at the end of the chunk. The read rate is measured in
the same run, on an array of 4 GiB. `live` is the bytes of the visible entries, `allocated` the
bytes of the cache.
"""

import concurrent.futures
import dataclasses
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

from benchmarks._block_flags import block_config
from benchmarks._decode_steps import (
  alternate_chunks,
  DecodeChunk,
  read_rate,
  StepModel,
  weight_bytes,
)
from benchmarks._decoder_inputs import LLAMA2_7B, random_params
from benchmarks.timing import environment, Times
from dga_jax.model import ModelConfig, quantize_weights

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


def main(argv: list[str]) -> None:
  """Prints a table of decode steps and a table of prompts."""
  del argv
  print(environment())
  rate = read_rate()
  print(f"read rate: {rate / 1e12:.3f} TB/s; chunks of {_CHUNK.value} tokens")
  print(block_config("streaming"))
  models = {
    _name(kind, weights): _model(kind, weights)
    for weights in _WEIGHTS.value
    for kind in _KINDS.value
  }
  params = _make_params()
  for weights in _WEIGHTS.value:
    read = weight_bytes(params[_name(_KINDS.value[0], weights)])
    print(f"weights that a decode step reads, {weights}: {read / 1e9:.2f} GB")
  programs = _Programs(models, params)
  print(
    "\n| batch, context | kind | ms per token (minimum to maximum) | floor | times the floor |",
    end="",
  )
  print(" tokens/s | cache: live, allocated |\n| --- | --- | --- | --- | --- | --- | --- |")
  for length, futures in programs.alternating:
    chunks = {job: future.result() for job, future in futures.items()}
    timings = alternate_chunks(
      chunks, {job: params[job[0]] for job in chunks}, rounds=_ROUNDS.value
    )
    for (name, batch), times in timings.items():
      live = models[name].live_bytes(length) * batch
      floor = (weight_bytes(params[name]) + live) / rate
      allocated = models[name].allocated_bytes(batch, length)
      ms = [f"{1e3 * x:.3f}" for x in (*times, floor)]
      print(
        f"| {batch} x {length} | {name} | {ms[0]} ({ms[1]} to {ms[2]}) | {ms[3]} |"
        f" {times.median / floor:.3f} | {batch / times.median:.1f} |"
        f" {live / 1e9:.3f}, {allocated / 1e9:.3f} GB |",
        flush=True,
      )
  if _PROMPTS.value:
    print("\n| prompt | kind | seconds to the first token (minimum to maximum) | cache |")
    print("| --- | --- | --- | --- |")
  for (kind, length), prompt in programs.prompts.items():
    vocab_size = models[kind].config.vocab_size
    times = _time_prompt(prompt.result(), params[kind], vocab_size, length)
    cache = "kept" if _cache_fits(models[kind], length) else "not kept"
    print(
      f"| {length} | {kind} | {times.median:.3f} ({times.minimum:.3f} to {times.maximum:.3f}) |"
      f" {cache} |",
      flush=True,
    )


def _model(kind: Any, weights: Any) -> StepModel:
  """The model with the attention kind named `kind` and weights of --weights.

  Raises:
    ValueError: the kind has no floor.
  """
  if kind in ("top_k_eviction", "kv_merger"):
    raise ValueError(
      f"--kinds contains {kind!r}, whose floor is unknown, because it compresses its cache"
      " repeatedly. Remove it from --kinds."
    )
  cache_dtype: Any = _CACHE_DTYPE.value  # The flag has the names of the field.
  config = ModelConfig(
    **LLAMA2_7B | {"num_layers": _LAYERS.value},
    attention=kind,
    dga=dataclasses.replace(block_config("streaming"), cache_dtype=cache_dtype),
    param_dtype="bfloat16",
  )
  return StepModel.from_config(config, None if weights == "bfloat16" else weights)


def _make_params() -> dict[str, Any]:
  """Random parameters by name of the model. Models with equal weights share the arrays."""
  model = _model(_KINDS.value[0], "bfloat16")
  drawn = random_params(model.params)
  made: dict[str, Any] = {}
  weights: Any  # The flag has the names of the dtypes.
  for weights in _WEIGHTS.value:
    params = drawn
    if weights != "bfloat16":
      params = nnx.state(quantize_weights(model.decoder(drawn), weights))
    made |= {_name(kind, weights): params for kind in _KINDS.value}
  return made


def _name(kind: str, weights: str) -> str:
  """The name of a model in the tables."""
  return kind if weights == "bfloat16" else f"{kind}, {weights}"


type _Job = tuple[str, int]  # Name of a model, and batch size.


class _Programs:
  """The programs to be timed. They compile in parallel, because compilation takes most of the time.

  Attributes:
    alternating: context lengths, each with the chunks that alternate at that length.
    prompts: the compiled prefill by name of the model and prompt length.
  """

  alternating: list[tuple[int, dict[_Job, Future[DecodeChunk]]]]

  def __init__(self, models: dict[str, StepModel], params: dict[str, Any]) -> None:
    pool = concurrent.futures.ThreadPoolExecutor(8)

    def compile_chunk(name: str, batch: int, length: int) -> Future[DecodeChunk]:
      arguments = (models[name], params[name], batch, length, _CHUNK.value)
      return pool.submit(DecodeChunk.compile, *arguments)

    self.alternating = []
    for text in _STEPS.value:
      batch, length = map(int, text.split("x"))
      chunks = {(name, batch): compile_chunk(name, batch, length) for name in models}
      self.alternating.append((length, chunks))
    for length in map(int, _LARGEST.value):  # Each fills the memory, so the kinds run one by one.
      for name, model in models.items():
        batch = _largest_batch(model, length)
        self.alternating.append((length, {(name, batch): compile_chunk(name, batch, length)}))
    self.prompts = {
      (name, length): pool.submit(_compile_prompt, model, params[name], length)
      for length in map(int, _PROMPTS.value)
      for name, model in models.items()
    }
    futures: list[Future[Any]] = [*self.prompts.values()]
    futures += [chunk for _, chunks in self.alternating for chunk in chunks.values()]
    completed = concurrent.futures.as_completed(futures)
    for future in tqdm(completed, total=len(futures), desc="compiling", disable=None):
      future.result()


def _largest_batch(model: StepModel, length: int) -> int:
  """The largest batch whose cache fits the device beside the weights and --spare_gb."""
  stats = jax.devices()[0].memory_stats() or {}
  free = stats["bytes_limit"] - stats["bytes_in_use"] - _SPARE.value * 1e9
  return int(free // model.allocated_bytes(1, length))


def _cache_fits(model: StepModel, length: int) -> bool:
  """Whether the cache of a prompt is below 40 GB. A dense cache of 128K tokens is not."""
  return model.allocated_bytes(1, length) < 40e9


def _compile_prompt(model: StepModel, params: Any, length: int) -> Callable[..., Any]:
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
