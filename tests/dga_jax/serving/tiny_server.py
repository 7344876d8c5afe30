"""A server process on a free port, with a tiny model that has a chat template."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import jax.numpy as jnp
from flax import nnx

from dga_jax.checkpoint import Checkpoints
from tests.dga_jax.evaluation.tiny import CONFIG, TOKENIZER
from tests.dga_jax.model.random_decoder import random_decoder

ROOT = Path(__file__).parents[3]
NAME = "tiny"
MAX_LENGTH = 512
TEMPLATE = (
  "{% for message in messages %}<|end|>{{ message.role }}: {{ message.content }}\n{% endfor %}"
  "{% if add_generation_prompt %}<|end|>assistant: {% endif %}"
)


def write_chat_checkpoint(workdir: Path, *, template: str | None = TEMPLATE) -> Path:
  origin = {} if template is None else {"tokenizer_config": {"chat_template": template}}
  with Checkpoints(workdir, keep=1) as checkpoints:
    checkpoints.save(
      0,
      params=nnx.to_pure_dict(nnx.state(random_decoder(CONFIG), nnx.Param)),
      training={"step": jnp.int32(0)},
      data=None,
      config={"model": CONFIG.to_dict(), "origin": origin},
      tokenizer=TOKENIZER,
    )
  return workdir


class Server:
  """A running server."""

  def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    self.process, self.port, self.log = process, port, log
    self.url = f"http://127.0.0.1:{port}"

  def metric(self, name: str) -> float:
    """The sum of a metric over its labels."""
    lines = httpx.get(f"{self.url}/metrics").text.splitlines()
    found = [line for line in lines if line.partition("{")[0].partition(" ")[0] == name]
    assert found, name
    return sum(float(line.rpartition(" ")[2]) for line in found)

  def wait_until_idle(self, seconds: float = 30) -> None:
    """Waits until no request is in the engine."""
    deadline = time.monotonic() + seconds
    while self.metric("dga_requests_running") + self.metric("dga_requests_waiting"):
      assert time.monotonic() < deadline
      time.sleep(0.02)

  def stop_soon(self) -> None:
    """SIGTERM, without waiting."""
    self.process.send_signal(signal.SIGTERM)

  def stop(self) -> int:
    """SIGTERM; the exit status."""
    self.stop_soon()
    return self.process.wait(120)


@contextlib.contextmanager
def serve(workdir: Path, log: Path, *flags: str, platform: str = "cpu") -> Iterator[Server]:
  """Runs `python -m dga_jax.serve` on a platform of JAX until the context ends."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  command = [sys.executable, "-m", "dga_jax.serve", f"--workdir={workdir}", f"--name={NAME}"]
  command += [f"--port={port}", f"--max_length={MAX_LENGTH}", *flags]
  # XLA of one thread, and little optimization: the tiny model compiles fastest so on CPUs. The
  # servers of one checkpoint share what is compiled.
  on_cpu = {"NPROC": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  environment = (
    os.environ
    | (on_cpu if platform == "cpu" else {})
    | {
      "JAX_PLATFORMS": platform,
      "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
  )
  with log.open("wb") as output:
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
  server = Server(process, port, log)
  try:
    _wait_until_ready(server)
    yield server
  finally:
    if process.poll() is None:
      process.kill()
    process.wait()


def _wait_until_ready(server: Server) -> None:
  deadline = time.monotonic() + 600
  while True:
    assert server.process.poll() is None, server.log.read_text()
    assert time.monotonic() < deadline, server.log.read_text()
    with contextlib.suppress(httpx.TransportError):
      if httpx.get(f"{server.url}/health").json() == {"status": "ok"}:
        return
    time.sleep(0.1)
