"""Comparison of two training runs: their metrics and the arrays of a checkpoint."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

# Metrics that depend on the machine.
MEASURED = {
  "step_seconds",
  "tokens_per_second",
  "mfu",
  "data_wait_seconds",
  "host_memory_bytes",
  "device_memory_bytes",
}


def records(workdir: Path) -> list[dict[str, Any]]:
  """The records of metrics.jsonl without the metrics that depend on the machine."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [
    {name: value for name, value in json.loads(line).items() if name not in MEASURED}
    for line in lines
  ]


def losses(workdir: Path) -> dict[int, float]:
  """The training loss of each step."""
  return {record["step"]: record["loss"] for record in records(workdir) if "loss" in record}


def saved_arrays(workdir: Path, step: int) -> list[np.ndarray]:
  """All arrays of a checkpoint's parameters and training state, on any devices."""
  arrays: list[np.ndarray] = []
  with ocp.StandardCheckpointer() as reader:
    for item in ("params", "training"):
      folder = workdir / "checkpoints" / str(step) / item
      stored = reader.metadata(folder).item_metadata.tree
      target = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), stored)
      arrays += jax.tree.leaves(reader.restore(folder, target))
  return arrays


def assert_same_run(workdir: Path, other: Path, step: int) -> None:
  """Asserts equal metrics, and bit-for-bit equal arrays of the checkpoint of `step`."""
  for record, wanted in zip(records(workdir), records(other), strict=True):
    moved = {name: (record.get(name), x) for name, x in wanted.items() if record.get(name) != x}
    assert record == wanted, f"step {wanted.get('step')}: {moved}"
  for ours, theirs in zip(saved_arrays(workdir, step), saved_arrays(other, step), strict=True):
    np.testing.assert_array_equal(ours, theirs)
