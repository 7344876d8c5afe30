"""Decoding steps with head budgets against steps over as many bytes in one uniform cache, on a GPU.

    ./workspace bench mixed_decode
    ./workspace bench mixed_decode --model=smollm2 --contexts=8192

The models have random weights in bfloat16. LLaMA2-7B's shapes: 3 of 32 KV heads of each layer are
full, the others follow --other. SmolLM2-135M's shapes: --budgets, by default the calibrated set
`dga_jax/smollm2_budgets_35.json`. "uniform" is the same model with dense attention in all heads and
a context whose cache has as many bytes. "attention" is the attention of all layers without the rest
of the model. One program decodes a chunk of tokens with a donated state, as `dga_jax.generation`
does. Programs alternate; times are medians with the lowest and the highest round.
"""

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx
from jax import Array

import dga_jax
from benchmarks._decoder_inputs import LLAMA2_7B, random_params, SMOLLM2_135M
from benchmarks._head_settings import SETTINGS
from benchmarks.timing import environment, Times
from dga_jax.generation.programs import decode_options
from dga_jax.head_budgets import FULL, HeadBudgets, read_head_budgets
from dga_jax.model import Decoder, ModelConfig

_MODEL = flags.DEFINE_enum("model", "llama2", ["llama2", "smollm2"], "shapes of the model")
_CONTEXTS = flags.DEFINE_list("contexts", ["16384"], "tokens of the caches with budgets")
_BATCHES = flags.DEFINE_list("batches", ["1"], "sequences")
_OTHER = flags.DEFINE_enum("other", "126+2", list(SETTINGS), "setting of LLaMA2's other heads")
_BUDGETS = flags.DEFINE_string(
  "budgets", str(Path(dga_jax.__file__).with_name("smollm2_budgets_35.json")), "of SmolLM2"
)
_LAYERS = flags.DEFINE_integer("layers", None, "layers of the model; fewer for a quick run")
_CHUNK = flags.DEFINE_integer("decode_chunk", 16, "decode steps in one program")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "timed chunks of each program")


def main(argv: list[str]) -> None:
  """Prints one table row for each batch, context and part of the model."""
  del argv
  print(environment())
  print("| model, batch, context | part | budgets | uniform, context | budgets / uniform |")
  print("| --- | --- | --- | --- | --- |")
  budgets = _budgets()
  model = Model(_config(head_budgets=budgets, attention="head_budgets"))
  uniform = Model(_config(attention="dense"))
  params = random_params(uniform.params)
  for batch in map(int, _BATCHES.value):
    for context in map(int, _CONTEXTS.value):
      same = uniform.context_of_bytes(model.cache_bytes(batch, context), batch)
      for part in ("whole step", "attention"):
        times = _compare(
          {
            "budgets": model.chunk(part, batch, context),
            "uniform": uniform.chunk(part, batch, same),
          },
          params if part == "whole step" else None,
        )
        ratio = times["budgets"].median / times["uniform"].median
        print(
          f"| {_MODEL.value}, {batch} x {context} | {part} | {times['budgets']} |"
          f" {times['uniform']}, {same} | {ratio:.3f} |",
          flush=True,
        )


def _config(**attention: Any) -> ModelConfig:
  tied = {"tie_embeddings": True}
  shapes = {"llama2": LLAMA2_7B, "smollm2": SMOLLM2_135M | tied}[_MODEL.value]
  if _LAYERS.value is not None:
    shapes = shapes | {"num_layers": _LAYERS.value}
  return ModelConfig(**shapes, **attention, param_dtype="bfloat16")


def _budgets() -> HeadBudgets:
  """The budgets with the heads of every setting side by side, as `apply_budgets` orders them."""
  layers = _config().num_layers
  if _MODEL.value == "llama2":
    return HeadBudgets((FULL, SETTINGS[_OTHER.value]), ((0,) * 3 + (1,) * 29,) * layers)
  budgets = read_head_budgets(_BUDGETS.value)
  budgets = dataclasses.replace(budgets, assignment=budgets.assignment[:layers])
  return budgets.arranged()


type State = tuple[Any, Array]  # The cache, and the last tokens or the queries.


@dataclasses.dataclass(frozen=True)
class Chunk:
  """A function that makes a state, and one that decodes a chunk of tokens from it, lowered."""

  start: Callable[[Array], State]
  lowered: Any


