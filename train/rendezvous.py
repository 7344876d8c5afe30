"""The processes of a run meet before jax connects them, and say what is wrong if they do not.

Left to itself, `jax.distributed` waits for minutes and then aborts from C++. Here process 0 listens
at the coordinator's address; every other process connects to it and sends its number. When all are
there, process 0 tells them, all connections are closed, and jax uses the same address.
"""

import json
import selectors
import socket
import time
from typing import Any

from absl import logging

from train.errors import TrainingError

# First line of a connection, and of its answer.
_GREETING = "dga-jax"
_MAX_LINE = 1000
_ANSWER_SECONDS = 5.0
_RETRY_SECONDS = 0.3
# A name that cannot be resolved for so long is wrong.
_UNKNOWN_HOST_SECONDS = 6.0
_FIRST_WARNING_SECONDS = 5.0
_WARNING_SECONDS = 30.0


def meet(host: str, port: int, *, process_id: int, num_processes: int, timeout: float) -> None:
  """Returns when all processes of the run have called it.

  Args:
    host: name or address of process 0's machine.
    port: of process 0.
    process_id: number of this process, from 0.
    num_processes: how many there are.
    timeout: seconds after which missing processes are an error.

  Raises:
    TrainingError: an unknown host, a port that is taken or of another program, two processes with
      one number, unequal numbers of processes, or processes that are missing.
  """
  _check_host(host, port)
  if process_id == 0:
    with _listen(port) as listener:
      _check_own_address(host, port)
      _Host(listener, num_processes).wait_for_all(timeout)
  elif num_processes > 1:
    _join(host, port, process_id, num_processes, timeout)


def _check_host(host: str, port: int) -> None:
  deadline = time.monotonic() + _UNKNOWN_HOST_SECONDS
  while True:
    try:
      socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
      return
    except (socket.gaierror, UnicodeError) as error:
      if time.monotonic() > deadline:
        raise TrainingError(
          f"The host of --coordinator={host}:{port} is unknown ({error}). Give the name or address "
          "of the machine of process 0."
        ) from error
    time.sleep(_RETRY_SECONDS)


def _listen(port: int) -> socket.socket:
  dual = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if dual else socket.AF_INET
  try:
    return socket.create_server(("", port), family=family, dualstack_ipv6=dual)
  except (OSError, OverflowError) as error:
    raise TrainingError(
      f"Process 0 cannot listen at port {port} of this machine ({error}): another program, another "
      "run or a second process with --process_id=0 uses it. Choose another port in --coordinator."
    ) from error


def _check_own_address(host: str, port: int) -> None:
  try:
    socket.create_connection((host, port), timeout=_ANSWER_SECONDS).close()
  except OSError as error:
    raise TrainingError(
      f"Process 0 does not reach itself at --coordinator={host}:{port} ({error}). Give a name or "
      "address of the machine of process 0."
    ) from error


