"""Continuing prompts: a batch of slots that is kept full, and a device that never waits."""

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
from dga_jax.generation.sampling import Sampling
from dga_jax.model import Decoder

_BURST = 8  # tokens between two looks of the host


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt to be continued.

  Attributes:
    prompt: token ids, at least one.
    max_new_tokens: after which it ends.
    sampling: how its tokens are drawn.
  """

  prompt: Sequence[int]
  max_new_tokens: int
  sampling: Sampling = dataclasses.field(default_factory=Sampling)


class Emitted(NamedTuple):
  """New tokens of a request."""

  request: int
  tokens: list[int]
  done: bool


@dataclasses.dataclass(frozen=True)
class Generation:
  """What came out.

  Attributes:
    tokens: the new tokens of every prompt, up to and without a stop token.
    prefill_seconds: until the first tokens were there, compilation apart.
    step_seconds: of every later token of a slot, on average, prompts read meanwhile included.
    seconds: in all, compilation apart.
    cache_bytes: keys and values that the cache holds, all layers and slots.
    dense_cache_bytes: what a dense cache for as many tokens holds.
  """

  tokens: list[list[int]]
  prefill_seconds: float
  step_seconds: float
  seconds: float
  cache_bytes: int
  dense_cache_bytes: int

  def summary(self) -> str:
    """One line: times, rate and cache."""
    rate = sum(map(len, self.tokens)) / self.seconds if self.seconds else float("nan")
    return (
      f"prefill {self.prefill_seconds * 1e3:.1f} ms, then {self.step_seconds * 1e3:.2f} ms a token"
      f" ({rate:.1f} tokens/s in all); cache {_si(self.cache_bytes)}, dense would be"
      f" {_si(self.dense_cache_bytes)} ({self.dense_cache_bytes / self.cache_bytes:.1f} times)"
    )


class _DecodeChunk(NamedTuple):
  """Tokens that the device is about to have drawn, and whose they are."""

  first: list[tuple[int, Any]]  # requests admitted before it
  owner: dict[int, int]  # request of each slot
  tokens: Any


class ContinuousBatching:
  """Continues requests, `slots` of them at once; iterate over `steps`, then read `result`.

  A request that ends frees its slot for the next one, so the batch stays full as long as any
  wait. All shapes are fixed: what a request gets does not depend on its neighbours, and nothing
  is compiled after this object is made.

  Args:
    model: a decoder of any attention kind.
    requests: taken in this order.
    slots: sequences under way at once; no more than there are requests are made.
    stop_ids: tokens that end a sequence.
    max_length: bound on prompt and new tokens together; None for as many as it takes.
    prompt_chunk: reads prompts in chunks of so many tokens, which bounds the memory of a long
      one, for attention kinds that can (dense; DGA with streaming selection). None reads a whole
      prompt at once.
    burst: tokens that the device draws before the host looks for the end of sequences.

  Raises:
    ValueError: no request, an empty prompt, one that does not fit max_length, an id that is no
      token of the model, or a chunk for an attention kind that reads whole prompts alone.
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
    burst: int = _BURST,
  ) -> None:
    for name, value in (("slots", slots), ("burst", burst), ("prompt_chunk", prompt_chunk)):
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
    self._requests, self._stop_ids, self._burst = requests, frozenset(stop_ids), burst
    self._slots = min(slots, len(requests))
    self._prompts = [_padded(request.prompt, prompt_chunk) for request in requests]
    self._length = max(
      max(prompt.shape[1], len(request.prompt) + request.max_new_tokens)
      for prompt, request in zip(self._prompts, requests, strict=True)
    )
    self._model = model
    self._programs = Engine(
      model,
      slots=self._slots,
      max_length=self._length,
      padded_lengths={prompt.shape[1] for prompt in self._prompts},
      chunk=prompt_chunk,
      burst=burst,
    )
    self._outputs: list[list[int]] = [[] for _ in requests]
    self._done = [False] * len(requests)
    self.result: Generation | None = None

  def steps(self) -> Iterator[list[Emitted]]:
    """Yields what is new, burst by burst."""
    state = self._programs.empty()
    cache_bytes = _cache_bytes(state.cache)
    waiting, under_way = deque(range(len(self._requests))), deque[_DecodeChunk]()
    owner: dict[int, int] = {}  # request of each slot in use
    drawn = [0] * len(self._requests)  # tokens that the device has drawn or is about to
    begin, prefill_seconds, bursts = time.perf_counter(), 0.0, 0
    while waiting or owner or under_way:
      first = []
      for slot in range(self._slots):
        if slot in owner or not waiting:
          continue
        owner[slot] = number = waiting.popleft()
        request, prompt = self._requests[number], self._prompts[number]
        token, state = self._programs.admit(
          state, prompt, len(request.prompt), slot, request.sampling
        )
        first.append((number, token))
        drawn[number] = 1
      if not bursts:
        jax.block_until_ready(state)
        prefill_seconds = time.perf_counter() - begin
      if owner:
        tokens, state = self._programs.decode(state)
        bursts += 1
        under_way.append(_DecodeChunk(first, dict(owner), tokens))
        for slot, number in list(owner.items()):
          drawn[number] += self._burst
          if drawn[number] >= self._requests[number].max_new_tokens:
            del owner[slot]
      # The next burst is under way while this one is read: the device never waits for the host.
      if len(under_way) == 2 or not owner:
        yield self._read(under_way.popleft())
        owner = {slot: number for slot, number in owner.items() if not self._done[number]}
    seconds = time.perf_counter() - begin
    self.result = Generation(
      tokens=self._outputs,
      prefill_seconds=prefill_seconds,
      step_seconds=(seconds - prefill_seconds) / (bursts * self._burst),
      seconds=seconds,
      cache_bytes=cache_bytes,
      dense_cache_bytes=_dense_cache_bytes(self._model, self._slots, self._length),
    )

  def _read(self, burst: _DecodeChunk) -> list[Emitted]:
    """Waits for a burst, and hands its tokens to their requests."""
    new: dict[int, list[int]] = {number: np.asarray(x).tolist() for number, x in burst.first}
    tokens = np.asarray(burst.tokens)
    for slot, number in burst.owner.items():
      new.setdefault(number, []).extend(tokens[:, slot].tolist())
    return [self._take(number, some) for number, some in new.items() if not self._done[number]]

  def _take(self, number: int, tokens: list[int]) -> Emitted:
    """Adds tokens to a request's output, up to its end."""
    output, most = self._outputs[number], self._requests[number].max_new_tokens
    tokens = tokens[: most - len(output)]
    stop = next((i for i, token in enumerate(tokens) if token in self._stop_ids), None)
    kept = tokens[:stop]
    output += kept
    self._done[number] = stop is not None or len(output) == most
    return Emitted(number, kept, self._done[number])


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
    prompts: token ids of each.
    max_new_tokens: for each prompt.
    sampling: of all; prompt i draws with seed + i.
    stop_ids: tokens that end a sequence.
    slots: prompts under way at once; None for all.

  Raises:
    ValueError: as `ContinuousBatching`.
  """
  requests = [
    Request(prompt, max_new_tokens, dataclasses.replace(sampling, seed=sampling.seed + i))
    for i, prompt in enumerate(prompts)
  ]
  batch = ContinuousBatching(
    model, requests, slots=slots or max(1, len(requests)), stop_ids=stop_ids
  )
  for _ in batch.steps():
    pass
  assert batch.result is not None
  return batch.result


def _padded(prompt: Sequence[int], chunk: int | None) -> np.ndarray:
  """[1, L] with zeros to one of few lengths, so that similar prompts share a program."""
  if chunk is not None:
    length = -(-len(prompt) // chunk) * chunk
  else:
    step = max(64, 2 ** math.ceil(math.log2(len(prompt))) // 8)  # at most a quarter is padding
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
      raise ValueError(f"Prompt {row} has no token; give it at least one.")
    if not (min(prompt) >= 0 and max(prompt) < vocabulary):
      raise ValueError(f"Prompt {row} holds ids outside 0..{vocabulary - 1}.")
    if max_length is not None and len(prompt) + new > max_length:
      raise ValueError(
        f"Prompt {row} has {len(prompt)} tokens; with max_new_tokens={new} it does not fit"
        f" max_length={max_length}. Shorten it, or raise max_length."
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
