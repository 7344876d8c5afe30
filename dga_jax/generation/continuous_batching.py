"""Continuous batching of requests that are all known: a batch that runs to its end."""

import dataclasses
import math
import time
from collections.abc import Collection, Iterator, Sequence

from dga_jax.generation.cache_shapes import dense_bytes
from dga_jax.generation.engine import Engine
from dga_jax.generation.requests import Emitted, Request
from dga_jax.generation.sampling import Sampling
from dga_jax.model import Decoder

_DECODE_CHUNK = 8  # Decode steps per host synchronization.


@dataclasses.dataclass(frozen=True)
class Generation:
  """The continuations of all requests, and the times and sizes of the run.

  Attributes:
    tokens: the new tokens of every request, without the stop token.
    failed: for every request, whether it ended because its logits were not finite; `tokens` then
      has the tokens before that.
    prefill_seconds: until the first tokens of the first slots, without compilation.
    step_seconds: mean time of a decoding step after that, with the prefill of later requests. NaN
      if all requests end before; then `prefill_seconds` includes their few decoding steps.
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
    if math.isnan(self.step_seconds):
      times = f"prefill and decoding {self.seconds * 1e3:.1f} ms"
    else:
      prefill, step = self.prefill_seconds * 1e3, self.step_seconds * 1e3
      times = f"prefill {prefill:.1f} ms, then {step:.2f} ms a token"
    return (
      f"{times} ({rate:.1f} tokens/s in all); cache {_si(self.cache_bytes)}, dense would be"
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


class ContinuousBatching:
  """Continues requests, `slots` of them at once: iterate over `steps`, then read `result`.

  It runs an `Engine` whose requests are all known. A request that ends frees its slot for the next
  waiting request, so the batch stays full while requests wait. A request's tokens do not depend on
  the other requests, and everything is compiled by the constructor.

  A request whose logits are NaN or infinite ends there and is marked in `result.failed`; the other
  requests continue.

  Args:
    model: a decoder of any attention kind.
    requests: admitted in this order.
    slots: sequences that run at once; at most the number of requests is used.
    stop_ids: tokens that end a sequence, beside those of its request.
    max_length: bound on the tokens of a prompt and its continuation; None for no bound.
    prompt_length: pads all prompts to this many tokens and bounds a prompt with its continuation by
      them, so that `replace_requests` takes other prompts. None pads to few lengths.
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
    prompt_length: int | None = None,
    prompt_chunk: int | None = None,
    decode_chunk: int = _DECODE_CHUNK,
  ) -> None:
    if slots < 1:
      raise ValueError(f"slots is {slots}; it must be at least 1.")
    if not requests:
      raise ValueError("There is no prompt; give at least one.")
    self._max_length = max_length if prompt_length is None else prompt_length
    self._vocab_size, self._stop_ids = model.config.vocab_size, frozenset(stop_ids)
    self.replace_requests(requests)
    self._decode_chunk, self._slots = decode_chunk, min(slots, len(requests))
    if prompt_length is not None:
      padded, self._length = {prompt_length}, prompt_length
    else:
      padded = {_padded_length(len(request.prompt)) for request in requests}
      self._length = max(len(request.prompt) + request.max_new_tokens for request in requests)
      if prompt_chunk is None:
        self._length = max(self._length, *padded)
    self._engine = Engine(
      model,
      slots=self._slots,
      max_length=self._length,
      prompt_chunk=prompt_chunk,
      whole_lengths=padded,
      decode_chunk=decode_chunk,
      pieces_per_step=None,
    )
    self.result: Generation | None = None

  def replace_requests(self, requests: Sequence[Request]) -> None:
    """The next `steps` run these requests in the programs of the present ones.

    Raises:
      ValueError: a request exceeds `prompt_length`, or is refused as in the constructor.
    """
    for row, request in enumerate(requests):
      request.check(f"prompt {row}", self._vocab_size, self._max_length)
    self._requests = [
      dataclasses.replace(request, stop_ids=frozenset([*request.stop_ids, *self._stop_ids]))
      for request in requests
    ]

  def steps(self) -> Iterator[list[Emitted]]:
    """Runs all requests from their start; yields the new tokens of every decode chunk.

    Every call runs the requests again, and ends an earlier iteration. `result` is None until the
    iterator ends.
    """
    engine, self.result = self._engine, None
    engine.reset()
    tokens: list[list[int]] = [[] for _ in self._requests]
    failed = [False] * len(self._requests)
    for request in self._requests:
      engine.submit(request)
    begin, prefill_seconds = time.perf_counter(), 0.0
    steps = 0
    while engine.busy:
      step = engine.step()
      steps += 1
      if steps == 1:  # It reads prompts and returns their first tokens.
        prefill_seconds = time.perf_counter() - begin
      for emitted in step:
        tokens[emitted.request] += emitted.tokens
        failed[emitted.request] = emitted.finish == "not_finite"
      yield step
    seconds = time.perf_counter() - begin
    step_seconds = float("nan")
    if steps > 1:
      step_seconds = (seconds - prefill_seconds) / max(1, engine.chunks * self._decode_chunk)
    engine.reset()
    config = engine.config
    self.result = Generation(
      tokens=tokens,
      failed=failed,
      prefill_seconds=prefill_seconds,
      step_seconds=step_seconds,
      seconds=seconds,
      cache_bytes=engine.programs.state_bytes,
      dense_cache_bytes=self._slots * dense_bytes(config, self._length),
      dtype=config.dtype,
    )

  def run(self) -> Generation:
    """Iterates over `steps` to the end and returns the result."""
    for _ in self.steps():
      pass
    assert self.result is not None
    return self.result


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


def _padded_length(length: int) -> int:
  """One of few lengths, so that similar prompts share a program; at most a quarter is padding."""
  step = max(64, 2 ** math.ceil(math.log2(length)) // 8)
  return -(-length // step) * step


def _si(count: float) -> str:
  for unit in ("B", "kB", "MB", "GB"):
    if count < 1000 or unit == "GB":
      break
    count /= 1000
  return f"{count:.3g} {unit}"
