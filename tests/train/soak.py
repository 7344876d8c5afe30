"""Kills training runs of several processes at random moments, for a given time.

  python -m tests.train.soak --minutes=30

A round is one training run. The command sends SIGKILL or SIGTERM to one process or to all, and
restarts the run until it is complete. In every other round each start has a random number of
processes. An interrupted run must equal an uninterrupted one. With a constant number of processes
the arrays are equal bit for bit. With a varying number each loss is equal within 1e-5, which shows
that the batches and their order are the same. The first run that differs ends the command with an
error.
"""

import collections
import math
import random
import sys
import tempfile
import time
from pathlib import Path
from signal import SIGKILL, SIGTERM

import numpy as np
from absl import app, flags, logging
from tqdm import tqdm

from dga_jax.checkpoint import list_steps
from tests.train.compare import assert_same_run, losses
from tests.train.fleet import Fleet, stop_at_random, Trainer
from tests.train.tiny import interruptible, tiny_config, write_config, write_corpus
from train.stop_signals import EXIT_STATUS

_MINUTES = flags.DEFINE_float("minutes", 10.0, "Minutes after which no new round starts.")
_SEED = flags.DEFINE_integer(
  "seed", None, "Seed of the moments and signals; default: a new one for each run."
)

STEPS = 24
MESHES = {2: ("--config.mesh.fsdp=-1",), 4: ("--config.mesh.fsdp=-1", "--config.mesh.data=2")}
# Signals are sent up to this many seconds after the first new step. The run may end earlier.
SPAN = 1.5


def main(argv: list[str]) -> None:
  """Runs rounds for --minutes."""
  del argv
  seed = time.time_ns() % 2**32 if _SEED.value is None else _SEED.value
  print(f"--seed={seed}", flush=True)
  logging.set_verbosity(logging.ERROR)
  rng = random.Random(seed)
  with tempfile.TemporaryDirectory() as folder:
    soak(Path(folder), rng, seconds=60 * _MINUTES.value)


def soak(folder: Path, rng: random.Random, *, seconds: float) -> None:
  """Runs rounds for `seconds` and compares each with an uninterrupted run."""
  for name in ("corpus", "compiled"):
    (folder / name).mkdir()
  write_corpus(folder / "corpus")
  config = tiny_config(folder / "corpus", folder / "data")
  config = interruptible(config, num_steps=STEPS, checkpoint_every=2)
  fleet = Fleet(write_config(config, folder / "config.py"), str(folder / "compiled"))
  uninterrupted = folder / "uninterrupted"
  fleet.run(uninterrupted, 2, *MESHES[2])
  counts: collections.Counter[str] = collections.Counter()
  until = time.monotonic() + seconds
  bar = tqdm(unit=" signals", file=sys.stdout, mininterval=10)
  while time.monotonic() < until:
    varies = counts["rounds"] % 2 == 1
    workdir = folder / f"round-{counts['rounds']}"
    interrupt(fleet, workdir, rng, counts, bar, varies=varies)
    if varies:
      np.testing.assert_allclose(
        [*losses(workdir).values()], [*losses(uninterrupted).values()], rtol=1e-5
      )
    else:
      assert_same_run(workdir, uninterrupted, STEPS)
    counts["rounds"] += 1
  bar.close()
  print(", ".join(f"{count} {name}" for name, count in counts.items()), flush=True)


def interrupt(
  fleet: Fleet,
  workdir: Path,
  rng: random.Random,
  counts: collections.Counter[str],
  bar: tqdm,
  *,
  varies: bool,
) -> None:
  """Restarts one run until it is complete. Three of four starts are interrupted."""
  while STEPS not in list_steps(workdir):
    number = rng.choice(list(MESHES)) if varies else 2
    if rng.random() < 0.25:
      fleet.run(workdir, number, *MESHES[number])
      continue
    trainers = fleet.start(workdir, number, *MESHES[number])
    signal = rng.choice((SIGKILL, SIGKILL, SIGTERM))
    victims = stop_at_random(trainers, workdir, signal, rng, span=SPAN)
    start = time.monotonic()
    statuses = [trainer.wait(timeout=60 + 120 * (signal == SIGTERM)) for trainer in trainers]
    seconds = math.ceil(time.monotonic() - start)
    counts["seconds until all had stopped, at most"] = max(
      seconds, counts["seconds until all had stopped, at most"]
    )
    if signal == SIGTERM and STEPS not in list_steps(workdir):
      assert statuses == [EXIT_STATUS] * number, "\n".join(trainer.output() for trainer in trainers)
    counts[_outcome(signal, victims)] += 1
    bar.update()


def _outcome(signal: int, victims: list[Trainer]) -> str:
  if signal == SIGKILL:
    killed = any(victim.process.exitcode == -SIGKILL for victim in victims)
    return "kills" if killed else "kills after the end"
  stopped = any("Asked to stop" in victim.output() for victim in victims)
  return "stops" if stopped else "stops after the end"


if __name__ == "__main__":
  app.run(main)
