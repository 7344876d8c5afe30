"""Answers of the engine on asyncio's loop: text, log probabilities and usage of every choice."""

import asyncio
import dataclasses
import functools
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from dga_jax.generation import (
  Emitted,
  Engine,
  EngineStoppedError,
  QueueFullError,
  Request,
  TokenLogprobs,
)
from dga_jax.generation.cache_shapes import dense_bytes
from dga_jax.generation.live_bytes import live_bytes
from dga_jax.serving.errors import APIError
from dga_jax.serving.metrics import Metrics
from dga_jax.serving.served_model import ServedModel
from dga_jax.serving.text_stream import TextStream

_RETRY_SECONDS = "1"
# Without tokens for so long, `deltas` yields None. Proxies end a stream that is silent.
_SILENT_SECONDS = 15.0


@dataclasses.dataclass(frozen=True)
class Delta:
  """New text of a choice.

  Attributes:
    index: of the choice.
    text: new text, of whole characters.
    tokens: the tokens of `logprobs`.
    logprobs: one entry a token, if the request has `top_logprobs`.
    finish: "stop" or "length" with the last text, else None.
    prompt_logprobs: see `Emitted`.
  """

  index: int
  text: str
  tokens: list[int]
  logprobs: list[TokenLogprobs]
  finish: str | None
  prompt_logprobs: list[TokenLogprobs] | None = None


@dataclasses.dataclass
class _Choice:
  number: int
  request: Request
  stream: TextStream
  tokens: list[int] = dataclasses.field(default_factory=list)
  cached_tokens: int = 0
  first_time: float = 0.0  # Of the first tokens from the engine; 0 before them.
  last_time: float = 0.0
  ended: bool = False


