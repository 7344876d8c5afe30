"""The rendezvous of processes: success, and each fault as one sentence within seconds."""

import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.train.fleet import free_port
from train.errors import TrainingError
from train.rendezvous import meet


class Caller:
  """Calls `meet` in a thread.

  Attributes:
    error: the message of its TrainingError; None if `meet` returned.
    seconds: duration of the call.
  """

  def __init__(
    self, port: int, process_id: int, num_processes: int = 2, timeout: float = 20.0
  ) -> None:
    self.error: str | None = None
    self.seconds = 0.0
    self._arguments = (port, process_id, num_processes, timeout)
    self._thread = threading.Thread(target=self._call)
    self._thread.start()

  def _call(self) -> None:
    port, process_id, num_processes, timeout = self._arguments
    start = time.monotonic()
    try:
      meet("127.0.0.1", port, process_id=process_id, num_processes=num_processes, timeout=timeout)
    except TrainingError as error:
      self.error = str(error)
    self.seconds = time.monotonic() - start

  def wait(self) -> str | None:
    self._thread.join(60)
    assert not self._thread.is_alive()
    return self.error


def call_all(*callers: Caller) -> list[str | None]:
  return [caller.wait() for caller in callers]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_processes_connect_in_any_order(order: tuple[int, ...]) -> None:
  port = free_port()
  callers = []
  for process_id in order:
    callers.append(Caller(port, process_id, 3))
    time.sleep(0.2)
  assert call_all(*callers) == [None] * 3
  # The port is free again, because jax.distributed uses it.
  with socket.create_server(("127.0.0.1", port)):
    pass


def test_a_single_process_needs_no_other() -> None:
  assert Caller(free_port(), 0, 1).wait() is None


def test_an_unknown_host(monkeypatch: pytest.MonkeyPatch) -> None:
  def resolve(*_: object, **__: object) -> None:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

  monkeypatch.setattr(socket, "getaddrinfo", resolve)
  start = time.monotonic()
  for process_id in (0, 1):
    with pytest.raises(TrainingError, match=r"host of --coordinator=nowhere:1 is unknown .*Give"):
      meet("nowhere", 1, process_id=process_id, num_processes=2, timeout=300)
  assert time.monotonic() - start < 20


def test_a_coordinator_address_of_another_machine_is_an_error(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  def refuse(*_: object, **__: object) -> None:
    raise ConnectionRefusedError(111, "Connection refused")

  monkeypatch.setattr(socket, "create_connection", refuse)
  with pytest.raises(TrainingError, match="Process 0 does not reach itself at --coordinator="):
    meet("127.0.0.1", free_port(), process_id=0, num_processes=2, timeout=300)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_taken_port_is_an_error(host: str) -> None:
  with socket.create_server((host, 0)) as other:
    caller = Caller(other.getsockname()[1], 0, timeout=300)
    error = caller.wait()
  assert error
  assert re.search(r"cannot listen at port \d+ of this machine .*Choose another port", error)
  assert caller.seconds < 10


def test_two_processes_with_number_0_are_an_error() -> None:
  port = free_port()
  first = Caller(port, 0)
  time.sleep(0.3)
  second = Caller(port, 0)
  assert "a second process with --process_id=0" in str(second.wait())
  assert call_all(Caller(port, 1), first) == [None, None]


def test_two_processes_with_equal_numbers_are_an_error() -> None:
  port = free_port()
  first = [Caller(port, process_id, 3) for process_id in (0, 1)]
  time.sleep(0.5)
  second = Caller(port, 1, 3)
  assert second.wait() == "Two processes have --process_id=1. Give each another number."
  assert second.seconds < 10
  # The other processes still wait for the missing one, and connect with it.
  assert call_all(Caller(port, 2, 3), *first) == [None] * 3


def test_different_values_of_num_processes_are_an_error() -> None:
  port = free_port()
  first = Caller(port, 0, 2)
  assert Caller(port, 1, 3).wait() == "--num_processes is 3 here and 2 in process 0."
  assert call_all(Caller(port, 1, 2), first) == [None, None]


def test_a_missing_process_is_named_at_the_timeout() -> None:
  port = free_port()
  callers = [Caller(port, process_id, 4, timeout=2.0) for process_id in (0, 2)]
  for error in call_all(*callers):
    assert error
    assert re.search(r"Processes 1, 3 of 4 did not come within 2 s \(--start_timeout\)", error)


def test_a_missing_process_0_is_a_warning_and_then_an_error(
  caplog: pytest.LogCaptureFixture,
) -> None:
  """Process 0 may start later, so the error follows only at the timeout."""
  port = free_port()
  caller = Caller(port, 1, timeout=7.0)
  error = caller.wait()
  assert error
  assert re.search(rf"No process answers at --coordinator=127.0.0.1:{port} .* for 7 s", error)
  assert "Process 0 does not run yet, or the address is wrong. Waiting" in caplog.text


def test_a_process_that_left_may_connect_again() -> None:
  port = free_port()
  first = Caller(port, 0, 3)
  with contextlib.closing(_greet(port, 1, 3)):
    pass
  time.sleep(0.3)
  assert call_all(Caller(port, 1, 3), Caller(port, 2, 3), first) == [None] * 3


def test_other_processes_report_that_process_0_left() -> None:
  with socket.create_server(("127.0.0.1", 0)) as server:
    caller = Caller(server.getsockname()[1], 1, timeout=300)
    connection, _ = server.accept()
    with connection:
      connection.recv(1000)
      connection.sendall(b'{"greeting": "dga-jax"}\n')
    assert "Process 0 has left" in str(caller.wait())


@pytest.mark.parametrize(
  "answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", b"[[[[\n", b"\0" * 99]
)
def test_an_answer_of_another_program_is_an_error(answer: bytes) -> None:
  with socket.create_server(("127.0.0.1", 0)) as server:
    caller = Caller(server.getsockname()[1], 1, timeout=300)
    connection, _ = server.accept()
    with connection:
      connection.recv(1000)
      connection.sendall(answer)
    assert "another program answers" in str(caller.wait())
    assert caller.seconds < 10


def test_a_program_that_does_not_answer_is_an_error() -> None:
  with socket.create_server(("127.0.0.1", 0)) as server:
    caller = Caller(server.getsockname()[1], 1, timeout=300)
    assert "another program answers" in str(caller.wait())
    assert caller.seconds < 10


@pytest.mark.parametrize(
  "nonsense", [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 5000, b'{"greeting": 3}\n']
)
def test_other_connections_do_not_interfere(nonsense: bytes) -> None:
  port = free_port()
  first = Caller(port, 0)
  with _connect(port) as stranger, _connect(port):  # The second connection sends nothing.
    stranger.sendall(nonsense)
    assert call_all(Caller(port, 1), first) == [None, None]


def _connect(port: int) -> socket.socket:
  for _ in range(100):
    with contextlib.suppress(OSError):
      return socket.create_connection(("127.0.0.1", port))
    time.sleep(0.05)
  raise TimeoutError


def _greet(port: int, process_id: int, num_processes: int) -> socket.socket:
  connection = _connect(port)
  text = f'{{"greeting": "dga-jax", "process_id": {process_id}, "num_processes": {num_processes}}}'
  connection.sendall(text.encode() + b"\n")
  connection.recv(1000)
  return connection


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
  before = threading.active_count()
  yield
  assert threading.active_count() == before
