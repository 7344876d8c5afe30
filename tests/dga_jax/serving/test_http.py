"""The server without a client library: bytes, limits, keys, disconnects and signals."""

import asyncio
import contextlib
import http.client
import json
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import httpx
import httpx_sse
import pytest

from dga_jax.serving.server import check_address
from tests.dga_jax.serving.tiny_server import NAME, serve, Server

BODY = {"model": NAME, "prompt": "Rain", "max_tokens": 8, "temperature": 0}
# The model never samples its end token.
LONG = BODY | {"max_tokens": 490, "logit_bias": {"256": -100}}


def raw(server: Server, request: bytes) -> bytes:
  """Sends bytes and reads until the server closes."""
  with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
    connection.sendall(request)
    return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
  """Reads until the server closes."""
  return b"".join(iter(lambda: connection.recv(65536), b""))


def post_bytes(body: bytes) -> bytes:
  head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
  head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
  return head.encode() + body


def complete(server: Server, **options) -> httpx.Response:
  return httpx.post(f"{server.url}/v1/completions", json=BODY | options, timeout=60)


def test_the_bytes_of_a_stream(server):
  answer = raw(
    server, post_bytes(json.dumps(BODY | {"stream": True, "logit_bias": {"256": -100}}).encode())
  )
  head, _, body = answer.partition(b"\r\n\r\n")
  assert head.startswith(b"HTTP/1.1 200 OK")
  assert b"content-type: text/event-stream" in head.lower()
  events = re.findall(rb"data: (.*)\n\n", body)
  assert events[-1] == b"[DONE]"
  chunks = [json.loads(event) for event in events[:-1]]
  reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
  assert reasons == [None] * (len(chunks) - 1) + ["length"]
  assert all("usage" not in chunk for chunk in chunks)


def test_a_second_client_library_reads_the_stream(server):
  whole = complete(server).json()["choices"][0]["text"]
  with (
    httpx.Client(timeout=60) as client,
    httpx_sse.connect_sse(
      client, "POST", f"{server.url}/v1/completions", json=BODY | {"stream": True}
    ) as source,
  ):
    events = [event.data for event in source.iter_sse()]
  assert events[-1] == "[DONE]"
  assert "".join(json.loads(data)["choices"][0]["text"] for data in events[:-1]) == whole


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server):
  def curl(*options: str) -> str:
    command = ["curl", "--silent", "--max-time", "60", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout

  url, whole = f"{server.url}/v1/completions", complete(server).json()["choices"][0]["text"]
  post = ("-H", "Content-Type: application/json", "--data")
  assert json.loads(curl(url, *post, json.dumps(BODY)))["choices"][0]["text"] == whole
  events = re.findall("data: (.*)\n\n", curl("-N", url, *post, json.dumps(BODY | {"stream": True})))
  assert events[-1] == "[DONE]"
  assert "".join(json.loads(data)["choices"][0]["text"] for data in events[:-1]) == whole
  refused = json.loads(curl(url, *post, json.dumps(BODY | {"tools": [1]})))
  assert "tools" in refused["error"]["message"]
  assert curl("-o", "/dev/null", "-w", "%{http_code}", url, "--data", "{}") == "415"


@pytest.mark.parametrize(
  ("body", "message"),
  [
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b"\xff", "not JSON"),
    (b"[" * 50_000, "not JSON"),
    (b'{"model": NaN}', "NaN is not a JSON value"),
    (b"[]", "must be a JSON object"),
    (b'{"model": "tiny", "prompt": "\\ud800"}', "prompt: The text cannot be encoded"),
    (b'{"model": "tiny", "prompt": [5, -1], "echo": true}', "the token id -1; this model has ids"),
    (b'{"model": "tiny", "prompt": [%d], "echo": true}' % 2**40, "ids from 0 to 256"),
    (b'{"model": "tiny", "prompt": "a", "temperature": 1%s}' % (b"0" * 400), "from 0 to 100"),
    (b'{"model": "tiny", "prompt": "a", "\\ud800": 1}', "not a parameter"),
  ],
)
def test_bodies_that_are_wrong(server, body, message):
  answer = raw(server, post_bytes(body))
  assert answer.startswith(b"HTTP/1.1 400")
  error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
  assert message in error["message"]
  assert set(error) == {"message", "type", "param", "code"}
  assert error["type"] == "invalid_request_error"


def test_a_body_that_is_too_large(server):
  assert raw(server, post_bytes(b"x" * 200_000)).startswith(b"HTTP/1.1 413")
  endless = post_bytes(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
  chunk = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
  assert raw(server, endless + chunk * 20).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
  ("method", "path", "status"),
  [("GET", "/v1/completions", 405), ("GET", "/nothing", 404), ("GET", "/v1/models/none", 404)],
)
def test_wrong_paths_and_methods(server, method, path, status):
  answer = httpx.request(method, server.url + path)
  assert answer.status_code == status
  assert answer.json()["error"]["message"]


def test_another_content_type_is_refused(server):
  answer = httpx.post(f"{server.url}/v1/completions", content=json.dumps(BODY))
  assert answer.status_code == 415


def test_more_requests_than_fit_get_429(server):
  async def flood() -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=30)
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:
      posts = [client.post(f"{server.url}/v1/completions", json=LONG) for _ in range(20)]
      return await asyncio.gather(*posts)

  answers = asyncio.run(flood())
  statuses = {answer.status_code for answer in answers}
  assert statuses == {200, 429}
  refused = next(answer for answer in answers if answer.status_code == 429)
  assert int(refused.headers["Retry-After"]) >= 1
  assert refused.json()["error"]["type"] == "rate_limit_error"
  server.wait_until_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_frees_its_slot(server, stream):
  before = server.metric("dga_generated_tokens_total")
  body = json.dumps(LONG | {"stream": stream}).encode()
  with socket.create_connection(("127.0.0.1", server.port)) as connection:
    connection.sendall(post_bytes(body))
    while not server.metric("dga_requests_running"):
      time.sleep(0.001)
  server.wait_until_idle()
  assert server.metric("dga_generated_tokens_total") - before < 490


