"""Times of reading a prompt and of decoding, for comparisons of attention settings of one model.

Both programs are compiled from the decoder with its layers in a scan. `dga generate` compiles
faster programs (unstacked layers); the differences between settings are those of the cache and the
attention alone.
"""

import concurrent.futures
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from benchmarks._forward import greedy_steps

_TOKENS = 64  # Decoding steps of one timed call.
_REPEATS = 5
_THREADS = 12  # Threads that compile.

type _Programs = tuple[Callable[..., Any], Callable[..., Any]]


def measure_latencies(
  graphdefs: Mapping[str, nnx.GraphDef], params: Any, prompts: Int[Array, "B L"]
) -> dict[str, dict[str, float]]:
  """The median times of five calls of each setting, in alternating rounds.

  All programs are compiled before the first is timed.

  Args:
    graphdefs: of the decoder with each setting, by name.
    params: its parameters, which the settings share.
    prompts: read at once.

  Returns:
    For each name "prompt_seconds" of all prompts, and "token_seconds" of a decoding step of all
    sequences.
  """
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    pending = {
      name: pool.submit(_compile, graphdef, params, prompts) for name, graphdef in graphdefs.items()
    }
  programs = {name: future.result() for name, future in pending.items()}
  prompt_seconds: dict[str, list[float]] = {name: [] for name in programs}
  token_seconds: dict[str, list[float]] = {name: [] for name in programs}
  for number in range(_REPEATS + 1):  # The first round is not timed.
    for name, (read, decode) in programs.items():
      begin = time.perf_counter()
      token_B, cache = jax.block_until_ready(read(params, prompts))
      middle = time.perf_counter()
      jax.block_until_ready(decode(params, token_B, cache))
      if number:
        prompt_seconds[name].append(middle - begin)
        token_seconds[name].append((time.perf_counter() - middle) / _TOKENS)
      del token_B, cache
  return {
    name: {
      "prompt_seconds": statistics.median(prompt_seconds[name]),
      "token_seconds": statistics.median(token_seconds[name]),
    }
    for name in programs
  }


def _compile(graphdef: nnx.GraphDef, params: Any, prompts_BxL: Int[Array, "B L"]) -> _Programs:
  """The programs that read the prompts and that decode after them."""

  def read(params: Any, prompts_BxL: Int[Array, "B L"]) -> tuple[Int[Array, "B"], Any]:
    model = nnx.merge(graphdef, params)
    max_length = prompts_BxL.shape[1] + _TOKENS
    logits_BxV, cache = model.prefill(prompts_BxL, max_length=max_length)
    return logits_BxV.argmax(axis=-1).astype(jnp.int32), cache

  def decode(params: Any, token_B: Int[Array, "B"], cache: Any) -> Int[Array, "T B"]:
    return greedy_steps(nnx.merge(graphdef, params), token_B, cache, _TOKENS)

  lowered = jax.jit(read).lower(params, prompts_BxL)
  return lowered.compile(), jax.jit(decode).lower(params, *lowered.out_info).compile()
