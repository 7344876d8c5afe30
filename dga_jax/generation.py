"""Continuing prompts: one ragged batch, two compiled programs, no wait between tokens."""

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, Key

from dga_jax.model import Decoder
from dga_jax.sampling import sample, Sampling

_PROMPT_MULTIPLE = 64  # Prompts are padded to it, so that similar lengths share a program.


@dataclasses.dataclass(frozen=True)
class Generation:
  """What `generate` returns.

  Attributes:
    tokens: the new tokens of every prompt, up to and without the end token.
    prefill_seconds: until the first token was there, compilation apart.
    step_seconds: of every later token, on average.
    cache_bytes: keys and values that the cache holds, all layers and sequences.
    dense_cache_bytes: what a dense cache for as many tokens holds.
  """

  tokens: list[list[int]]
  prefill_seconds: float
  step_seconds: float
  cache_bytes: int
  dense_cache_bytes: int

  def summary(self) -> str:
    """One line: times, rate and cache."""
    rate = len(self.tokens) / self.step_seconds if self.step_seconds else float("nan")
    return (
      f"prefill {self.prefill_seconds * 1e3:.1f} ms, then {self.step_seconds * 1e3:.2f} ms a token"
      f" ({rate:.1f} tokens/s); cache {_si(self.cache_bytes)}, dense would be"
      f" {_si(self.dense_cache_bytes)} ({self.dense_cache_bytes / self.cache_bytes:.1f} times)"
    )