class Model:
  """One attention kind of the model. All kinds share the parameters."""

  def __init__(self, config: ModelConfig) -> None:
    self.config, self.kind = config, config.make_attention()
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)).unstack_layers())
    self.graphdef, self.params = nnx.split(abstract)

  def caches(self, batch: int, context: int) -> Any:
    """Empty caches of all layers."""
    c = self.config
    return self.kind.init_caches(
      c.num_layers, batch, context, c.num_kv_heads, c.head_dim, jnp.bfloat16
    )

  def cache_bytes(self, batch: int, context: int) -> int:
    """Bytes of the keys and values in the caches of all layers."""
    arrays = jax.tree.leaves(jax.eval_shape(lambda: self.caches(batch, context)))
    return sum(x.size * x.dtype.itemsize for x in arrays if x.ndim > 2)

  def context_of_bytes(self, size: int, batch: int) -> int:
    """The context whose caches have about `size` bytes, where all heads keep all tokens."""
    return round(size / self.cache_bytes(batch, 1))

  def chunk(self, part: str, batch: int, context: int) -> Chunk:
    """Programs that decode a chunk at the end of caches of `context` tokens.

    Args:
      part: "whole step" or "attention".
      batch: sequences.
      context: tokens of a sequence after the chunk.
    """
    c, before = self.config, context - _CHUNK.value

    def fill(key: Array, path: Any, x: Array) -> Array:
      if path[-1].name == "length":
        return jnp.full_like(x, before)
      return x if x.dtype == jnp.int32 else jax.random.normal(key, x.shape, x.dtype)

    def random(key: Array, cache: Any) -> Any:
      return jax.tree_util.tree_map_with_path(functools.partial(fill, key), cache)

    def start_model(key: Array) -> State:
      decoder: Decoder = nnx.merge(self.graphdef, self.params)
      cache = random(key, decoder.init_cache(batch, context))
      return cache, jax.random.randint(key, (batch,), 0, c.vocab_size)

    def step_model(params: Any, state: State, _: None) -> tuple[State, None]:
      decoder: Decoder = nnx.merge(self.graphdef, params)
      logits_BxV, cache = decoder.decode(state[1], state[0])
      return (cache, jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)), None

    def start_attention(key: Array) -> State:
      query = jax.random.normal(key, (batch, c.num_heads, c.head_dim), jnp.bfloat16)
      return random(key, self.caches(batch, context)), query

    def step_attention(params: None, state: State, _: None) -> tuple[State, None]:
      del params
      cache, query = state
      for layer in range(c.num_layers):
        new = query[:, :: c.num_heads // c.num_kv_heads]
        query, cache = self.kind.decode(query, new, new, cache, self.kind.layer_index(layer))
      return (cache, query), None

    is_whole = part == "whole step"
    start, step = (start_model, step_model) if is_whole else (start_attention, step_attention)

    def decode(params: Any, state: State) -> State:
      return jax.lax.scan(functools.partial(step, params), state, None, length=_CHUNK.value)[0]

    state = jax.eval_shape(start, jax.random.key(0))
    params = self.params if is_whole else None
    return Chunk(jax.jit(start), jax.jit(decode, donate_argnums=1).lower(params, state))


def _compare(chunks: dict[str, Chunk], params: Any) -> dict[str, Times]:
  """Times the chunks in alternating rounds; returns seconds per token."""

  def compile_chunk(chunk: Chunk) -> Any:
    return chunk.lowered.compile(compiler_options=decode_options())

  with concurrent.futures.ThreadPoolExecutor() as pool:
    programs = dict(zip(chunks, pool.map(compile_chunk, chunks.values()), strict=True))
  samples: dict[str, list[float]] = {name: [] for name in chunks}
  for number in range(_ROUNDS.value + 1):
    for name, chunk in chunks.items():
      state = jax.block_until_ready(chunk.start(jax.random.key(number)))
      begin = time.perf_counter()
      state = jax.block_until_ready(programs[name](params, state))
      if number:
        samples[name].append((time.perf_counter() - begin) / _CHUNK.value)
      del state
  return {name: Times.from_samples(values) for name, values in samples.items()}


if __name__ == "__main__":
  app.run(main)
