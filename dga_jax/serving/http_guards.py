"""Reads request bodies within bounds, and checks the API key."""

import asyncio
import hmac
import json
from collections.abc import Mapping
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from dga_jax.serving.errors import APIError, invalid
from dga_jax.serving.metrics import Metrics

_BODY_SECONDS = 60.0
_DROP_SECONDS, _DROP_FACTOR = 2.0, 8  # Bounds on what is read of a body that is too large.
_OPEN_PATHS = ("/", "/health")
_PATHS = ("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")


async def read_json(http: Request, max_bytes: int) -> Any:
  """The JSON value of a body.

  Raises:
    APIError: 413 for a body that is too large, 408 for one that is too slow, 415 for a wrong
      Content-Type, 400 for one that is not JSON.
  """
  if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
    raise APIError(415, "Content-Type must be application/json.")
  body = await _read_body(http, max_bytes)
  try:
    return json.loads(body, parse_constant=_no_constant)
  except (ValueError, RecursionError) as error:
    raise invalid(None, f"The body is not JSON: {str(error)[:200]}", "invalid_json") from error


async def _read_body(http: Request, max_bytes: int) -> bytes:
  """The body. Some of a larger one is read and dropped: many clients read no answer before."""
  body, size = bytearray(), 0
  try:
    async with asyncio.timeout(_BODY_SECONDS) as limit:
      async for part in http.stream():
        if size <= max_bytes < size + len(part):
          limit.reschedule(asyncio.get_running_loop().time() + _DROP_SECONDS)
        size += len(part)
        if size <= max_bytes:
          body += part
        elif size > _DROP_FACTOR * max_bytes:
          break
  except TimeoutError as error:
    if size <= max_bytes:
      raise APIError(408, f"The body did not arrive within {_BODY_SECONDS:g} seconds.") from error
  except ClientDisconnect as error:
    raise APIError(499, "The client has disconnected.") from error
  if size > max_bytes:
    raise APIError(
      413,
      f"The body has more than {max_bytes} bytes, the limit of this server.",
      code="request_too_large",
      headers={"Connection": "close"},
    )
  return bytes(body)


def read_api_key(flag: str | None, environment: Mapping[str, str]) -> str | None:
  """The key that clients must send; None to serve without a key.

  Args:
    flag: the value of --api_key; None if it is not given.
    environment: has the key as DGA_API_KEY where the flag is not given.

  Raises:
    ValueError: the key is empty, or clients cannot send it.
  """
  key, name = (
    (environment.get("DGA_API_KEY"), "$DGA_API_KEY") if flag is None else (flag, "--api_key")
  )
  if key == "":
    raise ValueError(f"{name} is empty; give a key, or leave {name} out to serve without a key.")
  if key is not None and not (key.isascii() and key.isprintable() and key == key.strip()):
    raise ValueError(
      f"{name} has characters that clients cannot send in a header; give printable ASCII without"
      " spaces around it."
    )
  return key


def _no_constant(name: str) -> None:
  raise ValueError(f"{name} is not a JSON value")


class Guard:
  """Middleware: checks the API key, and counts requests by status.

  Args:
    app: the application.
    api_key: that clients must give; None for none.
    metrics: of the server.
  """

  def __init__(self, app: ASGIApp, api_key: str | None, metrics: Metrics) -> None:
    self._app, self._metrics = app, metrics
    self._expected = None if api_key is None else f"Bearer {api_key}".encode()

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers 401 without the key; otherwise calls the application."""
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    path = scope["path"] if scope["path"] in _PATHS else "other"
    answered = False

    async def counted(message: Any) -> None:
      nonlocal answered
      if message["type"] == "http.response.start":
        answered = True
        self._metrics.requests.labels(path, message["status"]).inc()
      await send(message)

    if self._allows(scope):
      try:
        await self._app(scope, receive, counted)
      except Exception:
        if not answered:  # Starlette answers 500, outside of this middleware.
          self._metrics.requests.labels(path, 500).inc()
        raise
    else:
      error = APIError(401, "The API key is missing or wrong: send Authorization: Bearer KEY.")
      await error.response()(scope, receive, counted)

  def _allows(self, scope: Scope) -> bool:
    if self._expected is None or scope["path"] in _OPEN_PATHS:
      return True
    given = dict(scope["headers"]).get(b"authorization", b"")
    return hmac.compare_digest(given, self._expected)
