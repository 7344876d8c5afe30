"""Runs the application with uvicorn; SIGTERM and Ctrl-C end it in order."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from starlette.applications import Starlette

# Clients close idle connections after 5 s (httpx, openai) to 15 s (aiohttp). A server that closes
# first can reset a connection on which a client has just sent a request.
_KEEP_ALIVE_SECONDS = 75
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# After the end of all requests their responses have so long to be sent.
_SEND_SECONDS = 5


class _Server(uvicorn.Server):
  """A server that a signal stops with exit status 0; uvicorn's own raises the signal again.

  uvicorn cancels requests that are not over in time, whose clients then get no JSON. Therefore
  `end_requests` ends them before.
  """

  def __init__(
    self, config: uvicorn.Config, stop_seconds: int, end_requests: Callable[[], None]
  ) -> None:
    super().__init__(config)
    self._stop_seconds, self._end_requests = stop_seconds, end_requests

  async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
    """Waits for the running requests, and ends them after `stop_seconds`."""
    loop = asyncio.get_running_loop()
    timer = loop.call_later(
      self._stop_seconds, lambda: loop.run_in_executor(None, self._end_requests)
    )
    try:
      await super().shutdown(sockets)
    finally:
      timer.cancel()

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    """Handles signals until the server has stopped."""
    before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
    try:
      yield
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)


def check_address(host: str, port: int) -> None:
  """Checks that a server could listen, so that an error does not come after the compilation.

  Raises:
    OSError: the address is in use, unknown or not allowed.
  """
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  try:
    socket.create_server((host, port), family=family).close()
  except OSError as error:
    raise OSError(
      f"the server cannot listen at host {host}, port {port}: {error.strerror}. Choose another "
      "--port, or a --host of this machine."
    ) from error


def run(
  app: Starlette, *, host: str, port: int, stop_seconds: int, end_requests: Callable[[], None]
) -> None:
  """Serves until a signal: then no request is accepted, and running ones may finish.

  Args:
    app: the application.
    host: address to listen at.
    port: to listen at; 0 for a free one, which the log names.
    stop_seconds: how long running requests may take after the signal.
    end_requests: ends the requests that take longer; called in a thread.
  """
  config = uvicorn.Config(
    app,
    host=host,
    port=port,
    timeout_graceful_shutdown=stop_seconds + _SEND_SECONDS,
    timeout_keep_alive=_KEEP_ALIVE_SECONDS,
    log_level="info",
    access_log=False,
    server_header=False,
  )
  _Server(config, stop_seconds, end_requests).run()