class _Host:
  """Process 0: collects connections of the other processes."""

  def __init__(self, listener: socket.socket, num_processes: int) -> None:
    self._listener = listener
    self._num_processes = num_processes
    self._waiting: dict[int, socket.socket] = {}
    self._selector = selectors.DefaultSelector()
    self._selector.register(listener, selectors.EVENT_READ)

  def wait_for_all(self, timeout: float) -> None:
    start = time.monotonic()
    warn_at = start + _FIRST_WARNING_SECONDS
    try:
      while missing := self._missing():
        now = time.monotonic()
        if now > start + timeout:
          message = (
            f"{_name_processes(missing)} of {self._num_processes} did not come within "
            f"{timeout:.0f} s (--start_timeout). Start all processes, with the same --coordinator "
            "and --num_processes."
          )
          self._tell_all({"error": message})
          raise TrainingError(message)
        if now > warn_at:
          left = start + timeout - now
          logging.warning("%s missing. Waiting %.0f s more.", _name_processes(missing), left)
          warn_at = now + _WARNING_SECONDS
        self._handle_events(min(warn_at, start + timeout) - now)
      self._tell_all({"go": True})
    finally:
      for connection in [key.fileobj for key in self._selector.get_map().values()]:
        if isinstance(connection, socket.socket) and connection is not self._listener:
          connection.close()
      self._selector.close()

  def _missing(self) -> list[int]:
    return [i for i in range(1, self._num_processes) if i not in self._waiting]

  def _handle_events(self, seconds: float) -> None:
    for key, _ in self._selector.select(max(0.0, seconds) + 0.01):
      connection = key.fileobj
      assert isinstance(connection, socket.socket)
      if connection is self._listener:
        accepted, _ = self._listener.accept()
        accepted.setblocking(False)
        self._selector.register(accepted, selectors.EVENT_READ, data=bytearray())
      else:
        self._read(connection, key.data)

  def _read(self, connection: socket.socket, line: bytearray) -> None:
    """Reads a part of a connection's line; drops the connection at its end or at nonsense."""
    try:
      content = connection.recv(_MAX_LINE)
    except BlockingIOError:
      return
    except OSError:
      content = b""
    line += content
    if content and b"\n" not in line and len(line) < _MAX_LINE:
      return
    if not content or not self._greet(connection, bytes(line)):
      self._waiting = {i: one for i, one in self._waiting.items() if one is not connection}
      self._selector.unregister(connection)
      connection.close()
    line.clear()

  def _greet(self, connection: socket.socket, line: bytes) -> bool:
    """Answers a process; whether it now waits for the others."""
    greeting = _parse(line)
    if greeting.get("greeting") != _GREETING:
      return False
    number, count = greeting.get("process_id"), greeting.get("num_processes")
    if count != self._num_processes:
      error = f"--num_processes is {count} here and {self._num_processes} in process 0."
    elif number in self._waiting:
      error = f"Two processes have --process_id={number}. Give each another number."
    elif not isinstance(number, int) or not 1 <= number < self._num_processes:
      error = f"--process_id is {number}; it must be from 1 to {self._num_processes - 1}."
    else:
      self._waiting[number] = connection
      return _send(connection, {"greeting": _GREETING})
    logging.warning("A process was sent away: %s", error)
    _send(connection, {"error": error})
    return False

  def _tell_all(self, message: dict[str, Any]) -> None:
    for connection in self._waiting.values():
      _send(connection, message)


def _join(host: str, port: int, process_id: int, num_processes: int, timeout: float) -> None:
  """Another process than 0: connects, greets and waits for the answer."""
  start = time.monotonic()
  with _connect(host, port, timeout) as connection:
    connection.settimeout(_ANSWER_SECONDS)
    greeting = {"greeting": _GREETING, "process_id": process_id, "num_processes": num_processes}
    _send(connection, greeting)
    with connection.makefile("rb") as lines:
      answer = _receive(lines)
      if answer is None or not ({"greeting", "error"} & answer.keys()):
        raise TrainingError(
          f"At --coordinator={host}:{port} another program answers, or a run that has all of its "
          "processes. Give the address of this run's process 0, and a port that is free."
        )
      if "error" not in answer:
        # Process 0 has the same timeout, and then says who is missing.
        connection.settimeout(max(0.0, start + timeout - time.monotonic()) + 2 * _ANSWER_SECONDS)
        answer = _receive(lines)
  if answer is None:
    raise TrainingError("Process 0 has left before all processes were there; see its log.")
  if "error" in answer:
    raise TrainingError(str(answer["error"]))


def _connect(host: str, port: int, timeout: float) -> socket.socket:
  start = time.monotonic()
  warn_at = start + _FIRST_WARNING_SECONDS
  while True:
    try:
      return socket.create_connection((host, port), timeout=_ANSWER_SECONDS)
    except (OSError, OverflowError) as error:
      now = time.monotonic()
      state = f"No process answers at --coordinator={host}:{port} ({error})"
      cause = "Process 0 does not run yet, or the address is wrong."
      if now > start + timeout:
        raise TrainingError(
          f"{state} for {timeout:.0f} s (--start_timeout). {cause} Start process 0, or give its "
          "address."
        ) from error
      if now > warn_at:
        logging.warning("%s. %s Waiting %.0f s more.", state, cause, start + timeout - now)
        warn_at = now + _WARNING_SECONDS
    time.sleep(_RETRY_SECONDS)


def _receive(lines: Any) -> dict[str, Any] | None:
  """The next answer; None where the connection has ended or stays silent."""
  try:
    line = lines.readline(_MAX_LINE)
  except OSError:
    return None
  return _parse(line) if line else None


def _parse(line: bytes) -> dict[str, Any]:
  """A line's JSON object; empty where it is none."""
  try:
    values = json.loads(line)
  except (RecursionError, ValueError):
    return {}
  return values if isinstance(values, dict) else {}


def _send(connection: socket.socket, message: dict[str, Any]) -> bool:
  """Sends a line; whether the other end took it."""
  try:
    connection.sendall(json.dumps(message).encode() + b"\n")
  except OSError:
    return False
  return True


def _name_processes(numbers: list[int]) -> str:
  shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
  return f"Process {shown}" if len(numbers) == 1 else f"Processes {shown}"