class Generator:
  """Continues every prompt, all in one ragged batch; iterate over `steps`, then read `result`.

  Args:
    model: a decoder of any attention kind.
    prompts: token ids, each of at least one token.
    max_new_tokens: tokens to generate for each prompt.
    sampling: how to draw them.
    end_id: the token that ends a sequence; None generates on.
    max_length: bound on prompt and new tokens together; None for as many as it takes.

  Raises:
    ValueError: no prompt, an empty one, one that does not fit max_length, or an id that is no
      token of the model.
  """

  def __init__(
    self,
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    end_id: int | None = None,
    max_length: int | None = None,
  ) -> None:
    _check_prompts(model, prompts, max_new_tokens, max_length)
    self._lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    padded = -(-int(self._lengths_B.max()) // _PROMPT_MULTIPLE) * _PROMPT_MULTIPLE
    self._tokens_BxL = np.zeros((len(prompts), padded), np.int32)
    for row, prompt in enumerate(prompts):
      self._tokens_BxL[row, : len(prompt)] = prompt
    self._model = model
    self._max_new_tokens = max_new_tokens
    self._sampling = sampling
    self._end_id = end_id
    self.result: Generation | None = None

  def steps(self) -> Iterator[list[int | None]]:
    """Yields each sequence's new token, None for sequences that have ended."""
    graphdef, params = nnx.split(self._model)
    B, padded = self._tokens_BxL.shape
    max_length = padded + self._max_new_tokens
    keys_B = self._sampling.keys(B)
    programs = _programs(graphdef, max_length, self._sampling)
    prompt = (params, jnp.asarray(self._tokens_BxL), jnp.asarray(self._lengths_B), keys_B)
    prefill = programs.compiled("prefill", *prompt)
    begin = time.perf_counter()
    next_B, cache = prefill(*prompt)
    jax.block_until_ready(next_B)
    prefill_seconds = time.perf_counter() - begin
    cache_bytes = _cache_bytes(cache)
    step = jnp.int32(1)
    decode = programs.compiled("decode", params, next_B, cache, keys_B, step)

    outputs: list[list[int]] = [[] for _ in range(B)]
    running = [True] * B
    begin, taken = time.perf_counter(), 0
    while any(running) and taken < self._max_new_tokens:
      # The next step is under way while this token is read: the device never waits for the host.
      current_B = next_B
      if taken + 1 < self._max_new_tokens:
        next_B, cache = decode(params, current_B, cache, keys_B, step)
        step = step + 1
      tokens: list[int | None] = list(np.asarray(current_B).tolist())
      taken += 1
      for row, token in enumerate(tokens):
        running[row] = running[row] and token != self._end_id
        if running[row] and token is not None:
          outputs[row].append(token)
        else:
          tokens[row] = None
      yield tokens
    seconds = time.perf_counter() - begin
    self.result = Generation(
      tokens=outputs,
      prefill_seconds=prefill_seconds,
      step_seconds=seconds / max(1, taken - 1),
      cache_bytes=cache_bytes,
      dense_cache_bytes=_dense_cache_bytes(self._model, B, max_length),
    )


def generate(
  model: Decoder,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  sampling: Sampling,
  end_id: int | None = None,
) -> Generation:
  """Continues every prompt to its end; arguments and errors as for `Generator`."""
  generator = Generator(
    model, prompts, max_new_tokens=max_new_tokens, sampling=sampling, end_id=end_id
  )
  for _ in generator.steps():
    pass
  assert generator.result is not None
  return generator.result


class _Programs:
  """The two programs of generation, compiled once for each shape of a batch."""

  def __init__(self, graphdef: Any, max_length: int, sampling: Sampling) -> None:
    def prefill(
      params: Any,
      tokens_BxL: Int[Array, "B L"],
      lengths_B: Int[Array, "B"],
      keys_B: Key[Array, "B"],
    ) -> tuple[Int[Array, "B"], Any]:
      model = nnx.merge(graphdef, params)
      logits_BxV, cache = model.prefill(tokens_BxL, lengths_B, max_length=max_length)
      return sample(logits_BxV, keys_B, jnp.int32(0), sampling), cache

    def decode(
      params: Any, tokens_B: Int[Array, "B"], cache: Any, keys_B: Key[Array, "B"], step: Array
    ) -> tuple[Int[Array, "B"], Any]:
      model = nnx.merge(graphdef, params)
      logits_BxV, cache = model.decode(tokens_B, cache)
      return sample(logits_BxV, keys_B, step, sampling), cache

    self._jitted = {"prefill": jax.jit(prefill), "decode": jax.jit(decode, donate_argnums=2)}
    self._compiled: dict[Any, Any] = {}

  def compiled(self, name: str, *arguments: Any) -> Any:
    """The program for arguments like these; compiles it, so that its first call does not."""
    key = (name, arguments[1].shape)
    if key not in self._compiled:
      self._compiled[key] = self._jitted[name].lower(*arguments).compile()
    return self._compiled[key]


_programs = functools.lru_cache(maxsize=16)(_Programs)


def _check_prompts(
  model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, max_length: int | None
) -> None:
  if not prompts:
    raise ValueError("prompts is empty; give at least one.")
  if max_new_tokens < 1:
    raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
  vocabulary = model.config.vocab_size
  for row, prompt in enumerate(prompts):
    if not prompt:
      raise ValueError(f"prompts[{row}] has no token; give it at least one.")
    if not (min(prompt) >= 0 and max(prompt) < vocabulary):
      raise ValueError(f"prompts[{row}] holds ids outside 0..{vocabulary - 1}.")
    if max_length is not None and len(prompt) + max_new_tokens > max_length:
      raise ValueError(
        f"prompts[{row}] has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} it does"
        f" not fit a cache of max_length={max_length}. Shorten it, or raise max_length."
      )


def _cache_bytes(cache: Any) -> int:
  """Bytes of keys and values: the floating-point arrays of a cache."""
  leaves = jax.tree.leaves(cache)
  return sum(x.nbytes for x in leaves if jnp.issubdtype(x.dtype, jnp.floating))


def _dense_cache_bytes(model: Decoder, batch: int, length: int) -> int:
  c = model.config
  entry = c.num_kv_heads * c.head_dim * jnp.dtype(c.dtype).itemsize
  return 2 * c.num_layers * batch * length * entry


def _si(count: float) -> str:
  for unit in ("B", "kB", "MB", "GB"):
    if count < 1000 or unit == "GB":
      break
    count /= 1000
  return f"{count:.3g} {unit}"
