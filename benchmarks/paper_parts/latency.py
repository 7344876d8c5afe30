"""Times of reading a prompt and of decoding, for comparisons of attention settings of one model.

Both programs are compiled from the decoder with its layers in a scan. `dga generate` compiles
faster programs (unstacked layers); the differences between settings are those of the cache and the
attention alone.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from benchmarks._forward import greedy_steps

_TOKENS = 64  # Decoding steps of one timed call.
_REPEATS = 5


def measure_latency(
  graphdef: nnx.GraphDef, params: Any, prompts: Int[Array, "B L"]
) -> dict[str, float]:
  """The median times of five calls.

  Args:
    graphdef: of the decoder.
    params: its parameters.
    prompts: read at once.

  Returns:
    "batch"; "prompt_seconds" of all prompts; "token_seconds" of a decoding step of all sequences.
  """
  read = functools.partial(_read, graphdef, params, prompts)
  token_B, cache = read()
  decode = functools.partial(_decode, graphdef, params, token_B, cache)
  return {
    "batch": prompts.shape[0],
    "prompt_seconds": _median(read),
    "token_seconds": _median(decode) / _TOKENS,
  }


def _median(function: Callable[[], Any]) -> float:
  jax.block_until_ready(function())
  seconds = []
  for _ in range(_REPEATS):
    begin = time.perf_counter()
    jax.block_until_ready(function())
    seconds.append(time.perf_counter() - begin)
  return statistics.median(seconds)


@functools.partial(jax.jit, static_argnums=0)
def _read(
  graphdef: nnx.GraphDef, params: Any, prompts_BxL: Int[Array, "B L"]
) -> tuple[Int[Array, "B"], Any]:
  model = nnx.merge(graphdef, params)
  max_length = prompts_BxL.shape[1] + _TOKENS
  logits_BxV, cache = model.prefill(prompts_BxL, max_length=max_length)
  return logits_BxV.argmax(axis=-1).astype(jnp.int32), cache


@functools.partial(jax.jit, static_argnums=0)
def _decode(
  graphdef: nnx.GraphDef, params: Any, token_B: Int[Array, "B"], cache: Any
) -> Int[Array, "T B"]:
  return greedy_steps(nnx.merge(graphdef, params), token_B, cache, _TOKENS)
