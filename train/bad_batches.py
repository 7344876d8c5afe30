"""Files with the batches of bad steps, for inspection."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dga_jax.files.whole_file import whole_file
from train.prefetch import Taken

FOLDER = "bad_batches"


def record_batch(workdir: Path, step: int, taken: Taken, values: Mapping[str, float]) -> Path:
  """Writes this process's rows of a batch, with the numbers of its step.

  Returns:
    The .npz file, WORKDIR/bad_batches/step_<step>_process_<i>_of_<n>.npz: inputs, targets,
    segment_ids and loss_mask [rows, L], batch_index (the batch's number in the run's order, from
    0) and the step's scalars.
  """
  process = f"process_{jax.process_index()}_of_{jax.process_count()}"
  path = workdir / FOLDER / f"step_{step:08d}_{process}.npz"
  arrays: dict[str, Any] = {"batch_index": taken.index, **taken.rows, **values}
  with whole_file(path) as partial, partial.open("wb") as file:
    np.savez_compressed(file, **arrays)
    file.flush()
    os.fsync(file.fileno())
  return path
