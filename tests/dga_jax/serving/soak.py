r"""Many clients against few slots for minutes; compares every answer and watches for leaks.

  python -m tests.dga_jax.serving.soak --clients=64 --slots=16 --minutes=10

Clients read whole answers and streams, read slowly, and disconnect. Every greedy float32 answer is
compared with the answer of an engine without other requests. At the end no slot is in use, kept
caches are within their bytes, and files, threads and memory equal those after the second round.

Both processes use JAX's default platform. On a GPU they share its memory, and products must be in
float32:

  JAX_DEFAULT_MATMUL_PRECISION=highest XLA_PYTHON_CLIENT_PREALLOCATE=false \
    python -m tests.dga_jax.serving.soak --minutes=2
"""

import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
from absl import app, flags, logging

from tests.dga_jax.serving.load import make_engine, make_jobs, PROMPT_CHUNK, run_clients
from tests.dga_jax.serving.tiny_server import serve, Server, write_chat_checkpoint

_CLIENTS = flags.DEFINE_integer("clients", 64, "Clients at the same time.", lower_bound=1)
_SLOTS = flags.DEFINE_integer("slots", 16, "Slots of the server.", lower_bound=1)
_MINUTES = flags.DEFINE_float("minutes", 10.0, "Length of the run.", lower_bound=0.1)
_JOBS = flags.DEFINE_integer("jobs", 150, "Different requests.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the requests.")

_ROUNDS = 10
_HOST_CACHE_GB = 0.02
_MEMORY_GROWTH = 1.05  # Of the resident memory after the first round.


class Usage(NamedTuple):
  """Memory, open files and threads of the server's process."""

  memory_mb: float
  files: int
  threads: int

  @classmethod
  def of(cls, server: Server) -> "Usage":
    """Reads /proc."""
    folder = Path(f"/proc/{server.process.pid}")
    status = (folder / "status").read_text()
    memory = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    return cls(
      int(memory) / 1024, len([*(folder / "fd").iterdir()]), len([*(folder / "task").iterdir()])
    )


def main(argv: list[str]) -> None:
  """Prints two lines a round, and all faults at the end."""
  del argv
  logging.set_verbosity(logging.WARNING)  # The checkpoint library logs every write.
  print(f"{jax.devices()[0].device_kind}: the answers of every request alone", flush=True)
  jobs = make_jobs(make_engine(), _JOBS.value, _SEED.value)
  with tempfile.TemporaryDirectory() as folder:
    workdir = write_chat_checkpoint(Path(folder) / "run")
    options = [f"--slots={_SLOTS.value}", f"--prompt_chunk={PROMPT_CHUNK}"]
    options += ["--max_waiting=32", f"--host_cache_gb={_HOST_CACHE_GB}"]
    platform = "cpu" if jax.default_backend() == "cpu" else "cuda"
    with serve(workdir, Path(folder) / "log", *options, platform=platform) as server:
      faults = _run(server, jobs)
      status = server.stop()
  if status != 0:
    faults.append(f"the exit status after SIGTERM is {status}")
  print("\n".join(faults) or "no fault")
  sys.exit(bool(faults))


def _run(server: Server, jobs: list) -> list[str]:
  faults, total, usages = [], 0, []
  for number in range(_ROUNDS):
    seconds = 60 * _MINUTES.value / _ROUNDS
    tally = asyncio.run(
      run_clients(
        server.url,
        jobs,
        clients=_CLIENTS.value,
        seconds=seconds,
        seed=_SEED.value + 1000 * number,
      )
    )
    server.wait_until_idle(120)
    time.sleep(1)  # Sockets of clients that left are closed.
    usages.append(Usage.of(server))
    total += sum(tally.counts.values()) - tally.counts["429"]
    faults += tally.wrong
    print(f"round {number + 1}: {dict(tally.counts)}, wrong {len(tally.wrong)}, {usages[-1]}")
    print(f"  kept caches {server.metric('dga_kept_caches'):g}", flush=True)
    if server.metric("dga_kept_host_bytes") > _HOST_CACHE_GB * 1e9:
      faults.append("kept caches exceed their bytes")
  print(f"{total} requests with {_CLIENTS.value} clients on {_SLOTS.value} slots")
  first, last = usages[1], usages[-1]
  if last.files > first.files or last.threads > first.threads:
    faults.append(f"files or threads grew from {first} to {last}")
  if last.memory_mb > _MEMORY_GROWTH * first.memory_mb:
    faults.append(f"memory grew from {first} to {last}")
  return faults


if __name__ == "__main__":
  app.run(main)