def test_the_tokens_of_a_client_that_leaves_are_counted(server):
  names = ("dga_prompt_tokens_total", "dga_generated_tokens_total")
  before = [server.metric(name) for name in names]
  with httpx.stream(
    "POST", f"{server.url}/v1/completions", json=LONG | {"stream": True}, timeout=60
  ) as answer:
    next(answer.iter_lines())
  server.wait_until_idle()
  prompt, new = (server.metric(name) - old for name, old in zip(names, before, strict=True))
  assert prompt == len("Rain") + 1
  assert 0 < new < 490


def test_an_idle_connection_outlives_the_pools_of_clients(server):
  connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
  with contextlib.closing(connection):
    connection.request("GET", "/health")
    connection.getresponse().read()
    address = connection.sock.getsockname()
    time.sleep(6)  # httpx and openai keep idle connections for 5 seconds.
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    assert connection.sock.getsockname() == address


def test_metrics_and_health(server):
  assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
  complete(server)
  for name in (
    "dga_requests_total",
    "dga_prompt_tokens_total",
    "dga_generated_tokens_total",
    "dga_time_to_first_token_seconds_count",
    "dga_time_between_tokens_seconds_count",
    "dga_slot_bytes",
  ):
    assert server.metric(name) > 0


def test_the_page_is_one_file_without_other_hosts(server):
  answer = httpx.get(server.url)
  assert answer.headers["content-type"].startswith("text/html")
  assert "default-src 'none'" in answer.headers["content-security-policy"]
  assert re.findall(r"(?:src|href)=|https?://|@import", answer.text) == []


def wait_for_slot(server: Server) -> None:
  while not server.metric("dga_requests_running"):
    time.sleep(0.001)


def test_sigterm_lets_requests_finish_and_a_key_is_wanted(workdir: Path, tmp_path: Path):
  flags = ("--slots=1", "--api_key=secret", "--decode_chunk=1", "--prompt_chunk=32")
  with serve(workdir, tmp_path / "log", *flags) as server:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
      for path in ("/v1/models", "/metrics"):
        answer = httpx.get(server.url + path, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["type"] == "authentication_error"
    key = {"Authorization": "Bearer secret"}
    assert httpx.get(f"{server.url}/v1/models", headers=key).status_code == 200

    body = LONG | {"stream": True}
    with httpx.stream(
      "POST", f"{server.url}/v1/completions", json=body, headers=key, timeout=120
    ) as answer:
      lines = answer.iter_lines()
      next(lines)
      server.stop_soon()
      deadline = time.monotonic() + 60
      while True:  # No new connection is accepted.
        try:
          socket.create_connection(("127.0.0.1", server.port), timeout=1).close()
        except OSError:
          break
        assert time.monotonic() < deadline
        time.sleep(0.01)
      rest = list(lines)
    assert rest[-2:] == ["data: [DONE]", ""] or rest[-1] == "data: [DONE]"
    chunks = [json.loads(line[6:]) for line in rest if line.startswith("data: {")]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(60) == 0


def test_requests_beyond_the_limit_end_with_an_error_after_sigterm(workdir: Path, tmp_path: Path):
  flags = ("--slots=1", "--stop_seconds=0", "--decode_chunk=1", "--prompt_chunk=32")
  with (
    serve(workdir, tmp_path / "log", *flags) as server,
    socket.create_connection(("127.0.0.1", server.port)) as streams,
    socket.create_connection(("127.0.0.1", server.port)) as waits,
  ):
    streams.sendall(post_bytes(json.dumps(LONG | {"stream": True}).encode()))
    wait_for_slot(server)
    waits.sendall(post_bytes(json.dumps(LONG).encode()))
    while not server.metric("dga_requests_waiting"):
      time.sleep(0.001)
    assert server.stop() == 0
    stream, whole = read_all(streams), read_all(waits)
  assert whole.startswith(b"HTTP/1.1 503")
  assert b"The server is stopping." in whole
  *_, error, done = re.findall(rb"data: (.*)\n\n", stream)
  assert json.loads(error)["error"]["code"] == "engine_stopped"
  assert done == b"[DONE]"
  assert "Traceback" not in server.log.read_text()


def test_an_address_that_is_in_use_is_an_error_before_the_compilation():
  with socket.create_server(("127.0.0.1", 0)) as other:
    port = other.getsockname()[1]
    with pytest.raises(OSError, match=rf"listen at host 127\.0\.0\.1, port {port}: .*in use"):
      check_address("127.0.0.1", port)
  check_address("127.0.0.1", port)
  with pytest.raises(OSError, match=r"host no-host\.invalid, port 0"):
    check_address("no-host.invalid", 0)


def test_open_files_and_threads_do_not_grow(server):
  def count() -> tuple[int, int]:
    folder = Path(f"/proc/{server.process.pid}")
    return len([*(folder / "fd").iterdir()]), len([*(folder / "task").iterdir()])

  if not Path("/proc/self/fd").exists():
    pytest.skip("needs /proc")
  for _ in range(3):
    complete(server)
  files, threads = count()
  for _ in range(20):
    complete(server)
  server.wait_until_idle()
  time.sleep(0.1)
  assert count()[0] <= files + 1
  assert count()[1] <= threads + 1
