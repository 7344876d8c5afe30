"""Time that selector="fitted" adds to the op and to a decode step, on a GPU.

    ./workspace bench selector_speed --lengths=8192,32768
    ./workspace bench selector_speed --shapes=llama2_7b --parts=decode

Batch 1, bfloat16, 4 sinks; --group_size, --focal_per_block and --local_window set the blocks. The
programs of a row alternate on new random inputs. Times are medians with the lowest and the highest
round.

The op: "last query" is `dynamic_group_attention` with selector="last_query". "fitted" has
selector="fitted" and computes the focal scores of the layer (`dga_jax.model.focal_selector`) from
the same key and value. "given scores" is the op alone, with scores as an argument.

Decode steps: a decoder of the shape with random weights decodes chunks of tokens greedily. Its
cache holds --lengths tokens at the end of a chunk and random numbers.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx
from jax import Array

from benchmarks._block_flags import block_config
from benchmarks._decoder_inputs import LLAMA2_7B, random_params, SMOLLM2_135M
from benchmarks._inputs import Shape
from benchmarks._paired_timing import compare, TimedProgram
from benchmarks.timing import environment, Times
from dga_jax import DGAConfig, dynamic_group_attention
from dga_jax.generation.programs import decode_options
from dga_jax.model import Decoder, ModelConfig
from dga_jax.model.focal_selector import focal_scores, selector_features

_LENGTHS = flags.DEFINE_list("lengths", ["8192", "32768"], "tokens of the op and of the cache")
_SHAPES = flags.DEFINE_list("shapes", ["smollm2", "llama2_7b"], "shapes to measure")
_PARTS = flags.DEFINE_list("parts", ["op", "decode"], "op, decode or both")
_LAYERS = flags.DEFINE_integer("layers", None, "layers of the decoders; default: the model's")
_CHUNK = flags.DEFINE_integer("decode_chunk", 32, "decode steps in one program")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "samples of each program")
_REPEATS = flags.DEFINE_integer("repeats", 16, "queued calls of the op in one sample")

flags.FLAGS.set_default("group_size", 30)
flags.FLAGS.set_default("focal_per_block", 2)
flags.FLAGS.set_default("sink_tokens", 4)
flags.FLAGS.set_default("local_window", 38)

SHAPES: dict[str, dict[str, Any]] = {
  "smollm2": SMOLLM2_135M | {"tie_embeddings": True},
  "llama2_7b": LLAMA2_7B,
}


def main(argv: list[str]) -> None:
  """Prints a table of the op and a table of decode steps."""
  del argv
  print(environment())
  config = block_config("streaming")
  if "op" in _PARTS.value:
    print("| op | last query | fitted | given scores | fitted / last query |")
    print("| --- | --- | --- | --- | --- |")
    for shape in _SHAPES.value:
      for length in map(int, _LENGTHS.value):
        print("\n".join(_op_rows(shape, length, config)), flush=True)
  if "decode" in _PARTS.value:
    print("| decode step | last query | fitted | fitted / last query |")
    print("| --- | --- | --- | --- |")
    for shape in _SHAPES.value:
      for row in _decode_rows(shape, config):
        print(row, flush=True)


def _op_rows(name: str, length: int, config: DGAConfig) -> list[str]:
  """Rows of one shape and length: the forward pass, and both passes."""
  sizes = SHAPES[name]
  shape = Shape(length, sizes["num_heads"], sizes["num_kv_heads"], sizes["head_dim"])
  fitted = dataclasses.replace(config, selector="fitted")
  S = selector_features(shape.D)

  def with_last_query(q: Array, k: Array, v: Array, weights: Array, scores: Array) -> Array:
    return dynamic_group_attention(q, k, v, config=config)

  def with_fitted(q: Array, k: Array, v: Array, weights: Array, scores: Array) -> Array:
    own = focal_scores(k, v, weights)
    return dynamic_group_attention(q, k, v, config=fitted, focal_scores=own)

  def with_scores(q: Array, k: Array, v: Array, weights: Array, scores: Array) -> Array:
    return dynamic_group_attention(q, k, v, config=fitted, focal_scores=scores)

  def inputs(key: Array) -> tuple[Array, ...]:
    of_weights, of_scores = jax.random.split(jax.random.fold_in(key, 1))
    weights = jax.random.normal(of_weights, (shape.N, S))
    scores = jax.random.normal(of_scores, (1, length, shape.N))
    return *shape.tokens(key), weights, scores

  functions = {
    "last query": with_last_query,
    "fitted": with_fitted,
    "given scores": with_scores,
  }
  timings, refused = compare(
    {
      (passes, choice): TimedProgram(jax.jit(wrap(function)), jax.jit(inputs))
      for passes, wrap in (("forward", lambda f: f), ("forward + backward", _with_gradients))
      for choice, function in functions.items()
    },
    rounds=_ROUNDS.value,
    repeats=_REPEATS.value,
    seed=0,
  )
  if refused:
    raise RuntimeError(f"programs did not run: {refused}")
  rows = []
  for passes in ("forward", "forward + backward"):
    times = [timings[passes, choice] for choice in functions]
    ratio = times[1].median / times[0].median
    rows.append(f"| {name}, {length}, {passes} | {' | '.join(map(str, times))} | {ratio:.3f} |")
  return rows


def _with_gradients(function: Callable[..., Array]) -> Callable[..., Any]:
  """The output and the gradients of q, k and v. The output serves as its own cotangent."""

  def run(q: Array, k: Array, v: Array, weights: Array, scores: Array) -> Any:
    out, pull = jax.vjp(lambda *qkv: function(*qkv, weights, scores), q, k, v)
    return out, pull(out)

  return run


def _decode_rows(name: str, config: DGAConfig) -> list[str]:
  """A row for each length: seconds of a step with either selector."""
  models = {
    selector: _decoder(name, dataclasses.replace(config, selector=selector))
    for selector in ("last_query", "fitted")
  }
  drawn = jax.tree_util.tree_leaves_with_path(random_params(models["fitted"][1]))
  params = {jax.tree_util.keystr(path): x for path, x in drawn}
  with ThreadPoolExecutor() as pool:
    chunks = {
      (length, selector): pool.submit(_compile_chunk, model, length)
      for length in map(int, _LENGTHS.value)
      for selector, model in models.items()
    }
  rows = []
  for length in map(int, _LENGTHS.value):
    times = _alternate({s: chunks[length, s] for s in models}, models, params)
    ratio = times["fitted"].median / times["last_query"].median
    cells = " | ".join(str(times[selector]) for selector in models)
    rows.append(f"| {name}, {length} | {cells} | {ratio:.3f} |")
  return rows


type _Model = tuple[nnx.GraphDef, Any]  # The second is the state, with shapes for arrays.


def _decoder(name: str, config: DGAConfig) -> _Model:
  sizes = SHAPES[name] | ({} if _LAYERS.value is None else {"num_layers": _LAYERS.value})
  model = ModelConfig(
    **sizes,
    attention="dga",
    dga=config,
    focal_selector=config.selector == "fitted",
    param_dtype="bfloat16",
  )
  return nnx.split(nnx.eval_shape(lambda: Decoder(model, rngs=nnx.Rngs(0)).unstack_layers()))


def _params_of(model: _Model, params: dict[str, Array]) -> Any:
  """The parameters that a model has; without a selector these are fewer."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: params[jax.tree_util.keystr(path)], model[1]
  )