class Answers:
  """The choices of one HTTP request, in the engine together; iterate over `deltas`.

  Args:
    served: the model.
    requests: one for each choice; the choices of a prompt are neighbours.
    choices: choices of each prompt.
    stops: texts that end an answer.
    metrics: of the server.

  Raises:
    APIError: the engine is full, or does not run.
  """

  def __init__(
    self,
    served: ServedModel,
    requests: Sequence[Request],
    choices: int,
    stops: Sequence[str],
    metrics: Metrics,
  ) -> None:
    self._served, self._per_prompt, self._metrics = served, choices, metrics
    self._begin = time.perf_counter()
    self._loop = asyncio.get_running_loop()
    self._queue: asyncio.Queue[tuple[int, Emitted, float]] = asyncio.Queue()
    self._choices: list[_Choice] = []
    self._closed = False
    for index, request in enumerate(requests):
      try:
        number = served.engine.submit(request, functools.partial(self._deliver, index))
      except (QueueFullError, EngineStoppedError) as error:
        self._cancel()
        raise _refusal(error) from error
      stream = TextStream(served.tokenizer, stops)
      self._choices.append(_Choice(number, request, stream))

  async def deltas(self) -> AsyncIterator[Delta | None]:
    """New text of the choices in the order of its arrival, until all have ended.

    None tells that there was no text for a while: the requests wait, or a long prompt is read.

    Raises:
      APIError: the engine has failed, or logits are not finite.
    """
    while not all(choice.ended for choice in self._choices):
      try:
        async with asyncio.timeout(_SILENT_SECONDS):
          index, emitted, time_of_tokens = await self._queue.get()
      except TimeoutError:
        yield None
        continue
      choice = self._choices[index]
      if choice.ended:
        continue
      if emitted.finish in ("not_finite", "failed", "cancelled"):
        raise _failure(emitted)
      choice.last_time = time_of_tokens
      choice.first_time = choice.first_time or time_of_tokens
      yield self._delta(index, choice, emitted)

  def close(self) -> None:
    """Ends the choices that have not ended, and adds all to the metrics; again it does nothing.

    A choice that ends early, because its client has left, counts with its tokens so far.
    """
    if not self._closed:
      self._closed = True
      self._cancel()
      self._observe()

  def _cancel(self) -> None:
    for choice in self._choices:
      if not choice.ended:
        choice.ended = True
        self._served.engine.cancel(choice.number)

  def usage(self) -> dict[str, Any]:
    """The numbers of tokens so far, and the bytes of the caches of all choices."""
    engine, firsts = self._served.engine, self._choices[:: self._per_prompt]
    prompt = sum(len(choice.request.prompt) for choice in firsts)
    new = sum(len(choice.tokens) for choice in self._choices)
    lengths = [len(choice.request.prompt) + len(choice.tokens) for choice in self._choices]
    return {
      "prompt_tokens": prompt,
      "completion_tokens": new,
      "total_tokens": prompt + new,
      "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in firsts)},
      "cache_bytes": {
        "live": sum(live_bytes(engine.config, length) for length in lengths),
        "dense": sum(dense_bytes(engine.config, length) for length in lengths),
      },
    }

  def _deliver(self, index: int, emitted: Emitted) -> None:
    """On the engine's thread."""
    now = time.perf_counter()
    if not self._loop.is_closed():
      self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, emitted, now))

  def _delta(self, index: int, choice: _Choice, emitted: Emitted) -> Delta:
    choice.cached_tokens = emitted.cached_tokens
    text, count = "", 0
    for token in emitted.tokens:
      text += choice.stream.add(token)
      count += 1
      if choice.stream.stopped:
        break
    choice.tokens += emitted.tokens[:count]
    finish = "stop" if choice.stream.stopped else emitted.finish
    if finish is not None:
      text += choice.stream.finish()
      finish = "stop" if choice.stream.stopped else finish
      choice.ended = True
      if emitted.finish is None:
        self._served.engine.cancel(choice.number)
      if choice.stream.stopped:  # The engine has decoded more tokens, or keeps them.
        answer = choice.tokens[: choice.stream.whole_tokens]
        self._served.engine.read_ahead([*choice.request.prompt, *answer])
    tokens, logprobs = emitted.tokens[:count], emitted.logprobs[:count]
    return Delta(index, text, tokens, logprobs, finish, emitted.prompt_logprobs)

  def _observe(self) -> None:
    name = self._served.name
    for i, choice in enumerate(self._choices):
      self._metrics.new_tokens.labels(name).inc(len(choice.tokens))
      if i % self._per_prompt == 0 and choice.first_time:
        self._metrics.prompt_tokens.labels(name).inc(len(choice.request.prompt))
        self._metrics.cached_tokens.labels(name).inc(choice.cached_tokens)
      if choice.tokens:
        self._metrics.first_token.labels(name).observe(choice.first_time - self._begin)
      if len(choice.tokens) > 1:
        seconds = (choice.last_time - choice.first_time) / (len(choice.tokens) - 1)
        self._metrics.between_tokens.labels(name).observe(seconds)


def check_length(engine: Engine, prompt_tokens: int, max_tokens: int | None) -> int:
  """The bound on the new tokens of a prompt.

  Raises:
    APIError: prompt and new tokens exceed the context.
  """
  most = engine.max_length - prompt_tokens
  if most < 1 or (max_tokens is not None and max_tokens > most):
    new = 1 if max_tokens is None else max_tokens
    raise APIError(
      400,
      f"The context has at most {engine.max_length} tokens. The prompt has {prompt_tokens} tokens"
      f" and the answer may have {new}, together {prompt_tokens + new}. Shorten the prompt, or"
      " lower max_tokens.",
      param="max_tokens" if most >= 1 else None,
      code="context_length_exceeded",
    )
  return most if max_tokens is None else max_tokens


def _refusal(error: Exception) -> APIError:
  if isinstance(error, QueueFullError):
    headers = {"Retry-After": _RETRY_SECONDS}
    return APIError(429, f"The server is full: {error}", code="queue_full", headers=headers)
  return APIError(503, str(error), code="engine_stopped", headers={"Retry-After": _RETRY_SECONDS})


def _failure(emitted: Emitted) -> APIError:
  if emitted.finish == "not_finite":
    return APIError(500, "The model's logits are NaN or infinite.", code="not_finite")
  if emitted.finish == "cancelled":
    return APIError(503, "The server is stopping.", code="engine_stopped")
  return APIError(500, "The engine has failed.", code="engine_failed")
