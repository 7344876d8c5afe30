"""Continuous batching: a fixed number of slots that are refilled as sequences end."""

import dataclasses
import math
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dga_jax.generation.engine import Engine
from dga_jax.generation.sampling import NOT_FINITE, Sampling
from dga_jax.model import Decoder

_DECODE_CHUNK = 8  # Decode steps per host synchronization.


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt to continue.

  Attributes:
    prompt: token ids, at least one.
    max_new_tokens: bound on the tokens of the continuation.
    sampling: how its tokens are sampled.
  """

  prompt: Sequence[int]
  max_new_tokens: int
  sampling: Sampling = dataclasses.field(default_factory=Sampling)


class Emitted(NamedTuple):
  """New tokens of a request.

  Attributes:
    request: the index of the request.
    tokens: the new tokens, without a stop token.
    done: whether the request has ended.
  """

  request: int
  tokens: list[int]
  done: bool


@dataclasses.dataclass(frozen=True)
class Generation:
  """The continuations of all requests, and the times and sizes of the run.

  Attributes:
    tokens: the new tokens of every request, without the stop token.
    failed: for every request, whether it ended because its logits were not finite; `tokens` then
      has the tokens before that.
    prefill_seconds: until the first tokens of the first slots, without compilation.
    step_seconds: mean time of a decoding step after that, with the prefill of later requests.
    seconds: of the whole run, without compilation.
    cache_bytes: bytes of the cache's keys and values, all layers and slots.
    dense_cache_bytes: bytes of a dense cache for as many tokens.
    dtype: of the model's activations.
  """

  tokens: list[list[int]]
  failed: list[bool]
  prefill_seconds: float
  step_seconds: float
  seconds: float
  cache_bytes: int
  dense_cache_bytes: int
  dtype: str

  def summary(self) -> str:
    """One line: times, throughput and cache size."""
    rate = sum(map(len, self.tokens)) / self.seconds if self.seconds else float("nan")
    return (
      f"prefill {self.prefill_seconds * 1e3:.1f} ms, then {self.step_seconds * 1e3:.2f} ms a token"
      f" ({rate:.1f} tokens/s in all); cache {_si(self.cache_bytes)}, dense would be"
      f" {_si(self.dense_cache_bytes)} ({self.dense_cache_bytes / self.cache_bytes:.1f} times)"
    )

  def raise_if_failed(self) -> None:
    """Raises FloatingPointError if the logits of a request were not finite."""
    after = {i: len(self.tokens[i]) for i, failed in enumerate(self.failed) if failed}
    if not after:
      return
    where = ", ".join(f"prompt {i} after {count} new tokens" for i, count in after.items())
    cause = (
      "Activations overflow float16, whose largest number is 65504; use dtype bfloat16 or float32."
      if self.dtype == "float16"
      else "The model's weights are damaged, or its activations overflow."
    )
    raise FloatingPointError(f"The logits are NaN or infinite: {where}. {cause}")


class _DecodeChunk(NamedTuple):
  """A dispatched decode chunk and the request that owns each slot."""

  first: list[tuple[int, Any]]  # The first tokens of the requests admitted before the chunk.
  owner: dict[int, int]  # The request of each slot.
  tokens: Any


class _Outputs:
  """The tokens of all requests, each up to its end."""

  def __init__(self, requests: Sequence[Request], stop_ids: Collection[int]) -> None:
    self.tokens: list[list[int]] = [[] for _ in requests]
    self.done = [False] * len(requests)
    self.failed = [False] * len(requests)
    self._most = [request.max_new_tokens for request in requests]
    self._stop_ids = stop_ids

  def read(self, chunk: _DecodeChunk) -> list[Emitted]:
    """Waits for a decode chunk, and adds its tokens to those of their requests."""
    new: dict[int, list[int]] = {i: np.asarray(token).tolist() for i, token in chunk.first}
    tokens_TxB = np.asarray(chunk.tokens)
    for slot, i in chunk.owner.items():
      new.setdefault(i, []).extend(tokens_TxB[:, slot].tolist())
    return [self._add(i, tokens) for i, tokens in new.items() if not self.done[i]]

  def _add(self, i: int, tokens: list[int]) -> Emitted:
    output, most = self.tokens[i], self._most[i]
    tokens = tokens[: most - len(output)]
    end = next((at for at, token in enumerate(tokens) if self._ends(token)), None)
    kept = tokens[:end]
    output += kept
    self.failed[i] = end is not None and tokens[end] == NOT_FINITE
    self.done[i] = end is not None or len(output) == most
    return Emitted(i, kept, self.done[i])

  def _ends(self, token: int) -> bool:
    return token in self._stop_ids or token == NOT_FINITE


class ContinuousBatching:
  """Continues requests, `slots` of them at once: iterate over `steps`, then read `result`.

  A request that ends frees its slot for the next waiting request, so the batch stays full while
  requests wait. All shapes are fixed. Therefore a request's tokens do not depend on the other
  requests, and everything is compiled by the constructor.

  A request whose logits are NaN or infinite ends there and is marked in `result.failed`; the other
  requests continue.

  Args:
    model: a decoder of any attention kind.
    requests: admitted in this order.
    slots: sequences that run at once; at most the number of requests is used.
    stop_ids: tokens that end a sequence.
    max_length: bound on the tokens of a prompt and its continuation; None for no bound.
    prompt_chunk: prefills in chunks of this many tokens, which bounds the memory of a long prompt,
      for the attention kinds that can (dense; DGA with streaming selection). None prefills a
      prompt at once.
    decode_chunk: decode steps per host synchronization.

  Raises:
    ValueError: no request, an empty prompt, a prompt that exceeds max_length, an id that is not a
      token of the model, `prompt_chunk` for an attention kind that needs the whole prompt, or a
      weight that overflows the dtype of the products.
  """

  def __init__(
    self,
    model: Decoder,
    requests: Sequence[Request],
    *,
    slots: int,
    stop_ids: Collection[int] = (),
    max_length: int | None = None,
    prompt_chunk: int | None = None,
    decode_chunk: int = _DECODE_CHUNK,
  ) -> None:
    counts = (("slots", slots), ("decode_chunk", decode_chunk), ("prompt_chunk", prompt_chunk))
    for name, value in counts:
      if value is not None and value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1.")
    _check_requests(model, requests, max_length)
    config = model.config
    if (
      prompt_chunk is not None and config.attention == "dga" and config.dga.selection != "streaming"
    ):
      raise ValueError(
        f"prompt_chunk is {prompt_chunk}, but selection={config.dga.selection!r} ranks a prompt's"
        " tokens together: leave it out, or use selection='streaming'."
      )
    self._requests, self._stop_ids = requests, frozenset(stop_ids)
    self._decode_chunk = decode_chunk
    self._slots = min(slots, len(requests))
    self._prompts = [_padded(request.prompt, prompt_chunk) for request in requests]
    self._length = max(
      max(prompt.shape[1], len(request.prompt) + request.max_new_tokens)
      for prompt, request in zip(self._prompts, requests, strict=True)
    )
    self._config = config
    self._engine = Engine(
      model,
      slots=self._slots,
      max_length=self._length,
      padded_lengths={prompt.shape[1] for prompt in self._prompts},
      prompt_chunk=prompt_chunk,
      decode_chunk=decode_chunk,
    )
    self.result: Generation | None = None

  def steps(self) -> Iterator[list[Emitted]]:
    """Runs all requests from their start; yields the new tokens of every decode chunk.

    Every call runs the requests again. `result` is None until the iterator ends.
    """
    self.result = None
    outputs = _Outputs(self._requests, self._stop_ids)
    state = self._engine.empty()
    cache_bytes = _cache_bytes(state.cache)
    waiting, dispatched = deque(range(len(self._requests))), deque[_DecodeChunk]()
    owner: dict[int, int] = {}  # The request of each slot in use.
    sampled = [0] * len(self._requests)  # Tokens of each request, with the dispatched ones.
    begin, prefill_seconds, chunks = time.perf_counter(), 0.0, 0
    while waiting or owner or dispatched:
      first = []
      for slot in range(self._slots):
        if slot in owner or not waiting:
          continue
        owner[slot] = i = waiting.popleft()
        request, prompt = self._requests[i], self._prompts[i]
        token, state = self._engine.admit(
          state, prompt, len(request.prompt), slot, request.sampling
        )
        first.append((i, token))
        sampled[i] = 1
      if not chunks:
        jax.block_until_ready(state)
        prefill_seconds = time.perf_counter() - begin
      if owner:
        tokens, state = self._engine.decode(state)
        chunks += 1
        dispatched.append(_DecodeChunk(first, dict(owner), tokens))
        for slot, i in list(owner.items()):
          sampled[i] += self._decode_chunk
          if sampled[i] >= self._requests[i].max_new_tokens:
            del owner[slot]
      # The device runs the next chunk while the host reads this one.
      if len(dispatched) == 2 or not owner:
        yield outputs.read(dispatched.popleft())
        owner = {slot: i for slot, i in owner.items() if not outputs.done[i]}
    seconds = time.perf_counter() - begin
    self.result = Generation(
      tokens=outputs.tokens,
      failed=outputs.failed,
      prefill_seconds=prefill_seconds,
      step_seconds=(seconds - prefill_seconds) / (chunks * self._decode_chunk),
      seconds=seconds,
      cache_bytes=cache_bytes,
      dense_cache_bytes=self._dense_cache_bytes(),
      dtype=self._config.dtype,
    )

  def run(self) -> Generation:
    """Iterates over `steps` to the end and returns the result."""
    for _ in self.steps():
      pass
    assert self.result is not None
    return self.result

  def _dense_cache_bytes(self) -> int:
    c = self._config
    entry = c.num_kv_heads * c.head_dim * jnp.dtype(c.dtype).itemsize
    return 2 * c.num_layers * self._slots * self._length * entry


def generate(
  model: Decoder,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  sampling: Sampling,
  stop_ids: Collection[int] = (),
  slots: int | None = None,
) -> Generation:
  """Continues every prompt to its end.

  Args:
    model: a decoder of any attention kind.
    prompts: token ids of each prompt.
    max_new_tokens: bound on the tokens of each continuation.
    sampling: how tokens are sampled; prompt i uses seed + i, modulo 2³².
    stop_ids: tokens that end a sequence.
    slots: prompts that run at once; None for all.

  Raises:
    ValueError: as `ContinuousBatching`.
    FloatingPointError: the logits of a prompt are NaN or infinite.
  """
  requests = [
    Request(prompt, max_new_tokens, sampling.with_offset(i)) for i, prompt in enumerate(prompts)
  ]
  batch = ContinuousBatching(
    model, requests, slots=slots or max(1, len(requests)), stop_ids=stop_ids
  )
  result = batch.run()
  result.raise_if_failed()
  return result


def _padded(prompt: Sequence[int], chunk: int | None) -> np.ndarray:
  """[1, L], padded with zeros to one of few lengths, so that similar prompts share a program."""
  if chunk is not None:
    length = -(-len(prompt) // chunk) * chunk
  else:
    step = max(64, 2 ** math.ceil(math.log2(len(prompt))) // 8)  # At most a quarter is padding.
    length = -(-len(prompt) // step) * step
  padded = np.zeros((1, length), np.int32)
  padded[0, : len(prompt)] = prompt
  return padded


def _check_requests(model: Decoder, requests: Sequence[Request], max_length: int | None) -> None:
  if not requests:
    raise ValueError("There is no prompt; give at least one.")
  vocabulary = model.config.vocab_size
  for row, request in enumerate(requests):
    prompt, new = request.prompt, request.max_new_tokens
    if new < 1:
      raise ValueError(f"max_new_tokens of prompt {row} is {new}; it must be at least 1.")
    if not len(prompt):
      raise ValueError(f"Prompt {row} has no tokens; give at least one.")
    if not (min(prompt) >= 0 and max(prompt) < vocabulary):
      raise ValueError(f"Prompt {row} has token ids outside 0..{vocabulary - 1}.")
    if max_length is not None and len(prompt) + new > max_length:
      raise ValueError(
        f"Prompt {row} has {len(prompt)} tokens; with max_new_tokens={new} it exceeds"
        f" max_length={max_length}. Shorten it, or raise max_length."
      )


def _cache_bytes(cache: Any) -> int:
  """Bytes of keys and values: the floating-point arrays of a cache."""
  leaves = jax.tree.leaves(cache)
  return sum(x.nbytes for x in leaves if jnp.issubdtype(x.dtype, jnp.floating))


def _si(count: float) -> str:
  for unit in ("B", "kB", "MB", "GB"):
    if count < 1000 or unit == "GB":
      break
    count /= 1000
  return f"{count:.3g} {unit}"