type _State = tuple[Any, Array]  # Cache and last tokens.
type _Chunk = tuple[Callable[[Array], _State], Callable[[Any, _State], _State]]


def _compile_chunk(model: _Model, length: int) -> _Chunk:
  """A function that makes a cache and a token, and a program that decodes a chunk from them."""
  graphdef, shapes = model

  def start(key: Array) -> _State:
    decoder: Decoder = nnx.merge(graphdef, shapes)
    cache = decoder.init_cache(1, length)
    cache = jax.tree_util.tree_map_with_path(functools.partial(fill, key), cache)
    return cache, jax.random.randint(key, (1,), 0, decoder.config.vocab_size)

  def fill(key: Array, path: Any, x: Array) -> Array:
    if path[-1].name == "length":
      return jnp.full_like(x, length - _CHUNK.value)
    return x if x.dtype == jnp.int32 else jax.random.normal(key, x.shape, x.dtype)

  def decode(params: Any, state: _State) -> _State:
    decoder: Decoder = nnx.merge(graphdef, params)

    def step(state: _State, _: None) -> tuple[_State, None]:
      logits_BxV, cache = decoder.decode(state[1], state[0])
      return (cache, jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)), None

    return jax.lax.scan(step, state, None, length=_CHUNK.value)[0]

  state = jax.eval_shape(start, jax.random.key(0))
  lowered = jax.jit(decode, donate_argnums=1).lower(shapes, state)
  return jax.jit(start), lowered.compile(compiler_options=decode_options())


def _alternate(
  chunks: dict[str, Future[_Chunk]], models: dict[str, _Model], params: dict[str, Array]
) -> dict[str, Times]:
  """Seconds of one step, in alternating rounds; a first round is not timed."""
  samples: dict[str, list[float]] = {selector: [] for selector in chunks}
  for number in range(_ROUNDS.value + 1):
    for selector, chunk in chunks.items():
      start, decode = chunk.result()
      state = jax.block_until_ready(start(jax.random.key(number)))
      own = _params_of(models[selector], params)
      begin = time.perf_counter()
      jax.block_until_ready(decode(own, state))
      if number:
        samples[selector].append((time.perf_counter() - begin) / _CHUNK.value)
  return {selector: Times.from_samples(values) for selector, values in samples.items()}


if __name__ == "__main__":
  app.run(main)
