"""POST /v1/completions and /v1/chat/completions."""

import asyncio
import contextlib
import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from dga_jax.generation import Request
from dga_jax.serving.answers import Answers, check_length, Delta
from dga_jax.serving.errors import APIError
from dga_jax.serving.json_response import json_response, to_json
from dga_jax.serving.metrics import Metrics
from dga_jax.serving.parameters import Parameters
from dga_jax.serving.served_model import ServedModel


class Format(Protocol):
  """The JSON objects of an endpoint."""

  object_name: str
  chunk_name: str
  id_prefix: str

  def first_choices(self) -> list[dict[str, Any]]:
    """The choices of the chunks that begin a stream, one chunk each."""

  def chunk_choice(self, delta: Delta) -> dict[str, Any]:
    """The choice of a chunk."""

  def whole_choice(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
    """The choice of a whole answer."""


@dataclasses.dataclass(frozen=True)
class Prompt:
  """An encoded prompt.

  Attributes:
    tokens: of the prompt.
    keep_at: see `Request`.
    logprobs: see `Request.prompt_logprobs`.
  """

  tokens: list[int]
  keep_at: list[int] | None = None
  logprobs: bool = False


async def answer(
  http: HTTPRequest,
  served: ServedModel,
  parameters: Parameters,
  prompts: Sequence[Prompt],
  style: Format,
  metrics: Metrics,
) -> Response:
  """Runs the choices of all prompts and answers whole or as a stream.

  Raises:
    APIError: the prompts do not fit, or the engine is full or fails.
  """
  requests = _requests(served, parameters, prompts)
  answers = Answers(served, requests, parameters.choices, parameters.stop, metrics)
  head = {
    "id": f"{style.id_prefix}-{secrets.token_hex(12)}",
    "object": style.chunk_name if parameters.stream else style.object_name,
    "created": int(time.time()),
    "model": served.name,
  }
  if parameters.stream:
    return _Stream(answers, _events(answers, parameters, style, head))
  return await _unless_disconnected(
    http, answers, lambda: _whole(answers, len(requests), style, head)
  )


def _requests(
  served: ServedModel, parameters: Parameters, prompts: Sequence[Prompt]
) -> list[Request]:
  engine, requests = served.engine, []
  count = len(prompts) * parameters.choices
  if count > engine.capacity:
    raise APIError(
      400,
      f"n and the number of prompts ask for {count} answers; the server takes at most"
      f" {engine.capacity} at a time.",
      param="n",
      code="invalid_value",
    )
  for prompt in prompts:
    most = check_length(engine, len(prompt.tokens), parameters.max_tokens)
    for i in range(parameters.choices):
      request = Request(
        prompt.tokens,
        most,
        parameters.sampling.with_offset(i),
        stop_ids=parameters.stop_ids | set(served.tokenizer.stop_ids),
        keep_at=prompt.keep_at,
        prompt_logprobs=prompt.logprobs,
      )
      try:
        request.check("the prompt", engine.config.vocab_size, engine.max_length)
      except ValueError as error:
        raise APIError(400, str(error), code="invalid_value") from error
      requests.append(request)
  return requests


async def _whole(answers: Answers, count: int, style: Format, head: Mapping[str, Any]) -> Response:
  deltas: list[list[Delta]] = [[] for _ in range(count)]
  async for delta in answers.deltas():
    if delta is not None:
      deltas[delta.index].append(delta)
  choices = [style.whole_choice(i, parts) for i, parts in enumerate(deltas)]
  return json_response({**head, "choices": choices, "usage": answers.usage()})


async def _events(
  answers: Answers, parameters: Parameters, style: Format, head: Mapping[str, Any]
) -> AsyncIterator[bytes]:
  """Server-sent events: chunks of new text, the usage if it is requested, and [DONE]."""

  def chunk(choices: list[dict[str, Any]], *, last: bool = False) -> bytes:
    value = {**head, "choices": choices}
    if parameters.continuous_usage or (last and parameters.include_usage):
      value["usage"] = answers.usage()
    elif parameters.include_usage:
      value["usage"] = None
    return _event(to_json(value))

  try:
    for choice in style.first_choices():
      yield chunk([choice])
    async for delta in answers.deltas():
      if delta is None:
        yield b": waiting\n\n"  # A comment, which clients skip.
      elif delta.text or delta.finish or delta.logprobs or delta.prompt_logprobs is not None:
        yield chunk([style.chunk_choice(delta)])
    if parameters.include_usage:
      yield chunk([], last=True)
  except APIError as error:
    yield _event(to_json(error.body()))
  answers.close()  # Before the end of the stream, so that a client can read the metrics after it.
  yield _event(b"[DONE]")


def _event(data: bytes) -> bytes:
  return b"data: " + data + b"\n\n"


class _Stream(StreamingResponse):
  """A stream. A client that disconnects ends its answers, even before the first event."""

  def __init__(self, answers: Answers, events: AsyncIterator[bytes]) -> None:
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    super().__init__(events, media_type="text/event-stream", headers=headers)
    self._answers = answers

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    try:
      await super().__call__(scope, receive, send)
    finally:
      self._answers.close()


async def _unless_disconnected(
  http: HTTPRequest, answers: Answers, run: Callable[[], Coroutine[Any, Any, Response]]
) -> Response:
  """The response, or an empty one when the client disconnects; cancels all other work."""
  work, gone = asyncio.create_task(run()), asyncio.create_task(_disconnected(http))
  try:
    await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
    return work.result() if work.done() else Response(status_code=499)
  finally:
    answers.close()
    for task in (work, gone):
      task.cancel()
      with contextlib.suppress(asyncio.CancelledError, APIError):
        await task


async def _disconnected(http: HTTPRequest) -> None:
  while (await http.receive())["type"] != "http.disconnect":
    pass
